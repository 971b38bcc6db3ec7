"""Windows and relative positions against explicit loops and masks."""

import torch

from common.machine.seeds import generator
from common.nn.attention import Attention
from detr.models.window_attention import WindowAttention
from tests.segmenting import redraw

WIDTH, HEADS = 8, 2


def attention(side: int, window: int | None) -> WindowAttention:
    module = WindowAttention(width=WIDTH, heads=HEADS, side=side, window=window).double().eval()
    redraw(module)
    return module


def tokens(side: int) -> torch.Tensor:
    return torch.randn(2, side**2, WIDTH, generator=generator(side), dtype=torch.float64)


def test_relative_positions_are_products_with_the_vectors_of_the_distances() -> None:
    module, side = attention(3, None), 3
    q = torch.randn(2, HEADS, side**2, WIDTH // HEADS, generator=generator("q"), dtype=torch.float64)
    bias = module.relative_positions(q)
    for i in range(side**2):
        for j in range(side**2):
            row, column = i // side - j // side, i % side - j % side
            vector = module.rows[row + side - 1] + module.columns[column + side - 1]
            # fp64, sums of four products
            torch.testing.assert_close(bias[:, :, i, j], q[:, :, i] @ vector, rtol=1e-12, atol=1e-12)


def test_windows_equal_attention_that_is_masked_between_windows() -> None:
    side, window = 6, 3
    module, x = attention(side, window), tokens(side)
    with torch.no_grad():
        module.rows.zero_(), module.columns.zero_()
    plain = Attention(width=WIDTH, heads=HEADS).double()
    plain.load_state_dict({name: t for name, t in module.state_dict().items() if name not in ("rows", "columns")})
    index = torch.arange(side)
    number = (index[:, None] // window * side + index // window).flatten()  # of each token's window
    expected = plain(q=x, k=x, v=x, may_look=number[:, None] == number)
    torch.testing.assert_close(module(q=x, k=x, v=x), expected, rtol=1e-12, atol=1e-12)


def test_splitting_and_joining_restores_a_map_whose_windows_are_padded() -> None:
    module, x = attention(5, 3), tokens(5)
    windows = module.split(x)
    assert windows.shape == (2 * 4, 9, WIDTH) and torch.equal(module.join(windows), x)
    # the second window of the first row has one column of padding
    assert not windows[1].unflatten(0, (3, 3))[:, 2].any() and windows[1].unflatten(0, (3, 3))[:, :2].all()


def test_padding_of_windows_is_attended_to_as_in_the_official_code() -> None:
    module, x = attention(5, 3), tokens(5)
    corner = x.unflatten(1, (5, 5))[:, 3:, 3:]  # the last window has 2 x 2 tokens and 5 zeros
    padded = torch.zeros(2, 3, 3, WIDTH, dtype=torch.float64)
    padded[:, :2, :2] = corner
    whole = attention(3, None)
    whole.load_state_dict(module.state_dict())
    flat = padded.flatten(1, 2)
    expected = whole(q=flat, k=flat, v=flat).unflatten(1, (3, 3))[:, :2, :2]
    actual = module(q=x, k=x, v=x).unflatten(1, (5, 5))[:, 3:, 3:]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
