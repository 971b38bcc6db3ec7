"""DETR's mask head: where each query attends in the image, refined by convolutions to the mask of its object.

Carion et al. 2020, "End-to-End Object Detection with Transformers", arXiv 2005.12872, section 4.4 and figure 8; the
numbers of channels are those of the official code.

Differs: Convolutions and norms read no padding, so the masks of an image do not depend on its batch (unless
`official_padding`).
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
MAPS_AT_ONCE = 128  # in evaluation: pairs of an image and a query whose maps are computed at the same time


class MaskInput(NamedTuple):
    """The maps of the images that the mask head reads; C is the width of the detector."""

    maps: Sequence[FeatureMap]  # of the backbone, the highest resolution first, without the last one
    projected: FeatureMap  # its last map, projected to C channels
    memory: Tensor  # (B, C, H', W') the encoder's output at the positions of `projected`


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
        self.convs = nn.ModuleList(_convolution(a, b, 3) for a, b in pairwise(channels))
        self.norms = nn.ModuleList(MaskedGroupNorm(math.gcd(GROUPS, count), count) for count in channels[1:])
        self.adapters = nn.ModuleList(
            _convolution(a, b, 1) for a, b in zip(reversed(map_channels), narrow, strict=False)
        )
        self.output = _convolution(channels[-1], 1, 3)
        self.official_padding = official_padding

    def forward(self, x: Tensor, image: MaskInput) -> Tensor:
        """Compute mask logits (B, Q, H, W) of queries x (B, Q, C), in the resolution of the first of the maps.

        In evaluation, the queries are computed in chunks, with equal results.
        """
        weights = self.attention(x, image.memory, image.projected.real)  # (B, Q, h, H', W')
        count = x.shape[1] if torch.is_grad_enabled() else max(1, MAPS_AT_ONCE // max(1, x.shape[0]))
        return torch.cat([self._refine(chunk, image) for chunk in weights.split(count, 1)], 1)

    def _refine(self, weights: Tensor, image: MaskInput) -> Tensor:
        """Attention weights (B, q, h, H', W') of q of the queries -> mask logits (B, q, H, W)."""
        images, queries = weights.shape[:2]
        maps = [image.projected, *reversed(image.maps)]
        masks = [self._real(each, queries) for each in maps]
        features = torch.cat((_repeat(image.projected.features, queries), weights.flatten(0, 1)), 1)
        x = mask_padding(features, masks[0])
        for i in (0, 1):
            x = self._block(i, x, masks[0])
        for i, (adapter, finer) in enumerate(zip(self.adapters, maps[1:], strict=True), 1):
            shape = finer.features.shape[-2:]
            x = _repeat(adapter(finer.features), queries) + F.interpolate(x, size=shape)
            x = self._block(i + 1, mask_padding(x, masks[i]), masks[i])
        logits: Tensor = self.output(x).unflatten(0, (images, queries))[:, :, 0]
        return logits

    def _block(self, i: int, x: Tensor, real: Tensor | None) -> Tensor:
        # The norm gives zero in padding, as the next convolution needs.
        y: Tensor = self.norms[i](self.convs[i](x), real).relu()
        return y

    def _real(self, each: FeatureMap, queries: int) -> Tensor | None:
        if each.real is None or self.official_padding:
            return None
        return _repeat(each.real[:, None], queries)


def _repeat(x: Tensor, queries: int) -> Tensor:
    """Repeat maps for each query: (B, C, H, W) -> (B q, C, H, W)."""
    return x.repeat_interleave(queries, 0)


def _convolution(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv
