"""Bilinear sampling of a multi-scale memory, the core of deformable attention (Zhu et al. 2021, arXiv 2010.04159).

`sample` has two implementations with equal results. On the CPU, each output is a weighted sum of rows of a table, where
the rows are the four neighbours of each sampling point (`embedding_bag`). This takes a quarter of the time of
`grid_sample`, which other devices and exported graphs use.

In shapes, L is the number of levels and P the number of points of a query in a level, for each of h heads of width D.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = Sequence[tuple[int, int]]  # (height, width) of each level


def sample(values: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Sum the values at sampling locations, weighted: (B, M, h D) -> (B, N, h D), in at least fp32.

    `values` holds the levels' positions concatenated, row by row. `locations` (B, N, h, L, P, 2) are x and y relative
    to the map of a level: 0 is its left or upper edge, 1 its right or lower edge, and the first cell has its centre at
    0.5 / width. Values between the centres of cells are interpolated bilinearly, and they are zero outside the map.
    `weights` are (B, N, h, L, P).
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    values, locations, weights = values.to(dtype), locations.to(dtype), weights.to(dtype)
    uses_table = values.device.type == "cpu" and not torch.compiler.is_exporting()
    return (sample_table if uses_table else sample_grid)(values, shapes, locations, weights)


def sample_grid(values: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """See `sample`; by `grid_sample` for each level."""
    batch, queries, heads, levels, points, _ = locations.shape
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B h, N, L, P, 2), -1 to 1
    sampled = []
    for level, (value, (height, width)) in enumerate(zip(_split(values, shapes), shapes, strict=True)):
        image = value.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1)  # (B, H W, h D) -> (B, h, D, H W)
        image = image.flatten(0, 1).unflatten(-1, (height, width))  # (B h, D, H, W)
        sampled.append(F.grid_sample(image, grids[:, :, level], align_corners=False))  # (B h, D, N, P)
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, levels * points)
    summed = (torch.cat(sampled, -1) * weights).sum(-1)  # (B h, D, N)
    output: Tensor = summed.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2)  # (B, N, h D)
    return output


def sample_table(values: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """See `sample`; by a weighted sum of table rows (`embedding_bag`).

    The table has a row for each head and position. A border of zeros around each map, one cell on the left and two on
    the right, makes it unnecessary to test whether the neighbours of a point lie on the map.
    """
    batch, queries, heads, levels, points, _ = locations.shape
    maps = [value.unflatten(1, shape) for value, shape in zip(_split(values, shapes), shapes, strict=True)]
    table = torch.cat([F.pad(x, (0, 0, 1, 2, 1, 2)).flatten(1, 2) for x in maps], 1)  # (B, M', h D)
    positions = table.shape[1]  # M'
    width_height = locations.new_tensor([[width, height] for height, width in shapes])[:, None]  # (L, 1, 2)
    # In cells of the map with its border: the centre of the first cell of the image is at 1.
    place = torch.minimum((locations * width_height + 0.5).clamp(min=0), width_height + 1)
    corner = place.detach().nan_to_num().int()  # (B, N, h, L, P, 2), the upper left of four neighbours
    right, down = (place - corner).unbind(-1)  # shares of the neighbours on the right and below
    strides = torch.tensor([heads * (width + 3) for _, width in shapes], dtype=torch.int32)[:, None]  # (L, 1)
    sizes = torch.tensor([(height + 3) * (width + 3) for height, width in shapes])
    starts = heads * (sizes.cumsum(0) - sizes + positions * torch.arange(batch)[:, None])  # (B, L)
    first = (starts[:, None, :] + torch.arange(heads)[:, None]).int()[:, None, :, :, None]  # (B, 1, h, L, 1)
    row = first + corner[..., 1] * strides + corner[..., 0] * heads
    rows = torch.stack([row, row + heads, row + strides, row + strides + heads], -1)  # (B, N, h, L, P, 4)
    below = weights * down
    above = weights - below
    above_right, below_right = above * right, below * right
    shares = torch.stack([above - above_right, above_right, below - below_right, below_right], -1)
    bags = (batch * queries * heads, levels * points * 4)
    summed = F.embedding_bag(
        rows.view(bags), table.view(batch * positions * heads, -1), per_sample_weights=shares.view(bags), mode="sum"
    )
    return summed.view(batch, queries, -1)


def _split(values: Tensor, shapes: Shapes) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = values.split([height * width for height, width in shapes], dim=1)
    return parts
