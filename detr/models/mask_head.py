"""DETR's mask head: where each query attends in the image, refined by convolutions to the mask of its object.

Carion et al. 2020, "End-to-End Object Detection with Transformers", arXiv 2005.12872, section 4.4 and figure 8; the
numbers of channels are those of the official code.

Differs: Convolutions and norms read no padding, so the masks of an image do not depend on its batch (unless
`official_padding`). The first convolution's initial weights on the attention are larger (ATTENTION_GAIN).
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.nn.convolution import mask_padding
from common.nn.linear import Linear
from common.nn.norms import MaskedGroupNorm
from common.nn.resnet import FeatureMap

GROUPS = 8  # of the norms, or fewer for widths that are not divisible by it
# The weights of all heads and positions of a query sum to 1, so each is small beside the features of the map, and at
# first all queries have almost the same mask. Without the gain, the dice loss of small models does not decrease for
# hundreds of steps (RESULTS.md, "Masks on drawn shapes").
ATTENTION_GAIN = 64.0
MAPS_AT_ONCE = 128  # in evaluation: pairs of an image and a query whose maps are computed at the same time


class MaskInput(NamedTuple):
    """The maps of the images that the mask head reads; C is the width of the detector."""

    maps: Sequence[FeatureMap]  # of the backbone, the highest resolution first, without the last one
    projected: FeatureMap  # its last map, projected to C channels
    memory: Tensor  # (B, C, H', W') the encoder's output at the positions of `projected`


class MaskQueries(NamedTuple):
    """The queries whose masks can be computed, and the maps of their images."""

    x: Tensor  # (B, Q, C) the last layer's ordinary queries after the final norm
    image: MaskInput


class MaskAttention(nn.Module):
    """The attention weights of queries over a map; the weights of all heads and positions of a query sum to 1."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (width / heads) ** -0.5
        self.query, self.key = Linear(width, width), Linear(width, width)
        for layer in (self.query, self.key):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, memory: Tensor, real: Tensor | None) -> Tensor:
        """Queries x (B, Q, C) and memory (B, C, H, W) -> (B, Q, h, H, W); `real` (B, H, W) is False in padding."""
        queries = self.query(x).unflatten(-1, (self.heads, -1)) * self.scale  # (B, Q, h, c)
        keys = self.key(memory.flatten(2).transpose(1, 2)).unflatten(-1, (self.heads, -1))  # (B, M, h, c)
        scores = torch.einsum("bqhc,bmhc->bqhm", queries, keys)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if real is not None:
            scores = scores.masked_fill(~real.flatten(1)[:, None, None], -torch.inf)
        weights: Tensor = scores.flatten(2).softmax(-1).unflatten(-1, (self.heads, *memory.shape[-2:]))
        return weights


class MaskHead(nn.Module):
    """Two convolutions of a query's attention and the projected map, then one for each map of higher resolution."""

    def __init__(self, width: int, heads: int, map_channels: Sequence[int], official_padding: bool):
        """Build the head for maps with `map_channels` channels, the highest resolution first."""
        super().__init__()
        self.attention = MaskAttention(width, heads)
        narrow = [width // 2 ** (i + 1) for i in range(len(map_channels) + 1)]  # width / 2, width / 4, ...
        channels = [width + heads, width + heads, *narrow]
        convs = [_convolution(a, b, 3) for a, b in pairwise(channels)]
        with torch.no_grad():
            convs[0].weight[:, width:] *= ATTENTION_GAIN
        self.convs = nn.ModuleList(convs)
        self.norms = nn.ModuleList(MaskedGroupNorm(math.gcd(GROUPS, count), count) for count in channels[1:])
        self.adapters = nn.ModuleList(
            _convolution(a, b, 1) for a, b in zip(reversed(map_channels), narrow, strict=False)
        )
        self.output = _convolution(channels[-1], 1, 3)
        self.official_padding = official_padding

    def forward(self, x: Tensor, image: MaskInput, rows: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Compute mask logits of queries x (B, Q, C), in the resolution (H, W) of the first of the maps.

        `rows` holds the indices (N,) of an image and of a query for each of N masks: (N, H, W). If it is None, the
        masks of all queries are computed: (B, Q, H, W), in evaluation in chunks of queries, with equal results.
        """
        weights = self.attention(x, image.memory, image.projected.real)  # (B, Q, h, H', W')
        if rows is not None:
            return self._refine(weights[rows], image, rows[0])
        images = torch.arange(x.shape[0], device=x.device)
        count = x.shape[1] if torch.is_grad_enabled() else max(1, MAPS_AT_ONCE // max(1, x.shape[0]))
        chunks = []
        for chunk in weights.split(count, 1):  # (B, q, h, H', W')
            masks = self._refine(chunk.flatten(0, 1), image, images.repeat_interleave(chunk.shape[1]))
            chunks.append(masks.unflatten(0, chunk.shape[:2]))
        return torch.cat(chunks, 1)

    def _refine(self, weights: Tensor, image: MaskInput, images: Tensor) -> Tensor:
        """Attention weights (N, h, H', W') of queries, and the index (N,) of their images -> mask logits (N, H, W)."""
        maps = [image.projected, *reversed(image.maps)]
        masks = [self._real(each, images) for each in maps]
        x = mask_padding(torch.cat((image.projected.features[images], weights), 1), masks[0])
        for i in (0, 1):
            x = self._block(i, x, masks[0])
        for i, (adapter, finer) in enumerate(zip(self.adapters, maps[1:], strict=True), 1):
            x = adapter(finer.features)[images] + F.interpolate(x, size=finer.features.shape[-2:])
            x = self._block(i + 1, mask_padding(x, masks[i]), masks[i])
        logits: Tensor = self.output(x)[:, 0]
        return logits

    def _block(self, i: int, x: Tensor, real: Tensor | None) -> Tensor:
        # The norm gives zero in padding, as the next convolution needs.
        y: Tensor = self.norms[i](self.convs[i](x), real).relu()
        return y

    def _real(self, each: FeatureMap, images: Tensor) -> Tensor | None:
        return None if each.real is None or self.official_padding else each.real[images, None]


def _convolution(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv
