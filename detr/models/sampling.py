"""Bilinear sampling of a multi-scale memory, the core of deformable attention (Zhu et al. 2021, arXiv 2010.04159).

`sample` has two implementations with equal results. On the CPU, each output is a weighted sum of rows of a table, where
the rows are the four neighbours of each sampling point (`embedding_bag`). This takes a quarter of the time of
`grid_sample`, which other devices and exported graphs use.

In shapes, L is the number of levels and P the number of points of a query in a level, for each of h heads of width D.
"""

import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Shapes = Sequence[tuple[int, int]]  # (height, width) of each level
Corner = tuple[Tensor, Tensor]  # table rows and weights of one of the four neighbours of each point
BORDER = 2  # cells of zeros around a map


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
    """See `sample`; by weighted sums of table rows. The result can be differentiated once.

    The table has a row for each head and position. A border of zeros around each map, two cells wide, makes it
    unnecessary to test whether the neighbours of a point lie on the map.
    """
    batch, queries, heads = locations.shape[:3]
    maps = [value.unflatten(1, shape) for value, shape in zip(_split(values, shapes), shapes, strict=True)]
    table = torch.cat([F.pad(x, (0, 0, BORDER, BORDER, BORDER, BORDER)).flatten(1, 2) for x in maps], 1)
    rows = table.view(batch * table.shape[1] * heads, -1)  # (R, D), R = B M' h for M' positions
    output: Tensor = _TableSampling.apply(rows, locations, weights, shapes)
    return output.view(batch, queries, -1)


class _TableSampling(torch.autograd.Function):
    """Weighted sums of the rows (R, D) of a table of bordered maps -> (B N h, D); see `sample_table`."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
        ctx.shapes, ctx.shape, weights = shapes, locations.shape, weights.flatten(0, 2).flatten(1)
        row, offsets = _neighbours(shapes, locations)
        below_row = row + _row_lengths(ctx.shape, shapes)
        ctx.save_for_backward(table, weights, row, below_row, offsets)
        output = torch.zeros(())
        for number, (rows, share) in enumerate(_corners(row, below_row, weights, offsets, ctx.shape[2])):
            summed = F.embedding_bag(rows, table, per_sample_weights=share, mode="sum")
            output = output.add_(summed) if number else summed
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the table, the locations and the weights.

        The border is wide enough for a location that was clamped to have neighbours of zero on both sides, and with
        them a gradient of zero.
        """
        table, weights, row, below_row, offsets = ctx.saved_tensors
        gradient, (right, down) = gradient.contiguous(), offsets.unbind(-1)
        corners = [*_corners(row, below_row, weights, offsets, ctx.shape[2])]
        products = [_products(rows, gradient, table) for rows, _ in corners]  # of the gradient and each neighbour
        above, below = products[0].lerp(products[1], right), products[2].lerp(products[3], right)
        of_right = (products[1] - products[0]).lerp_(products[3] - products[2], down)
        of_locations = torch.stack([of_right, below - above], -1).mul_(weights[..., None]).view(ctx.shape)
        of_locations *= _per_point(ctx.shapes, of_locations)
        of_weights = above.lerp_(below, down).view(ctx.shape[:-1])
        return _table_gradient(corners, gradient, len(table)), of_locations, of_weights, None


def _neighbours(shapes: Shapes, locations: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row of each point's upper left neighbour (B N h, L P), and the offsets from it (B N h, L P, 2).

    Offsets to the right and down are in cells. A NaN stays in the offsets; its row is one of the table.
    """
    batch, _, heads, _, points, _ = locations.shape
    sides = _per_point(shapes, locations)  # (L, P, 2)
    # In cells of the map with its border: the centre of the first cell of the image is at BORDER.
    places = (locations * sides).add_(BORDER - 0.5).clamp_(torch.zeros_like(sides), sides + BORDER)
    cells = places.nan_to_num().int()
    row_lengths = _row_lengths(locations.shape, shapes).view(-1, points)
    *starts, positions = itertools.accumulate(
        ((height + 2 * BORDER) * (width + 2 * BORDER) for height, width in shapes), initial=0
    )
    first = torch.arange(batch)[:, None, None] * positions + torch.tensor(starts)  # (B, 1, L)
    first = (first * heads + torch.arange(heads)[:, None]).int()  # (B, h, L)
    row = (cells[..., 1] * row_lengths).add_(cells[..., 0], alpha=heads)  # (B, N, h, L, P)
    row += first[:, None, :, :, None].expand(-1, -1, -1, -1, points).contiguous()
    return row.flatten(0, 2).flatten(1), places.sub_(cells).flatten(0, 2).flatten(1, 2)


def _per_point(shapes: Shapes, like: Tensor) -> Tensor:
    """Repeat the width and height of each level for its points, (L, P, 2): a product without broadcasting is faster."""
    return widths_and_heights(shapes, like)[:, None].repeat(1, like.shape[-2], 1)


def _row_lengths(shape: torch.Size, shapes: Shapes) -> Tensor:
    """Return the number of table rows from each point to the one below (L P,), for locations of the given shape."""
    lengths = torch.tensor([shape[2] * (width + 2 * BORDER) for _, width in shapes], dtype=torch.int32)
    return lengths.repeat_interleave(shape[-2])


def _corners(row: Tensor, below_row: Tensor, weights: Tensor, offsets: Tensor, heads: int) -> Iterator[Corner]:
    """Yield the rows (B N h, L P) of the upper left, upper right, lower left and lower right neighbours, and weights.

    The weights are those of the points times the bilinear shares of the neighbour.
    """
    right, down = offsets.unbind(-1)
    lower = weights * down
    for rows, share in ((row, weights - lower), (below_row, lower)):
        on_right = share * right
        yield rows, share - on_right
        yield rows + heads, on_right


@torch.library.custom_op("triptych::row_products", mutates_args=())
def _products(rows: Tensor, gradient: Tensor, table: Tensor) -> Tensor:
    """Return the inner products of each row of `gradient` (n, D) with m rows of the table, rows (n, m) -> (n, m).

    It is an operator of its own because compilers and fake tensors do not support sparse tensors.
    """
    ends = torch.arange(0, rows.numel() + 1, rows.shape[1], dtype=rows.dtype)
    zeros = gradient.new_zeros(1).expand(rows.numel())  # they are added: beta=0 does not remove NaNs
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # "CSR tensor support is in beta state"
        pattern = torch.sparse_csr_tensor(ends, rows.view(-1), zeros, (len(rows), len(table)), check_invariants=False)
    products: Tensor = torch.sparse.sampled_addmm(pattern, gradient, table.t(), beta=0.0).values()
    return products.view(rows.shape)


@_products.register_fake
def _(rows: Tensor, gradient: Tensor, table: Tensor) -> Tensor:
    return gradient.new_empty(rows.shape)


def _table_gradient(corners: Sequence[Corner], gradient: Tensor, count: int) -> Tensor:
    """Return the gradient (count, D) of the table: each row is a weighted sum of rows of `gradient` (n, D).

    The points are sorted by the row of their upper left neighbour. Since the distance from there to another neighbour
    is the same for all rows of a level, the order is also that of the other neighbours.
    """
    order = corners[0][0].view(-1).argsort()
    bags = (order // corners[0][0].shape[1]).int()
    total = gradient.new_zeros(())
    for number, (rows, share) in enumerate(corners):
        counts = rows.new_zeros(count + 1).index_add_(0, rows.view(-1) + 1, torch.ones_like(order, dtype=rows.dtype))
        starts, share = counts.cumsum(0, dtype=rows.dtype), share.view(-1).index_select(0, order)
        summed = F.embedding_bag(bags, gradient, starts, None, 2.0, False, "sum", False, share, True)
        total = total.add_(summed) if number else summed
    return total


def widths_and_heights(shapes: Shapes, like: Tensor) -> Tensor:
    """Return the width and height of each level as a tensor (L, 2), with the dtype and device of `like`."""
    if torch.compiler.is_exporting():  # a tensor made from numbers would be a constant in the graph
        return torch.stack([torch.stack([like.new_ones(w).sum(), like.new_ones(h).sum()]) for h, w in shapes])
    return like.new_tensor([[width, height] for height, width in shapes])


def _split(values: Tensor, shapes: Shapes) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = values.split([height * width for height, width in shapes], dim=1)
    return parts
