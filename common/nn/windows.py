"""Attention within windows of a map, shifted or not, with a relative position bias (Liu et al. 2021, arXiv 2103.14030).

A map's tokens are stored window by window. Attention and all other layers of a block then need no copies, and tokens
move only between blocks whose windows differ. One gather moves them, whatever it combines: dividing a map, shifting
windows, or merging patches.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.machine import processor
from common.nn import kernels
from common.nn.attention import Attention, Cache

MASKED = float("-inf")  # added to a score; no row is masked as a whole, since every token may attend to itself
_IS_ZEN_4 = processor.is_zen_4()
Size = tuple[int, int]  # height and width


class WindowLayout(NamedTuple):
    """A division of a map (H, W) into n windows of S tokens, each of `window` rows and columns.

    A slot holds a token, or it is padding if the windows do not fit the map. Slots are numbered from 0 to n S - 1,
    window by window, and row by row in a window. A position is the number of a token on the map, row by row.
    """

    size: Size  # (H, W)
    window: Size
    shift: Size
    positions: Tensor  # (n S,) int64, the position of the token in each slot; -1 in padding
    rows: Tensor  # (n S,) int64, the row of the token in each slot; any number in padding
    columns: Tensor  # (n S,) int64, its column
    slots: Tensor  # (H W,) int64, the slot of the token at each position
    may_look: Tensor | None  # (n, S, S) boolean, True where a query may attend to a key; None = everywhere

    @property
    def padded(self) -> bool:
        """Whether there may be padding; True if the size of the map is unknown, as in an exported graph."""
        return not is_known(self.size) or any(
            side % length for side, length in zip(self.size, self.window, strict=True)
        )


class Move(NamedTuple):
    """Where tokens come from and go to: from N slots to M slots. Each token is used at most once."""

    sources: Tensor  # (M,) int64, the old slot of the token in each new slot; -1 = zeros
    targets: Tensor  # (N,) int64, the new slot of the token in each old slot; -1 = dropped
    has_gaps: bool  # whether there may be a -1


def is_known(size: Size) -> bool:
    """Whether a size consists of numbers, and not of the symbols of an exported graph with a dynamic size."""
    return all(isinstance(side, int) for side in size)


def shifts(size: Size, window: Size) -> Size:
    """The shift of shifted windows: half a window, or 0 along an axis on which one window covers the map.

    Differs: the official code shifts along neither axis if the window covers the map along one of them.
    """
    # The comparison `side > length` as arithmetic, because an exported graph must not branch on its size.
    covered: list[Any] = [
        torch.sym_min(torch.sym_max(side - length, 0), 1) for side, length in zip(size, window, strict=True)
    ]
    return window[0] // 2 * covered[0], window[1] // 2 * covered[1]


def divide(size: Size, window: Size, shift: Size, device: torch.device) -> WindowLayout:
    """Divide a map of `size` (H, W) into windows.

    Without a shift, windows start at row and column 0. A shift of s rows moves them down by s rows; a window may then
    hold the first s rows beside the last ones, but their tokens do not attend to each other. The same holds for
    columns. Nothing attends to padding except padding.
    """
    rows, columns = (_divide_axis(*axis, device) for axis in zip(size, window, shift, strict=True))
    height, width = size
    across = columns.places.shape[0]  # number of windows; len(...) would be a constant in an exported graph
    row, column = rows.places[:, None, :, None], columns.places[:, None]  # (n_h, 1, h, 1), (n_w, 1, w)
    real = (row < height) & (column < width)  # (n_h, n_w, h, w)
    positions = torch.where(real, row * width + column, -1)
    slots = (rows.windows[:, None] * across + columns.windows) * (window[0] * window[1])
    slots = slots + rows.offsets[:, None] * window[1] + columns.offsets  # (H, W)
    may_look = None
    if not is_known(size) or any(shift) or any(side % length for side, length in zip(size, window, strict=True)):
        regions = rows.regions[:, None, :, None] * (across + 1) + columns.regions[:, None]
        regions = torch.where(real, regions, -1).flatten(2).flatten(0, 1)  # (n_h, n_w, h, w) -> (n, S)
        may_look = regions[:, :, None] == regions[:, None]
    row, column = (place.expand(real.shape).flatten() for place in (row, column))
    return WindowLayout(size, window, shift, positions.flatten(), row, column, slots.flatten(), may_look)


class _Axis(NamedTuple):
    """The division of one axis of a map into n windows of length w."""

    places: Tensor  # (n, w) int64, the row (or column) in each slot; at least the map's length in padding
    regions: Tensor  # (n, w) int64 from 0 to n, equal for rows that are in one shifted window without wrapping around
    windows: Tensor  # (length,) int64, the number of the window that holds each row
    offsets: Tensor  # (length,) int64, the place of each row in its window


def _divide_axis(side: int, length: int, shift: int, device: torch.device) -> _Axis:
    count = (side + length - 1) // length
    if not isinstance(side, int):  # in an exported graph a dimension of length 1 is a constant: add a window of padding
        count = torch.sym_max(count, 2)
    padded = count * length
    places = _wrapped(torch.arange(padded, device=device) + shift, padded)
    regions = (places - shift) // length + 1  # 0 for the first `shift` rows, which wrap around
    rolled = _wrapped(torch.arange(side, device=device) - shift, padded)
    return _Axis(places.view(count, length), regions.view(count, length), rolled // length, rolled % length)


def _wrapped(numbers: Tensor, length: int) -> Tensor:
    """`numbers` modulo `length`, for numbers from -`length` to 2 `length`; ONNX has no remainder by a symbol."""
    numbers = torch.where(numbers < 0, numbers + length, numbers)
    return torch.where(numbers >= length, numbers - length, numbers)


def from_map(new: WindowLayout) -> Move:
    """Move tokens from their order on the map, row by row, to windows."""
    return Move(new.positions, new.slots, new.padded)


def between(old: WindowLayout, new: WindowLayout) -> Move:
    """Move tokens from one division of a map to another."""
    sources, targets = _look_up(old.slots, new.positions), _look_up(new.slots, old.positions)
    return Move(sources, targets, old.padded or new.padded)


def merging(old: WindowLayout, new: WindowLayout) -> Move:
    """Move four neighbours (2r, 2c), (2r + 1, 2c), (2r, 2c + 1), (2r + 1, 2c + 1) to the four slots of (r, c).

    `new` divides the map of half the size, rounded up, and each of its slots stands for four consecutive slots here.
    Neighbours outside the old map are zeros.
    """
    (height, width), half = old.size, new.size[1]
    number = torch.arange(4, device=old.slots.device)  # of a neighbour: rows change first
    row = 2 * new.rows[:, None] + number % 2  # (M, 4)
    column = 2 * new.columns[:, None] + number // 2
    inside = (new.positions >= 0)[:, None] & (row < height) & (column < width)
    positions = torch.where(inside, row * width + column, -1).flatten()  # (4 M,)
    quarter = torch.where(
        old.positions < 0, -1, old.rows // 2 * half + old.columns // 2
    )  # (N,), position on the new map
    targets = 4 * _look_up(new.slots, quarter) + old.rows % 2 + 2 * (old.columns % 2)
    has_gaps = old.padded or new.padded or bool(height % 2 or width % 2)
    return Move(_look_up(old.slots, positions), torch.where(old.positions < 0, -1, targets), has_gaps)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index], and -1 where the index is -1."""
    return torch.where(index < 0, -1, table[index.clamp(min=0)])


def move(x: Tensor, way: Move) -> Tensor:
    """Move tokens to their new slots: (B, N, C) -> (B, M, C); new slots without a token are zero."""
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return _gather(x, way.sources, way.has_gaps)
    moved: Tensor = _Gather.apply(x, *way)
    return moved


def _gather(x: Tensor, index: Tensor, has_gaps: bool) -> Tensor:
    if not has_gaps:
        return x.index_select(1, index)  # on the CPU four times as fast as x[:, index]
    return x.index_select(1, index.clamp(min=0)) * (index >= 0)[:, None]


class _Gather(torch.autograd.Function):
    """A gather whose backward pass is a gather, too. PyTorch's would add up gradients, which is slower."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sources: Tensor, targets: Tensor, has_gaps: bool) -> Tensor:
        ctx.targets, ctx.has_gaps = targets, has_gaps
        return _gather(x, sources, has_gaps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _gather(gradient, ctx.targets, ctx.has_gaps), None, None, None


class ShiftedWindowAttention(Attention):
    """Self-attention within the windows of a `WindowLayout`, with a learned bias for each relative position.

    The score of a query and a key that lies i rows above and j columns to the left of it is increased by
    `table[h - 1 + i, w - 1 + j]`, where `window` = (h, w); each head has its own bias (section 3.2, equation 4).
    """

    def __init__(self, *, width: int, heads: int, window: Size, dropout: float = 0.0):
        super().__init__(width=width, heads=heads, dropout=dropout)
        self.window = window
        self.table = kernels.Parameter(torch.empty(2 * window[0] - 1, 2 * window[1] - 1, heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(
        self,
        *,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        may_look: Tensor | None = None,
        bias: Tensor | None = None,
        causal: bool = False,
        cache: Cache | None = None,
        guide: WindowLayout | None = None,
    ) -> Tensor:
        """q (B, n S, C), window by window as `guide` describes -> (B, n S, C); keys and values are those of q."""
        assert k is q and v is q and may_look is None and bias is None and not causal and cache is None
        assert guide is not None and guide.window == self.window, "the table of biases is that of another window"
        windows = q.reshape(-1, self.window[0] * self.window[1], q.shape[-1])  # (B, n S, C) -> (B n, S, C)
        scores = self.scores(guide)
        if guide.may_look is not None:  # the windows of an image differ
            scores = scores.expand(q.shape[0], -1, -1, -1, -1).flatten(0, 1)  # (n, h, S, S) -> (B n, h, S, S)
        return super().forward(q=windows, k=windows, v=windows, bias=scores).view_as(q)

    def is_materialised(self, q: Tensor, k: Tensor) -> bool:
        """See `Attention.is_materialised`; but it is False unless the bias needs a gradient or the CPU is a Zen 4.

        In inference, the fused kernel takes 0.6 of the time of two matrix products on Zen 5, and up to 1.6 of it on
        Zen 4 (windows of 49 tokens).
        """
        needs_gradient = (q.requires_grad or self.table.requires_grad) and torch.is_grad_enabled()
        return (needs_gradient or _IS_ZEN_4) and super().is_materialised(q, k)

    def scores(self, layout: WindowLayout) -> Tensor:
        """What is added to the scores of all queries (S) and keys (S), -inf where a query may not look.

        (1, h, S, S) if windows do not differ, otherwise (n, h, S, S).
        """
        bias = self.relative_position_bias()[None]  # (1, h, S, S)
        return bias if layout.may_look is None else bias.masked_fill(~layout.may_look[:, None], MASKED)

    def relative_position_bias(self) -> Tensor:
        """The bias of each head, query and key: (h, S, S)."""
        rows, columns = (torch.arange(length, device=self.table.device) for length in self.window)
        i = rows[:, None] - rows + self.window[0] - 1  # (h, h), of query and key
        j = columns[:, None] - columns + self.window[1] - 1  # (w, w)
        bias = self.table[i[:, None, :, None], j[:, None]]  # (h, w, h, w, heads)
        return bias.permute(4, 0, 1, 2, 3).flatten(3).flatten(1, 2)
