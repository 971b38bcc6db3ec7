"""Layouts of windows against a search through all pairs of tokens, and the attention against torchvision's block."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMerging, SwinTransformerBlock

from common.machine.seeds import generator
from common.nn import attention, windows
from common.nn.blocks import Block, BlockOptions
from common.nn.windows import ShiftedWindowAttention, WindowLayout

CPU = torch.device("cpu")
WIDTH, HEADS, WINDOW = 24, 3, 4
EXACT = {"rtol": 0, "atol": 1e-11}  # float64, one block with values of size ten
THEIR_NAMES = {
    "attention.table": "attn.relative_position_bias_table",
    "attention.in_proj": "attn.qkv",
    "attention.out_proj": "attn.proj",
    "residuals.0.norm": "norm1",
    "residuals.1.norm": "norm2",
    "feed_forward.expand": "mlp.0",
    "feed_forward.contract": "mlp.3",
}
SIZES = [(8, 8), (8, 12), (7, 9), (4, 8), (4, 4), (3, 5), (2, 13), (1, 1)]
SHIFTS = [(0, 0), (2, 2), (1, 3), (0, 2)]


def shifted_window(position: int, size: tuple[int, int], shift: tuple[int, int]) -> tuple[int, int]:
    """The window of a token if the first windows begin `shift` above and to the left of a window's length."""
    row, column = divmod(position, size[1])
    return (row - shift[0]) // WINDOW, (column - shift[1]) // WINDOW


def layout_of(size: tuple[int, int], shift: tuple[int, int]) -> WindowLayout:
    return windows.divide(size, (WINDOW, WINDOW), shift, CPU)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shift", SHIFTS)
def test_every_token_has_one_slot_and_sees_exactly_the_tokens_of_its_window(
    size: tuple[int, int], shift: tuple[int, int]
) -> None:
    """By a search through all pairs of tokens on the map; padding is seen by padding alone."""
    layout, count = layout_of(size, shift), size[0] * size[1]
    assert torch.equal(layout.positions[layout.slots], torch.arange(count))
    assert (layout.positions >= 0).sum() == count
    area = WINDOW**2
    may_look = torch.ones(1, area, area, dtype=torch.bool) if layout.may_look is None else layout.may_look
    may_look = may_look.expand(len(layout.positions) // area, -1, -1)
    positions = layout.positions.view(-1, area).tolist()
    seen = set()
    for window, queries in enumerate(positions):
        for (i, query), (j, key) in itertools.product(enumerate(queries), repeat=2):
            if query >= 0 and may_look[window, i, j]:
                assert key >= 0, "a token looks at padding"
                seen.add((query, key))
    homes = [shifted_window(position, size, shift) for position in range(count)]
    assert seen == {(i, j) for i in range(count) for j in range(count) if homes[i] == homes[j]}
    assert may_look.diagonal(dim1=1, dim2=2).all(), "no row is masked as a whole"


@pytest.mark.parametrize(
    ("size", "shift", "masked"), [((8, 8), (0, 0), False), ((8, 8), (2, 2), True), ((6, 8), (0, 0), True)]
)
def test_there_is_a_mask_only_with_a_shift_or_padding(size: Any, shift: Any, masked: bool) -> None:
    assert (layout_of(size, shift).may_look is not None) == masked


def test_of_a_shifted_map_only_the_last_windows_are_masked() -> None:
    """A map of 16 x 16 and windows of 4: windows 3, 7, 11 and 12 to 15 (Liu et al. 2021, figure 4)."""
    may_look = layout_of((16, 16), (2, 2)).may_look
    assert may_look is not None
    assert [i for i, window in enumerate(may_look) if not window.all()] == [3, 7, 11, 12, 13, 14, 15]


@pytest.mark.parametrize("size", [(8, 8), (8, 12), (4, 12), (16, 4), (3, 9)])
def test_windows_are_shifted_by_half_unless_one_covers_the_map(size: tuple[int, int]) -> None:
    assert windows.shifts(size, (WINDOW, WINDOW)) == tuple(2 if side > WINDOW else 0 for side in size)


def numbered(size: tuple[int, int]) -> Tensor:
    """A map whose tokens hold their position from 1 on: (1, HW, 1)."""
    return torch.arange(1.0, size[0] * size[1] + 1)[None, :, None]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("first", "second"), [((0, 0), (2, 2)), ((2, 2), (0, 0)), ((1, 3), (2, 0))])
def test_tokens_keep_their_position_when_windows_change(size: Any, first: Any, second: Any) -> None:
    old, new = layout_of(size, first), layout_of(size, second)
    x = windows.move(numbered(size), windows.from_map(old))
    x = x.masked_fill((old.positions < 0)[:, None], 99.0)  # attention leaves other values in padding
    moved = windows.move(x, windows.between(old, new))
    assert torch.equal(moved, windows.move(numbered(size), windows.from_map(new)))
    assert torch.equal(moved[:, new.slots], numbered(size)) and not moved[:, new.positions < 0].any()


@pytest.mark.parametrize("size", SIZES)
def test_merging_has_torchvisions_order_of_neighbours_and_its_zeros_outside(size: Any) -> None:
    half = tuple((side + 1) // 2 for side in size)
    old, new = layout_of(size, (2, 1)), layout_of(half, (0, 0))
    x = windows.move(numbered(size), windows.from_map(old)).masked_fill((old.positions < 0)[:, None], 99.0)
    merged = windows.move(x, windows.merging(old, new)).unflatten(1, (-1, 4))[..., 0]  # (1, M, 4)
    theirs = PatchMerging(1)
    theirs.norm, theirs.reduction = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    expected = theirs(numbered(size).view(1, *size, 1)).flatten(1, 2)  # (1, hw, 4)
    assert torch.equal(merged[:, new.slots], expected) and not merged[:, new.positions < 0].any()


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (3, 5)])
def test_the_gradient_of_a_move_is_that_of_indexing(size: Any) -> None:
    old, new = layout_of(size, (2, 2)), layout_of(tuple((side + 1) // 2 for side in size), (0, 0))
    random = generator("moves")
    for way in (windows.from_map(old), windows.between(old, layout_of(size, (0, 0))), windows.merging(old, new)):
        x = torch.randn(2, len(way.targets), 3, dtype=torch.float64, generator=random, requires_grad=True)
        direction = torch.randn(2, len(way.sources), 3, dtype=torch.float64, generator=random)
        (gradient,) = torch.autograd.grad(windows.move(x, way), x, direction)
        padded = torch.cat([x, torch.zeros(2, 1, 3, dtype=torch.float64)], dim=1)  # -1 is the row of zeros
        (expected,) = torch.autograd.grad(padded[:, way.sources], x, direction)
        assert torch.equal(gradient, expected)


def test_the_bias_of_a_pair_is_that_of_its_distance_in_rows_and_columns() -> None:
    """Of query minus key, with tables that are not square: the row of a table is twice the window's width less one."""
    module = ShiftedWindowAttention(width=4, heads=2, window=(3, 5))
    nn.init.normal_(module.table, generator=generator("table"))
    bias = module.relative_position_bias()
    assert module.table.shape == (5, 9, 2) and bias.shape == (2, 15, 15)
    for query, key in itertools.product(range(15), repeat=2):
        rows, columns = query // 5 - key // 5, query % 5 - key % 5
        assert torch.equal(bias[:, query, key], module.table[2 + rows, 4 + columns])


@pytest.mark.parametrize("is_zen_4", [True, False])
def test_without_gradients_windows_are_fused_but_on_zen_4(is_zen_4: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_IS_ZEN_4", is_zen_4)
    module = ShiftedWindowAttention(width=WIDTH, heads=HEADS, window=(WINDOW, WINDOW))
    q = torch.zeros(2, HEADS, WINDOW**2, WIDTH // HEADS)
    assert module.is_materialised(q, q)
    with torch.no_grad():
        assert module.is_materialised(q, q) == is_zen_4


@pytest.mark.parametrize("implementation", ["materialised", "fused"])
@pytest.mark.parametrize("shift", [0, 2])
def test_a_block_with_a_window_attention_is_torchvisions(
    shift: int, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation == "fused":
        monkeypatch.setattr(attention, "MAX_MATERIALISED_WEIGHTS", 0)
    theirs = SwinTransformerBlock(WIDTH, HEADS, [WINDOW, WINDOW], [shift, shift]).double()
    rng = generator("swin")
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5, generator=rng)
    options = BlockOptions(
        width=WIDTH, heads=HEADS, feedforward=4 * WIDTH, pre_norm=True, activation=nn.GELU, norm_eps=1e-5
    )
    module = ShiftedWindowAttention(width=WIDTH, heads=HEADS, window=(WINDOW, WINDOW))
    ours = Block(options, attention=module).double()
    values = theirs.state_dict()
    ours.load_state_dict({name: values[their_name(name)].view_as(value) for name, value in ours.state_dict().items()})

    size = (12, 8)
    layout = layout_of(size, (shift, shift))
    x = torch.randn(2, *size, WIDTH, dtype=torch.float64, generator=rng, requires_grad=True)
    y = ours(windows.move(x.flatten(1, 2), windows.from_map(layout)), guide=layout)[:, layout.slots].view_as(x)
    expected = theirs(x)
    torch.testing.assert_close(y, expected, **EXACT)
    direction = torch.randn(x.shape, dtype=x.dtype, generator=rng)
    parameters = dict(theirs.named_parameters())
    our_gradients = torch.autograd.grad(y, [x, *ours.parameters()], direction)
    their_parameters = [parameters[their_name(name)] for name, _ in ours.named_parameters()]
    assert len(their_parameters) == len(parameters)
    their_gradients = torch.autograd.grad(expected, [x, *their_parameters], direction)
    for our_gradient, their_gradient in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(our_gradient, their_gradient.view_as(our_gradient), rtol=1e-11, atol=1e-10)


def their_name(name: str) -> str:
    for ours, theirs in THEIR_NAMES.items():
        name = name.replace(ours, theirs)
    return name
