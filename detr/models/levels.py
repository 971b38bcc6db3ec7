"""The levels of a multi-scale detector: projected feature maps, concatenated to one memory, and their geometry.

Zhu et al. 2021, "Deformable DETR", arXiv 2010.04159, section 4.1 and appendix A.2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.nn.convolution import mask_padding
from common.nn.norms import MaskedGroupNorm
from common.nn.positions import sine_2d
from common.nn.resnet import FeatureMap, PyramidBackbone
from common.types import Positive, PositiveFloat
from detr.models.sampling import Shapes, widths_and_heights

MAX_GROUPS = 32  # of the GroupNorm after each projection; the official code has 32


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """What deformable attention samples.

    maps: number of feature maps of the backbone that are used, counted from its last stage.
    levels: number of levels; levels beyond `maps` are computed from the last map by convolutions with stride 2.
    points: number of sampling points of each query and head in each level.
    """

    maps: Positive
    levels: Positive
    points: Positive


@dataclass(frozen=True, kw_only=True)
class SinePositionOptions:
    """The position encodings of the levels: fixed sines and cosines, and a learned vector for each level.

    kind: "sine"; learned positions are not available, because their tables do not fit maps of high resolution.
    temperature: temperature of the sines, 10,000 in the paper.
    at_input: whether the encodings are also added to the encoder's input.
    centred: whether the coordinate of a token is that of its centre, as in Deformable DETR, or of its right and lower
        edge, as in DETR and DINO.
    """

    kind: Literal["sine"]
    temperature: PositiveFloat
    at_input: bool
    centred: bool


class Geometry(NamedTuple):
    """Where the tokens of a memory lie in the image.

    Places are relative to each image without padding. `ratios` converts them to the padded map of a level.
    """

    shapes: Shapes  # (height, width) of the padded map of each level
    centres: Tensor  # (B or 1, M, 2) x and y of the centre of each token; above 1 in padding
    ratios: Tensor  # (B or 1, L, 2) width and height of the image divided by those of the padded map

    def scaled(self, places: Tensor) -> Tensor:
        """Convert points (B, N, 2) or boxes (B, N, 4) to places (B, N, L, 2 or 4) relative to each padded map."""
        ratios = self.ratios.repeat(1, 1, places.shape[-1] // 2)  # (B or 1, L, 2 or 4)
        return places[:, :, None] * ratios[:, None]


class Projection(nn.Module):
    """A convolution and a GroupNorm, which map a feature map to the width of the detector."""

    def __init__(self, inputs: int, width: int, kernel: int, official_padding: bool):
        super().__init__()
        self.conv = nn.Conv2d(inputs, width, kernel, stride=1 if kernel == 1 else 2, padding=kernel // 2)
        self.norm = MaskedGroupNorm(math.gcd(MAX_GROUPS, width), width)
        self.official_padding = official_padding
        nn.init.xavier_uniform_(self.conv.weight)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        """(B, C', H, W) -> (B, C, H', W'); `real` (B, H', W') is False in the padding of the output."""
        y: Tensor = self.norm(self.conv(x), None if real is None or self.official_padding else real[:, None])
        return y


class Projections(nn.ModuleList):
    """Project a backbone's maps to the levels of a memory; further levels have half the resolution of the last one.

    Raises UserError if `sampling` has fewer levels than maps.
    """

    def __init__(self, backbone: PyramidBackbone, sampling: SamplingOptions, width: int):
        extra = sampling.levels - sampling.maps
        if extra < 0:
            raise UserError(
                f"model.sampling.levels={sampling.levels} must be at least model.sampling.maps={sampling.maps}."
            )
        padding = backbone.official_padding
        super().__init__(
            Projection(channels, width, 1, padding) for channels in backbone.map_channels[-sampling.maps :]
        )
        inputs = [backbone.map_channels[-1], *[width] * extra]
        self.extend(Projection(channels, width, 3, padding) for channels in inputs[:extra])

    def forward(
        self, maps: Sequence[FeatureMap], backbone: PyramidBackbone, shape: Sequence[int], sizes: Tensor | None
    ) -> list[FeatureMap]:
        """Compute the maps (B, C, H, W) of all levels, the highest resolution first.

        `shape` is the padded (H, W) of the images, and `sizes` (B, 2) are their heights and widths without padding.

        The first level beyond the maps is computed from the backbone's last map itself, and each further one from the
        level before, as in the official code.
        """
        levels = [FeatureMap(project(x, real), real, s) for project, (x, real, s) in zip(self, maps, strict=False)]
        last = maps[-1]
        for project in list(self)[len(maps) :]:
            inside = None if last.real is None or backbone.official_padding else last.real[:, None]
            x, stride = mask_padding(last.features, inside), 2 * last.stride
            height, width = ((side - 1) // 2 + 1 for side in x.shape[-2:])
            real = backbone.real_positions((height, width), shape, sizes, stride)
            last = FeatureMap(project(x, real), real, stride)
            levels.append(last)
        return levels


def geometry(levels: Sequence[FeatureMap], dtype: torch.dtype) -> Geometry:
    """Compute where the tokens of the levels lie in the image; `dtype` is float32 or float64."""
    centres, ratios = [], []
    for features, real, _ in levels:
        height, width = features.shape[-2:]
        cells = widths_and_heights([(height, width)], features.new_empty(0, dtype=dtype))  # (1, 2)
        inside = cells if real is None else torch.stack((real[:, 0].sum(-1), real[:, :, 0].sum(-1)), -1).to(dtype)
        rows, columns = (torch.arange(side, dtype=dtype, device=features.device) + 0.5 for side in (height, width))
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).flatten(0, 1)  # (H W, 2)
        centres.append(grid / inside[:, None])  # (B or 1, H W, 2)
        ratios.append(inside / cells)
    shapes = [(features.shape[2], features.shape[3]) for features, _, _ in levels]
    return Geometry(shapes, torch.cat(centres, 1), torch.stack(ratios, 1))


def concatenate(levels: Sequence[FeatureMap]) -> tuple[Tensor, Tensor | None]:
    """Concatenate the tokens of the levels; returns them (B, M, C) and `real` (B, M), False in padding, or None."""
    memory = torch.cat([features.flatten(2).transpose(1, 2) for features, _, _ in levels], 1)
    masks = [real.flatten(1) for _, real, _ in levels if real is not None]
    return memory, torch.cat(masks, 1) if masks else None


def positions(
    levels: Sequence[FeatureMap], width: int, options: SinePositionOptions, dtype: torch.dtype
) -> list[Tensor]:
    """Compute the sine encodings (B or 1, H W, width) of each level, in `dtype` (float32 or float64)."""
    encodings = []
    for features, real, _ in levels:
        if real is None:
            real = torch.ones(1, *features.shape[-2:], dtype=torch.bool, device=features.device)
        encoding = sine_2d(real, width, options.temperature, centred=options.centred, dtype=dtype)
        encodings.append(encoding.flatten(1, 2))
    return encodings
