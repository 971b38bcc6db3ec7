"""Region proposals of a two-stage detector: each token of the memory predicts a box.

Zhu et al. 2021, "Deformable DETR", arXiv 2010.04159, appendix A.4. In shapes, M is the number of memory tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.nn.linear import Linear
from detr.models.levels import Geometry
from detr.models.query_detector import Image
from detr.models.reference_boxes import boxes_from

BASE_SIDE = 0.05  # width and height of the initial boxes in the level of highest resolution, relative to the image
MARGIN = 0.01  # initial boxes with a coordinate within this distance of 0 or 1 are invalid


class Proposals(NamedTuple):
    """The predictions of all memory tokens."""

    logits: Tensor  # (B, M, K')
    boxes_cxcywh: Tensor  # (B, M, 4) relative to the image; ones for invalid tokens
    valid: Tensor  # (B, M), False for tokens in padding and at the image's border


class ProposalHead(nn.Module):
    """Predicts logits and a box from each memory token, by a class and a box head that the detector hands in."""

    def __init__(self, width: int):
        super().__init__()
        self.project = Linear(width, width)
        self.norm = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.project.weight)

    def forward(self, image: Image, class_head: nn.Module, box_head: nn.Module) -> Proposals:
        """Predict logits and a box for each of the M memory tokens, relative to an initial box around the token."""
        memory = image.memory.values
        assert memory is not None and image.geometry is not None
        initial, valid = initial_boxes(image.geometry)  # (B or 1, M, 4), (B or 1, M)
        if image.memory.may_look is not None:
            valid = valid & image.memory.may_look[:, 0, 0]
        valid = valid.expand(memory.shape[0], -1)
        initial = torch.where(valid[..., None], initial, 0.5)  # the boxes of invalid tokens may be infinite
        features = self.norm(self.project(memory.masked_fill(~valid[..., None], 0.0).to(self.norm.weight.dtype)))
        boxes = boxes_from(box_head(features), initial)
        return Proposals(class_head(features), torch.where(valid[..., None], boxes, 1.0), valid)


def initial_boxes(geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Compute a square box (B or 1, M, 4) around each token, and whether it is valid (B or 1, M).

    The side of the boxes doubles from level to level.
    """
    sides = [
        geometry.centres.new_full((height * width,), BASE_SIDE * 2**level)
        for level, (height, width) in enumerate(geometry.shapes)
    ]
    side = torch.cat(sides)[:, None].expand(-1, 2)  # (M, 2)
    boxes = torch.cat((geometry.centres, side.expand(geometry.centres.shape[0], -1, -1)), -1)
    return boxes, ((boxes > MARGIN) & (boxes < 1 - MARGIN)).all(-1)


def select_best(scores: Tensor, valid: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the indices (B, count) of the valid tokens with the highest scores (B, M), the highest first.

    If an image has fewer valid tokens than `count`, they are repeated in the same order; the second result (B, count)
    is False for repeated tokens. Invalid tokens are never selected, except in an image without any valid token.
    """
    scores = scores.detach().masked_fill(~valid, -torch.inf)
    numbers = torch.arange(count, device=scores.device)
    if torch.compiler.is_exporting():  # the graph cannot repeat tokens
        return scores.topk(count, dim=1).indices, (numbers >= 0).expand(scores.shape[0], -1)
    order = scores.topk(min(count, scores.shape[1]), dim=1).indices
    available = valid.sum(1, keepdim=True).clamp(1, order.shape[1])  # (B, 1)
    return order.gather(1, numbers % available), numbers < available
