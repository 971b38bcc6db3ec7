"""Key-value caches as inputs and outputs of exported graphs: one tensor for all layers.

The layers of a compressed model may have different numbers of heads (common/nn/compressed.py). The tensor then has room
for the largest number, and the rest of other layers is zero.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.nn.attention import Cache


class ConcatenatedCache(Cache):
    """A cache that grows by concatenation, without the spare capacity of its base class."""

    def __init__(self, pair: Tensor, attention: Any):
        """Start with the keys and values of M tokens for an attention: `pair` (2, B, h, M, C/h).

        h is at least the number of heads of the attention; the others are dropped.
        """
        super().__init__()
        pair = pair[:, :, : attention.heads] if pair.shape[2] > attention.heads else pair
        self.length, self.buffers = pair.shape[3], (pair[0], pair[1])

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, h, N, C/h) of N tokens -> all keys and values, (B, h, M + N, C/h) each."""
        keys, values = self.content()
        self.length, self.buffers = self.length + k.shape[2], (torch.cat([keys, k], 2), torch.cat([values, v], 2))
        return self.buffers


def stack(caches: Sequence[Cache]) -> Tensor:
    """Stack the keys and values of all layers; returns (L, 2, B, h, M, C/h), where h is the largest number of heads."""
    pairs = [torch.stack(cache.content()) for cache in caches]
    heads = max(pair.shape[2] for pair in pairs)
    return torch.stack([_with_heads(pair, heads) for pair in pairs])


def most_heads(model: Any) -> int:
    """The largest number of heads among the self-attentions of the decoder's layers."""
    return max(int(block.attention.heads) for block in model.decoder.blocks)


def _with_heads(pair: Tensor, heads: int) -> Tensor:
    missing = heads - pair.shape[2]
    return F.pad(pair, (0, 0, 0, 0, 0, missing)) if missing else pair
