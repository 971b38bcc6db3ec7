"""Patches to tokens (Dosovitskiy et al. 2021, arXiv 2010.11929, equation 1), in two forms that compute the same.

`multiply` is the paper's text: cut the image into squares, write each as one long vector, and multiply it with a
matrix E. `convolution` is the same product as a convolution that strides by its own size, without the cutting.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.nn.linear import Tied

Form = Literal["convolution", "multiply"]


class Patches(nn.Module):
    """Tokens of an image: one for each square of `size` by `size` pixels, row by row."""

    def __init__(self, *, channels: int, size: int, width: int, form: Form):
        super().__init__()
        self.size, self.form = size, form
        self.weight = nn.Parameter(torch.empty(width, channels, size, size))
        self.bias = nn.Parameter(torch.zeros(width))
        lecun_normal_(self.weight)
        self.multiply = Tied(self) if form == "multiply" else None

    def forward(self, images: Tensor) -> Tensor:
        """images (B, channels, H, W) -> (B, HW / size^2, C); raises UserError where squares do not fill the image."""
        self.grid(images.shape[-2], images.shape[-1])
        if self.multiply is None:
            x = F.conv2d(images, self.weight, self.bias, stride=self.size)  # (B, C, h, w)
            return x.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, hw, C)
        squares = torch.unflatten(torch.unflatten(images, 3, (-1, self.size)), 2, (-1, self.size))  # (B, c, h, p, w, p)
        squares = squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # -> (B, hw, cpp)
        tokens: Tensor = self.multiply(squares)  # (B, hw, C)
        return tokens

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of squares in an image of that many pixels."""
        p = self.size
        if height % p or width % p:
            near = " or ".join(f"{height // p * p + i} x {width // p * p + j}" for i, j in _around(height, width, p))
            raise UserError(
                f"Images of {height} x {width} pixels cannot be cut into squares of {p}: both sides must be multiples "
                f"of {p}, such as {near} (data.image_size), or take another model.patch_size."
            )
        return height // p, width // p


def lecun_normal_(weight: Tensor) -> None:
    """LeCun's normal cut at two deviations, where the authors' code leaves flax its own first values.

    weight (outputs, inputs...) is filled in place; .8796 is what the cut leaves of the deviation.
    """
    deviation = math.sqrt(1 / weight[0].numel()) / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)


def _around(height: int, width: int, p: int) -> list[tuple[int, int]]:
    """What to add to the lower multiples: nothing, unless a side vanishes, or one square each where it is broken."""
    low = (0 if height >= p else p, 0 if width >= p else p)
    high = (p if height % p else 0, p if width % p else 0)
    return list(dict.fromkeys([low, high]))
