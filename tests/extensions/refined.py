"""A detector whose layers refine each other's boxes (Zhu et al. 2021, arXiv 2010.04159, A.4), with a second head.

The second head says how much of its image an object covers. A box says that, too: what counts here is how little a
head, its term and its task take.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.nn.blocks import BlockOptions, Memory, Stack
from common.nn.linear import Linear
from common.nn.positions import sine, sine_2d
from common.nn.resnet import Backbone, BackboneOptions
from common.types import NonNegativeFloat, Positive
from detr.criterion.matcher import MatcherOptions
from detr.criterion.set_loss import LossOptions
from detr.criterion.terms import Comparison, Term
from detr.models.detector import BoxHead
from detr.models.query_detector import Image, Outputs, Queries, QueryDetector
from detr.tasks.detection import Detection, PredictOptions


@dataclass(frozen=True)
class Cover(Term):
    """The absolute error of the share of the image that a box covers."""

    name = "cover"
    reads = "covers"

    def __call__(self, compared: Comparison) -> Tensor:
        """See Term."""
        truth = compared.objects(compared.targets.boxes[:, 2:].prod(-1))  # (M,)
        return compared.per_layer((compared.answers("covers") - truth).abs())


class CoverDetection(Detection):
    """Detection with one more term."""

    def __init__(
        self,
        *,
        data: Any,
        queries: Positive,
        loss: LossOptions,
        matcher: MatcherOptions,
        predict: PredictOptions,
        evaluator: str,
        cover_weight: NonNegativeFloat,
    ):
        super().__init__(data=data, queries=queries, loss=loss, matcher=matcher, predict=predict, evaluator=evaluator)
        self.criterion.terms.append(Cover(cover_weight))


class Refined(QueryDetector):
    """Each query has a box; a layer sees where it is, moves it, and hands it to the next layer."""

    guided = True
    auxiliary = True
    decided_by_data = ("class_head",)

    def __init__(
        self, *, classes: int, logits: int, width: Positive, heads: Positive, layers: Positive, queries: Positive
    ):
        super().__init__()
        self.width = width
        options = BackboneOptions(name="small", weights="none", dilation=False, frozen=0)
        self.backbone = Backbone(options, official_padding=False)
        self.project = nn.Conv2d(self.backbone.channels, width, 1)
        blocks = BlockOptions(width=width, heads=heads, feedforward=2 * width, pre_norm=True)
        self.decoder = Stack(blocks, layers=layers, cross=True, final_norm=True)
        self.queries = nn.Embedding(queries, 4)  # boxes cxcywh before the sigmoid
        self.class_head = Linear(width, logits)
        self.box_head = BoxHead(width)
        self.cover_head = Linear(width, 1)

    def look(self, images: Tensor, sizes: Tensor | None) -> Image:
        """Images (B, 3, H, W) to a memory of their features."""
        features, real = self.backbone(images, sizes)
        values = self.project(features).flatten(2).transpose(1, 2)  # (B, C, H', W') -> (B, M, C)
        shape = (1, *features.shape[-2:])
        everywhere = torch.ones(shape, dtype=torch.bool, device=images.device)
        positions = sine_2d(everywhere if real is None else real, self.width, 20.0).flatten(1, 2)  # (B, M, C)
        may_look = None if real is None else real.flatten(1)[:, None, None]
        return Image(Memory(values + positions, values + positions, may_look))

    def ask(self, image: Image, hints: dict[str, Tensor] | None) -> Queries:
        """The table's boxes (B, Q, 4), and contents of zeros."""
        assert image.memory.values is not None
        boxes = self.queries.weight.sigmoid().expand(len(image.memory.values), -1, -1)
        return Queries(boxes.new_zeros(*boxes.shape[:2], self.width), boxes)

    def decode(self, block: nn.Module, x: Tensor, guide: Tensor, queries: Queries, image: Image) -> Tensor:
        """The layer sees its boxes as sines of their four numbers."""
        positions = sine(guide * 6.28, self.width // 4, 20.0).flatten(-2)  # (B, Q, 4) -> (B, Q, C)
        return super().decode(block, x, positions, queries, image)

    def read(self, layer: int | None, x: Tensor, guide: Tensor, image: Image) -> Outputs:
        """x (B, Q, C): the boxes are the layer's own, moved."""
        boxes = (self.box_head(x) + guide.logit(eps=1e-5)).sigmoid()
        covers = self.cover_head(x).squeeze(-1).sigmoid()
        return {"logits": self.class_head(x), "boxes_cxcywh": boxes, "covers": covers}

    def follow(self, guide: Tensor, outputs: Outputs) -> Tensor:
        """The next layer starts from this layer's boxes, without their gradient."""
        boxes: Tensor = outputs["boxes_cxcywh"].detach()
        return boxes
