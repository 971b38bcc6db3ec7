"""Norms by name.

LayerNorm is Ba et al. 2016 (arXiv 1607.06450), RMSNorm Zhang and Sennrich 2019 (arXiv 1910.07467).
"""

from typing import Literal

from torch import nn

Norm = Literal["layer", "rms"]


def norm(name: Norm, width: int, eps: float) -> nn.Module:
    """A norm over the last axis of length `width`, with a learned scale (and in LayerNorm a shift) for each channel."""
    return nn.LayerNorm(width, eps=eps) if name == "layer" else nn.RMSNorm(width, eps=eps)
