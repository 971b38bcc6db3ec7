"""Recurrent layers: the GRU of Cho et al. 2014 (arXiv 1406.1078) and the LSTM of Hochreiter and Schmidhuber 1997.

The layers are loops over time steps in plain PyTorch, with the parameters of `torch.nn.GRU` and `torch.nn.LSTM`.
Rows may be right-padded. The forward direction never sees padding that follows a row, and the backward direction reads
each row reversed within its length. So nothing is packed, no length is copied to the host, and graphs can be exported.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from common.nn.dropout import Dropout
from common.nn.linear import Linear
from common.nn.padding import is_real

CellName = Literal["gru", "lstm"]
CellState = tuple[Tensor, ...]  # (h,) of a GRU, and (h, c) of an LSTM: (B, H) each; h is also the cell's output


class Cell(nn.Module):
    """The linear maps of a recurrent cell: from the input, and from the previous output, to all gates.

    `input.weight` and `input.bias` are `weight_ih` and `bias_ih` of torch's modules, `recurrent.weight` and
    `recurrent.bias` are `weight_hh` and `bias_hh`. The rows of the gates are in torch's order.

    Initialisation: Xavier for each gate's input weights, orthogonal for each gate's recurrent weights, zero biases.
    torch samples all of them from U(-1/sqrt(H), 1/sqrt(H)).
    """

    gates: ClassVar[int]  # number of gates, each with H rows
    parts: ClassVar[int]  # number of tensors of a state

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.width = width
        self.input = Linear(inputs, self.gates * width)
        self.recurrent = Linear(width, self.gates * width)
        for matrix in self.input.weight.chunk(self.gates):
            nn.init.xavier_uniform_(matrix)
        for matrix in self.recurrent.weight.chunk(self.gates):
            nn.init.orthogonal_(matrix)
        nn.init.zeros_(self.input.bias)
        nn.init.zeros_(self.recurrent.bias)

    def initial(self, x: Tensor) -> CellState:
        """The zero state for B rows, with the type of the inputs x (B, ...)."""
        return tuple(x.new_zeros(x.shape[0], self.width) for _ in range(self.parts))

    def step(self, gates: Tensor, state: CellState) -> CellState:
        """The input's part of the gates (B, gates H), from `self.input`, and a state -> the next state.

        The type of the state, not that of autocast, is the type in which gates are combined.
        """
        raise NotImplementedError


class GruCell(Cell):
    """A gated recurrent unit, with the gates r, z and n as in `torch.nn.GRU`.

    r = sigmoid(W_r x + U_r h), z = sigmoid(W_z x + U_z h), n = tanh(W_n x + r (U_n h)), h' = (1 - z) n + z h; each of
    the six linear maps has a bias.

    Differs: as in torch and cuDNN, the reset gate multiplies U_n h including its bias. The paper has U_n (r h).
    """

    gates, parts = 3, 1

    def step(self, gates: Tensor, state: CellState) -> CellState:
        """See `Cell.step`."""
        (h,) = state
        width = self.width
        recurrent = self.recurrent(h).to(h.dtype)  # (B, 3 H)
        reset, update = (gates[:, : 2 * width] + recurrent[:, : 2 * width]).sigmoid().chunk(2, -1)
        new = (gates[:, 2 * width :] + reset * recurrent[:, 2 * width :]).tanh()
        return (new + update * (h - new),)


class LstmCell(Cell):
    """A long short-term memory cell, with the gates i, f, g and o as in `torch.nn.LSTM`.

    c' = sigmoid(f) c + sigmoid(i) tanh(g), h' = sigmoid(o) tanh(c'). The forget gate (Gers et al. 2000) begins with a
    bias of 1 (Jozefowicz et al. 2015). Since its two biases are added, only that of the input is 1.
    """

    gates, parts = 4, 2

    def __init__(self, inputs: int, width: int):
        super().__init__(inputs, width)
        with torch.no_grad():
            self.input.bias[width : 2 * width].fill_(1.0)

    def step(self, gates: Tensor, state: CellState) -> CellState:
        """See `Cell.step`."""
        h, c = state
        i, f, g, o = (gates + self.recurrent(h).to(h.dtype)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


CELLS: dict[str, type[Cell]] = {"gru": GruCell, "lstm": LstmCell}


class Recurrent(nn.Module):
    """A stack of recurrent layers, in one direction or in both.

    `inputs` is the width of the inputs, `width` the width H of each direction's outputs. The outputs of a layer, of
    both directions side by side, are the inputs of the next. `dropout` applies between layers only (Zaremba et al.
    2014, arXiv 1409.2329).
    """

    def __init__(
        self, *, cell: CellName, inputs: int, width: int, layers: int, bidirectional: bool = False, dropout: float = 0.0
    ):
        super().__init__()
        directions = 2 if bidirectional else 1
        self.dropout = Dropout(dropout)
        self.cells = nn.ModuleList(
            nn.ModuleList(CELLS[cell](directions * width if layer else inputs, width) for _ in range(directions))
            for layer in range(layers)
        )

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, states: list[CellState] | None = None
    ) -> tuple[Tensor, list[CellState]]:
        """Read right-padded rows x (B, N, inputs) with these lengths (B,), each at least 1; None means N for all.

        Returns the outputs (B, N, H), or (B, N, 2H) with both directions, which are zero in the padding; and the states
        after the last real step (for the backward direction, the first) of each layer and direction, in torch's order:
        layer 0 forward, layer 0 backward, layer 1 forward, ... `states`, in the same order, are the states before the
        first step; None means zeros.
        """
        lengths = None if lengths is None else lengths.to(x.device)
        finals: list[CellState] = []
        for layer, directions in enumerate(self.cells):
            x = self.dropout(x) if layer else x
            outputs = []
            for backward, cell in enumerate(_cells(directions)):
                rows = reverse_rows(x, lengths) if backward else x
                initial = cell.initial(x) if states is None else states[len(finals)]
                sequence = _unroll(cell, cell.input(rows).to(initial[0].dtype), initial)
                finals.append(tuple(_last(part, lengths) for part in sequence))
                outputs.append(reverse_rows(sequence[0], lengths) if backward else sequence[0])
            x = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
        if lengths is not None:
            x = x.masked_fill(~is_real(lengths, x.shape[1])[..., None], 0)
        return x, finals

    def step(self, x: Tensor, states: list[CellState]) -> tuple[Tensor, list[CellState]]:
        """One time step of a stack in one direction: x (B, inputs) and a state per layer -> output (B, H), new states.

        The given states are not changed.
        """
        new: list[CellState] = []
        for layer, (directions, state) in enumerate(zip(self.cells, states, strict=True)):
            (cell,) = _cells(directions)
            x = self.dropout(x) if layer else x
            new.append(cell.step(cell.input(x).to(state[0].dtype), state))
            x = new[-1][0]
        return x, new


def reverse_rows(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Reverse the order of the positions of each row within its length: (B, N) or (B, N, C), (B,) -> the same shape.

    Padding stays where it is. Without lengths, all N positions are reversed. The function is its own inverse.
    """
    if lengths is None:
        return x.flip(1)
    positions = torch.arange(x.shape[1], device=x.device)
    index = torch.where(positions < lengths[:, None], lengths[:, None] - 1 - positions, positions)  # (B, N)
    return x.gather(1, index if x.ndim == 2 else index[..., None].expand(-1, -1, x.shape[2]))


def _cells(directions: nn.Module) -> list[Cell]:
    return [cell for cell in directions.children() if isinstance(cell, Cell)]


def _last(x: Tensor, lengths: Tensor | None) -> Tensor:
    """The last real position of each row: (B, N, H) -> (B, H)."""
    if lengths is None:
        return x[:, -1]
    return x.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]


def _unroll(cell: Cell, gates: Tensor, state: CellState) -> CellState:
    """The states after each step: gates (B, N, gates H) of the inputs -> the parts of the states, (B, N, H) each."""
    if torch.compiler.is_exporting():
        return _scan(cell, gates, state)
    states = []
    for step in gates.unbind(1):
        state = cell.step(step, state)
        states.append(state)
    return tuple(torch.stack(parts, 1) for parts in zip(*states, strict=True))


def _scan(cell: Cell, gates: Tensor, state: CellState) -> CellState:
    """The same as `_unroll`, as one operator that loops over any number of steps in an exported graph."""
    from torch._higher_order_ops.scan import scan

    def combine(carry: CellState, step: Tensor) -> tuple[CellState, CellState]:
        new = cell.step(step, carry)
        return new, tuple(part.clone() for part in new)  # outputs of a scan must not share memory

    parts: Any = scan(combine, state, gates, dim=1)[1]
    return tuple(parts)
