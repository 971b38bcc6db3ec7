"""Dropout (Srivastava et al. 2014) that samples its masks seven times as fast as PyTorch does in bf16 on the CPU.

For bf16 on the CPU, PyTorch samples 64 random bits for each element, sequentially, which takes a sixth of a DETR's
training step. This file samples 16 bits for each element, which rounds the probability to a multiple of 1/65,536. On
other devices, for other types and under torch.compile, it calls PyTorch's dropout.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RANDOM_VALUES = 2**16  # the number of values of 16 random bits


class Dropout(nn.Dropout):
    """torch.nn.Dropout, computed by the function `dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        """x (...) -> (...)."""
        return dropout(x, self.p) if self.training else x


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero each element of x with probability p and scale the rest by 1 / (1 - p)."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    dropped_values = round(p * RANDOM_VALUES)
    if dropped_values in (0, RANDOM_VALUES):
        return x if dropped_values == 0 else x * 0
    # Four elements share the 64 random bits of one integer; an upper bound of None includes the highest integer.
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    keep = bits.view(torch.int16)[: x.numel()] >= dropped_values - RANDOM_VALUES // 2
    # A product is faster than `torch.where`, whose branch for each element is often mispredicted.
    factors = keep.view(torch.uint8).to(x.dtype).mul_(RANDOM_VALUES / (RANDOM_VALUES - dropped_values))
    return x * factors.view(x.shape)
