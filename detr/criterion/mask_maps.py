"""Masks of objects on the map of a promptable model, and the model's masks in the pixels of an image.

The map has M x M cells and covers the square of S x S pixels to which the model pads an image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def to_cells(masks: Tensor, image_size: int, cells: int) -> Tensor:
    """Resize masks of padded images to the map: boolean (T, H, W) -> boolean (T, M, M), where M = `cells`.

    A cell belongs to an object if more than half of its pixels do. If there is no such cell, every cell with a pixel of
    the object does, so that a small object does not vanish.
    """
    height, width = masks.shape[-2:]
    padded = F.pad(masks.float(), (0, image_size - width, 0, image_size - height))  # (T, S, S)
    fractions = padded if cells == image_size else F.adaptive_avg_pool2d(padded, cells)  # (T, M, M)
    majority = fractions > 0.5
    return torch.where(majority.flatten(1).any(1)[:, None, None], majority, fractions > 0)


def real_cells(sizes: Tensor, image_size: int, cells: int) -> Tensor:
    """Whether the centre of a cell is in the image: heights and widths (B, 2) -> boolean (B, M, M)."""
    centres = (torch.arange(cells, device=sizes.device) + 0.5) * (image_size / cells)  # in pixels
    rows, columns = centres < sizes[:, :1], centres < sizes[:, 1:]  # (B, M) each
    return rows[:, :, None] & columns[:, None]


def to_pixels(logits: Tensor, size: tuple[int, int], original_size: tuple[int, int], image_size: int) -> Tensor:
    """Resize logits of one image to its original pixels: (n, k, M, M) -> (n, k, *original_size).

    `size` is the height and width of the image as the model received it. As in the official code, the map is resized to
    the padded image, cropped to the image, and resized to its original size, each by bilinear interpolation.
    """
    if logits.shape[-1] != image_size:
        logits = F.interpolate(logits, size=(image_size, image_size), mode="bilinear")
    logits = logits[..., : size[0], : size[1]]
    return logits if size == original_size else F.interpolate(logits, size=original_size, mode="bilinear")
