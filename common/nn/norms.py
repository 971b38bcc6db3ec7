"""Norms that are selected by name.

LayerNorm is from Ba et al. 2016 (arXiv 1607.06450), RMSNorm from Zhang and Sennrich 2019 (arXiv 1910.07467).
"""

from typing import Literal

from torch import nn

Norm = Literal["layer", "rms"]


def norm(name: Norm, width: int, eps: float) -> nn.Module:
    """A norm over the last axis, of length `width`, with a learned scale (and for LayerNorm a shift) per channel."""
    return nn.LayerNorm(width, eps=eps) if name == "layer" else nn.RMSNorm(width, eps=eps)
