"""The levels of a feature pyramid: their grids and points, with the papers' lengths scaled down for small images.

In shapes, T is the number of objects of an image, A of anchors, P of points, and L of levels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

PAPER_SIDE = 800  # pixels; the shorter side of images in the papers on anchors and points
MAX_DIVISOR = 4  # with it, the smallest stride of the papers, 4 pixels, becomes 1


def divisor(size: tuple[int, int]) -> int:
    """Return the number 1, 2 or 4 by which strides and anchor sizes of the papers are divided.

    It is the largest one with which an image of `size` (height and width), enlarged by it, has a shorter side of at
    most `PAPER_SIDE` pixels.
    """
    ratio = max(1.0, PAPER_SIDE / min(size))
    return min(MAX_DIVISOR, int(2 ** math.floor(math.log2(ratio))))


def grid_sizes(size: tuple[int, int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """Return the height and width of the grid of each level, which covers an image of `size` (height and width)."""
    return [(-(-size[0] // stride), -(-size[1] // stride)) for stride in strides]


def make_points(size: tuple[int, int], strides: Sequence[int]) -> list[Tensor]:
    """Return the points (P, 2) of each level as x and y in pixels: the centres of its grid cells, row by row."""
    points = []
    for (height, width), stride in zip(grid_sizes(size, strides), strides, strict=True):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        points.append((torch.stack([x.flatten(), y.flatten()], dim=1) + 0.5) * stride)
    return points


def level_of(counts: Sequence[int]) -> Tensor:
    """Return the level of each of the anchors or points of all levels, whose numbers are `counts`."""
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64))
