"""Norms that are selected by name, a LayerNorm for maps, and a GroupNorm for padded maps.

LayerNorm is from Ba et al. 2016 (arXiv 1607.06450), RMSNorm from Zhang and Sennrich 2019 (arXiv 1910.07467), and
GroupNorm from Wu and He 2018 (arXiv 1803.08494).
"""

from typing import Literal

import torch
from torch import Tensor, nn

Norm = Literal["layer", "rms"]


def norm(name: Norm, width: int, eps: float) -> nn.Module:
    """A norm over the last axis, of length `width`, with a learned scale (and for LayerNorm a shift) per channel."""
    return nn.LayerNorm(width, eps=eps) if name == "layer" else nn.RMSNorm(width, eps=eps)


class LayerNorm2d(nn.LayerNorm):
    """A LayerNorm over the channels of each position of a map."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MaskedGroupNorm(nn.GroupNorm):
    """A GroupNorm whose mean and variance are those of the positions that are not padding.

    With PyTorch's GroupNorm, an image's features would depend on how much the image is padded in its batch.
    """

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), in at least fp32; `real` (B, 1, H, W) is False in padding, None = no padding.

        The result is zero in the padding. A group with a single value has the result `bias`, with or without padding.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if real is None:  # PyTorch's module would refuse a batch of one image with a single value in each group
            return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        x = x.unflatten(1, (self.num_groups, -1))  # (B, G, C/G, H, W)
        mask = real[:, None].to(x.dtype)  # (B, 1, 1, H, W)
        count = mask.sum((2, 3, 4), keepdim=True) * x.shape[2]
        mean = (x * mask).sum((2, 3, 4), keepdim=True) / count  # (B, G, 1, 1, 1)
        centred = (x - mean) * mask
        variance = centred.square().sum((2, 3, 4), keepdim=True) / count
        y = (centred * (variance + self.eps).rsqrt()).flatten(1, 2)  # (B, C, H, W)
        return (y * self.weight[:, None, None] + self.bias[:, None, None]) * real
