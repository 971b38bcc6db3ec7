"""Recurrent layers against torch's modules on packed sequences, and what padding and order may not change."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from common.machine.seeds import generator
from common.nn.recurrent import CELLS, CellName, CellState, Recurrent, reverse_rows

EXACT = {"rtol": 0, "atol": 1e-10}  # float64, two layers of a dozen steps
INPUTS, WIDTH = 5, 7
LENGTHS = [4, 9, 1, 9, 6]
cells = pytest.mark.parametrize("cell", ["gru", "lstm"])
directions = pytest.mark.parametrize("bidirectional", [False, True], ids=["one direction", "both directions"])


def randomised(module: nn.Module) -> Any:
    """The module in float64 with random parameters, also biases."""
    rng = generator("recurrent")
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.4, generator=rng)
    return module


def pair(cell: CellName, bidirectional: bool, layers: int = 2) -> tuple[Recurrent, Any]:
    """Our layers and torch's with the same random parameters."""
    ours = randomised(
        Recurrent(cell=cell, inputs=INPUTS, width=WIDTH, layers=layers, bidirectional=bidirectional, dropout=0.0)
    )
    kind = {"gru": nn.GRU, "lstm": nn.LSTM}[cell]
    theirs = kind(INPUTS, WIDTH, layers, batch_first=True, bidirectional=bidirectional).double()
    theirs.load_state_dict({torchs_name(name): value for name, value in ours.state_dict().items()})
    return ours, theirs


def torchs_name(name: str) -> str:
    """torch's name of a parameter such as `cells.1.0.recurrent.weight`."""
    _, layer, direction, part, kind = name.split(".")
    return f"{kind}_{ {'input': 'ih', 'recurrent': 'hh'}[part] }_l{layer}{'_reverse' * int(direction)}"


def rows() -> tuple[Tensor, Tensor]:
    """Right-padded rows (5, 9, INPUTS), whose padding is not zero, and their lengths."""
    return torch.randn(5, 9, INPUTS, dtype=torch.float64, generator=generator("rows")), torch.tensor(LENGTHS)


def initial_states(count: int, parts: int) -> list[CellState]:
    values = torch.randn(count, parts, 5, WIDTH, dtype=torch.float64, generator=generator("states"))
    return [tuple(state) for state in values]


def torchs_states(states: list[CellState]) -> Any:
    """States in torch's form: (layers, B, H), or a pair of these for an LSTM."""
    stacked = [torch.stack([*parts]) for parts in zip(*states, strict=True)]
    return tuple(stacked) if len(stacked) > 1 else stacked[0]


@cells
@directions
@pytest.mark.parametrize("given_states", [False, True], ids=["zero states", "given states"])
def test_outputs_states_and_gradients_are_torchs_on_packed_rows(
    cell: CellName, bidirectional: bool, given_states: bool
) -> None:
    ours, theirs = pair(cell, bidirectional)
    x, lengths = rows()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    states = initial_states(4 if bidirectional else 2, CELLS[cell].parts) if given_states else None
    outputs, finals = ours(inputs[0], lengths, states)
    packed = pack_padded_sequence(inputs[1], lengths, batch_first=True, enforce_sorted=False)
    their_outputs, their_finals = theirs(packed, None if states is None else torchs_states(states))
    expected, _ = pad_packed_sequence(their_outputs, batch_first=True)
    assert expected.std() > 0.1 and not expected[0, 4:].any()
    torch.testing.assert_close(outputs, expected, **EXACT)
    torch.testing.assert_close(torchs_states(finals), their_finals, **EXACT)

    factors = torch.randn(expected.shape, dtype=torch.float64, generator=generator("factors"))
    for result, ends in ((outputs, torchs_states(finals)), (expected, their_finals)):
        ends = ends if isinstance(ends, tuple) else (ends,)
        ((result * factors).sum() + sum(end.square().sum() for end in ends)).backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **EXACT)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients.pop(torchs_name(name)), **EXACT, msg=name)
    assert not gradients


@cells
@directions
def test_rows_without_lengths_are_whole(cell: CellName, bidirectional: bool) -> None:
    ours, theirs = pair(cell, bidirectional)
    x, _ = rows()
    outputs, finals = ours(x)
    expected, their_finals = theirs(x)
    torch.testing.assert_close(outputs, expected, **EXACT)
    torch.testing.assert_close(torchs_states(finals), their_finals, **EXACT)
    torch.testing.assert_close(ours(x, torch.full((5,), 9))[0], expected, **EXACT)


@cells
def test_steps_give_the_outputs_of_whole_rows_and_leave_given_states_unchanged(cell: CellName) -> None:
    ours, _ = pair(cell, bidirectional=False)
    x, _ = rows()
    first = initial_states(2, CELLS[cell].parts)
    expected, finals = ours(x, states=first)
    copies, states = [tuple(part.clone() for part in state) for state in first], first
    for t in range(x.shape[1]):
        output, states = ours.step(x[:, t], states)
        torch.testing.assert_close(output, expected[:, t], **EXACT)
    torch.testing.assert_close(states, finals, **EXACT)
    torch.testing.assert_close(first, copies, rtol=0, atol=0)


@cells
def test_the_content_of_padding_and_its_length_change_nothing(cell: CellName) -> None:
    ours, _ = pair(cell, bidirectional=True)
    x, lengths = rows()
    outputs, finals = ours(x, lengths)
    longer = torch.cat([x, torch.full((5, 3, INPUTS), 7.0, dtype=torch.float64)], 1)
    changed = torch.where(torch.arange(12)[None, :, None] < lengths[:, None, None], longer, -longer)
    torch.testing.assert_close(ours(changed[:, :9].contiguous(), lengths), (outputs, finals), rtol=0, atol=0)
    # Products of other sizes may sum in another order (on Zen 4 they do), so a longer batch is not bit-equal.
    more_outputs, more_finals = ours(changed, lengths)
    torch.testing.assert_close(more_outputs[:, :9], outputs, **EXACT)
    assert not more_outputs[:, 9:].any()
    torch.testing.assert_close(more_finals, finals, **EXACT)
    alone, _ = ours(x[2:3, :1], lengths[2:3])
    torch.testing.assert_close(alone, outputs[2:3, :1], **EXACT)
    whole, _ = ours(x)
    assert (whole[0, :4, WIDTH:] - outputs[0, :4, WIDTH:]).abs().max() > 0.01, "without lengths, it would"


def test_a_row_is_reversed_within_its_length_and_reversed_again_is_itself() -> None:
    tokens = torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 7, 8]])
    lengths = torch.tensor([3, 1, 4])
    assert reverse_rows(tokens, lengths).tolist() == [[3, 2, 1, 0], [4, 0, 0, 0], [8, 7, 6, 5]]
    x, counts = rows()
    assert torch.equal(reverse_rows(reverse_rows(x, counts), counts), x)
    assert torch.equal(reverse_rows(x, counts)[0, :4], x[0, :4].flip(0))
    assert torch.equal(reverse_rows(x, None), x.flip(1))


def test_the_initial_forget_bias_is_one_and_all_other_biases_are_zero() -> None:
    """The gate's bias is the sum of two vectors, so that one in each would be two."""
    torch.manual_seed(0)
    for (cell,) in Recurrent(cell="lstm", inputs=INPUTS, width=WIDTH, layers=2).cells:
        total = (cell.input.bias + cell.recurrent.bias).view(4, WIDTH)
        assert total.tolist() == [[0.0] * WIDTH, [1.0] * WIDTH, [0.0] * WIDTH, [0.0] * WIDTH]
    for (cell,) in Recurrent(cell="gru", inputs=INPUTS, width=WIDTH, layers=2).cells:
        assert not cell.input.bias.any() and not cell.recurrent.bias.any()


@cells
def test_each_gates_recurrent_matrix_is_orthogonal_at_first(cell: CellName) -> None:
    torch.manual_seed(0)
    ((module,),) = Recurrent(cell=cell, inputs=INPUTS, width=WIDTH, layers=1).cells
    matrices = module.recurrent.weight.detach().view(-1, WIDTH, WIDTH)
    torch.testing.assert_close(matrices @ matrices.mT, torch.eye(WIDTH).expand_as(matrices), rtol=0, atol=1e-5)
    assert len(matrices) > 1 and (matrices[0] - matrices[1]).abs().max() > 0.1
    bound = (6 / (INPUTS + WIDTH)) ** 0.5
    assert 0.9 * bound < float(module.input.weight.detach().abs().max()) <= bound


@cells
def test_dropout_is_applied_between_layers_only(cell: CellName) -> None:
    x, lengths = rows()
    for layers, changes in ((1, False), (2, True)):
        module = Recurrent(cell=cell, inputs=INPUTS, width=WIDTH, layers=layers, dropout=0.5).double()
        torch.manual_seed(1)
        outputs, _ = module(x, lengths)
        assert torch.equal(outputs, module.eval()(x, lengths)[0]) != changes


@cells
def test_under_autocast_states_stay_in_fp32(cell: CellName) -> None:
    """Rounding of the products only: 8 bits in each of nine steps, whose errors decay."""
    module = Recurrent(cell=cell, inputs=INPUTS, width=WIDTH, layers=2, bidirectional=True)
    x, lengths = rows()
    expected, _ = module(x.float(), lengths)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, finals = module(x.float(), lengths)
    assert outputs.dtype == torch.float32 and all(part.dtype == torch.float32 for state in finals for part in state)
    assert 0 < (outputs - expected).norm() < 0.05 * expected.norm()


@cells
def test_a_graph_for_any_number_of_steps_has_the_same_outputs(cell: CellName) -> None:
    module = (
        randomised(Recurrent(cell=cell, inputs=INPUTS, width=WIDTH, layers=2, bidirectional=True))
        .float()
        .eval()
        .requires_grad_(False)
    )
    dims = {0: torch.export.Dim("rows", min=1), 1: torch.export.Dim("steps", min=1)}
    x, lengths = torch.randn(3, 4, INPUTS), torch.tensor([4, 2, 3])
    with torch.no_grad():
        graph = torch.export.export(
            module,
            (x, lengths),
            dynamic_shapes=(dims, {0: dims[0]}),
            prefer_deferred_runtime_asserts_over_guards=True,
        ).module()
        for count, steps in ((2, 9), (1, 1), (4, 2)):
            x, lengths = torch.randn(count, steps, INPUTS), torch.arange(count) % steps + 1
            outputs, finals = graph(x, lengths)
            expected, expected_finals = module(x, lengths)
            torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(finals, expected_finals, rtol=0, atol=1e-5)
