"""Map an image's patches to tokens (Dosovitskiy et al. 2021, arXiv 2010.11929, equation 1), in two equivalent forms.

`multiply` follows the paper's text: split the image into patches, flatten each patch, and multiply it by a matrix E.
`convolution` computes this product as a convolution whose kernel size and stride are the patch size.
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
    """Maps an image to one token for each patch of `size` by `size` pixels, row by row."""

    def __init__(self, *, channels: int, size: int, width: int, form: Form):
        super().__init__()
        self.size, self.form = size, form
        self.weight = nn.Parameter(torch.empty(width, channels, size, size))
        self.bias = nn.Parameter(torch.zeros(width))
        lecun_normal_(self.weight)
        self.multiply = Tied(self) if form == "multiply" else None

    def forward(self, images: Tensor) -> Tensor:
        """images (B, channels, H, W) -> (B, HW / size^2, width).

        Raises UserError if `size` does not divide H and W.
        """
        self.grid(images.shape[-2], images.shape[-1])
        if self.multiply is None:
            x = F.conv2d(images, self.weight, self.bias, stride=self.size)  # (B, C, h, w)
            return x.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, hw, C)
        tokens: Tensor = self.multiply(split_into_patches(images, self.size).flatten(2))  # (B, hw, cpp) -> (B, hw, C)
        return tokens

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return `patch_grid` for the size of these patches."""
        return patch_grid(height, width, self.size)


def patch_grid(height: int, width: int, size: int) -> tuple[int, int]:
    """The numbers of rows and columns of patches of `size` pixels in an image of `height` by `width` pixels.

    Raises UserError if `size` does not divide `height` and `width`.
    """
    if height % size or width % size:
        suitable = " or ".join(f"{rows} x {columns}" for rows, columns in _nearest_multiples(height, width, size))
        raise UserError(
            f"Images of {height} x {width} pixels cannot be split into patches of {size} x {size}: both sides must be "
            f"multiples of {size}, such as {suitable}; change data.image_size or model.patch_size."
        )
    return height // size, width // size


def split_into_patches(images: Tensor, size: int) -> Tensor:
    """Split images (B, channels, H, W) into patches (B, HW / size^2, channels, size, size), row by row."""
    patches = torch.unflatten(torch.unflatten(images, 3, (-1, size)), 2, (-1, size))  # (B, c, h, p, w, p)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # -> (B, hw, c, p, p)


def lecun_normal_(weight: Tensor) -> None:
    """Fill a weight (outputs, inputs...) from LeCun's normal distribution, truncated at two standard deviations.

    The variance is one over the number of inputs. The code of Dosovitskiy et al. uses this distribution, which is
    flax's default. Truncation reduces the standard deviation to 0.8796 of its value; a division compensates for this.
    """
    deviation = math.sqrt(1 / weight[0].numel()) / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)


def _nearest_multiples(height: int, width: int, p: int) -> list[tuple[int, int]]:
    """The image size with both sides rounded down to multiples of p (at least p), and the size with both rounded up."""
    low = (max(p, height // p * p), max(p, width // p * p))
    high = (math.ceil(height / p) * p, math.ceil(width / p) * p)
    return list(dict.fromkeys([low, high]))
