"""Multi-scale deformable attention (Zhu et al. 2021, arXiv 2010.04159, section 4.1, equation 3)."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.nn.linear import Linear
from common.nn.recording import Samples
from detr.models.sampling import Shapes, sample, widths_and_heights


class References(NamedTuple):
    """The places around which queries sample the levels of a memory, relative to the padded map of each level."""

    places: Tensor  # (B or 1, N, L, 2) points x y, or (B or 1, N, L, 4) boxes cxcywh
    shapes: Shapes


class DeformableAttention(nn.Module):
    """Attention in which each query reads a few points of each level, around its reference.

    The points and their weights are linear functions of the query. Raises UserError if `heads` does not divide `width`.
    """

    def __init__(self, *, width: int, heads: int, levels: int, points: int):
        super().__init__()
        if width % heads:
            raise UserError(f"model.width={width} must be divisible by model.heads={heads}.")
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = Linear(width, heads * levels * points * 2)
        self.attention_weights = Linear(width, heads * levels * points)
        self.value_proj = Linear(width, width)
        self.out_proj = Linear(width, width)
        self.recorded_samples: list[Samples] | None = None  # see common.nn.recording.record_samples
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the parameters: the heads sample in different directions, at a distance of 1 to P cells.

        The directions lie on a square, as in the official code: each angle's larger coordinate is 1 or -1.
        """
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        directions = torch.stack((angles.cos(), angles.sin()), -1)  # (h, 2)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, self.points + 1)[:, None]  # (P, 1)
        ring = (directions[:, None, None] * distances).expand(-1, self.levels, -1, -1)  # (h, L, P, 2)
        self.sampling_offsets.weight.zero_()
        self.sampling_offsets.bias.copy_(ring.flatten())
        for weights in (self.attention_weights.weight, self.attention_weights.bias):
            weights.zero_()
        for projection in (self.value_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            projection.bias.zero_()

    def forward(self, *, q: Tensor, v: Tensor, guide: References, may_look: Tensor | None = None, **_: Any) -> Tensor:
        """q (B, N, C), v (B, M, C) -> (B, N, C).

        v holds the positions of all levels, level after level and row by row. `may_look` (B, 1, 1, M) is False in
        padding, which has the value zero. The further keyword arguments of `Attention.forward` have no effect.

        A point's offset from a reference point is in cells of the level. From a reference box, it is in units of half
        the box's width and height divided by P.
        """
        values = self.value_proj(v)  # (B, M, C)
        if may_look is not None:  # after the projection, whose bias would otherwise remain in the padding
            values = values.masked_fill(~may_look[:, 0, 0, :, None], 0.0)
        shape = (self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(q).unflatten(-1, (*shape, 2))  # (B, N, h, L, P, 2)
        weights = self.attention_weights(q).unflatten(-1, (self.heads, -1)).softmax(-1).unflatten(-1, shape[1:])
        locations = self._locations(offsets, guide)
        if self.recorded_samples is not None:
            self.recorded_samples.append(_samples(locations, weights, guide))
        out: Tensor = self.out_proj(sample(values, guide.shapes, locations, weights))
        return out

    def _locations(self, offsets: Tensor, guide: References) -> Tensor:
        """Offsets (B, N, h, L, P, 2) -> x and y relative to the map of each level, in the dtype of the references."""
        places = guide.places[:, :, None, :, None]  # (B or 1, N, 1, L, 1, 2 or 4)
        offsets = offsets.to(places.dtype)
        if places.shape[-1] == 4:
            return places[..., :2] + offsets * places[..., 2:] * (0.5 / self.points)
        return places + offsets / widths_and_heights(guide.shapes, places)[:, None]


def _samples(locations: Tensor, weights: Tensor, guide: References) -> Samples:
    """Record the sampling points, and as reference points those of the first level."""
    references = guide.places[:, :, 0, :2].expand(len(locations), -1, -1)
    return Samples(locations.detach(), weights.detach(), guide.shapes, references.detach())
