"""Key-value caches as inputs and outputs of exported graphs: one tensor for all layers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.nn.attention import Cache


class ConcatenatedCache(Cache):
    """A cache that grows by concatenation, without the spare capacity of its base class."""

    def __init__(self, pair: Tensor):
        """Start with the keys and values of M tokens, given as `pair` (2, B, h, M, C/h)."""
        super().__init__()
        self.length, self.buffers = pair.shape[3], (pair[0], pair[1])

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, h, N, C/h) of N tokens -> all keys and values, (B, h, M + N, C/h) each."""
        keys, values = self.content()
        self.length, self.buffers = self.length + k.shape[2], (torch.cat([keys, k], 2), torch.cat([values, v], 2))
        return self.buffers


def stack(caches: Sequence[Cache]) -> Tensor:
    """Stack the keys and values of all layers; returns (L, 2, B, h, M, C/h)."""
    return torch.stack([torch.stack(cache.content()) for cache in caches])
