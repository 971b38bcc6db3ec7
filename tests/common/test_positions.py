"""Positions against the papers' formulas written out in plain Python."""

import math

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from common.positions import Learned2d, sine, sine_2d
from common.randomness import generator

MASK = torch.tensor(
    [
        [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
        [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]],
        [[1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
        [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
    ],
    dtype=torch.bool,
)


def plain_sine(position: float, width: int, temperature: float = 10000.0) -> list[float]:
    """Vaswani et al., section 3.5, one channel at a time."""
    channels = []
    for channel in range(width):
        angle = position / temperature ** (2 * (channel // 2) / width)
        channels.append(math.cos(angle) if channel % 2 else math.sin(angle))
    return channels


def plain_sine_2d(real: Tensor, width: int) -> Tensor:
    """Carion et al., A.4, one position at a time: count the real ones above (and to the left), over all in the line."""
    batch, height, columns = real.shape
    result = torch.zeros(batch, height, columns, width)
    for image in range(batch):
        for i in range(height):
            for j in range(columns):
                above = sum(bool(real[image, k, j]) for k in range(i + 1))
                in_column = sum(bool(real[image, k, j]) for k in range(height))
                left = sum(bool(real[image, i, k]) for k in range(j + 1))
                in_row = sum(bool(real[image, i, k]) for k in range(columns))
                y = above / (in_column + 1e-6) * 2 * math.pi
                x = left / (in_row + 1e-6) * 2 * math.pi
                result[image, i, j] = torch.tensor(plain_sine(y, width // 2) + plain_sine(x, width // 2))
    return result


def test_sine_is_the_papers_formula() -> None:
    positions = torch.arange(60).reshape(3, 20)
    expected = torch.tensor([plain_sine(p, 16) for p in range(60)]).reshape(3, 20, 16)
    # An angle of 60 is known to 60 * 2^-24 in fp32.
    torch.testing.assert_close(sine(positions, 16), expected, rtol=0, atol=1e-5)


def test_sine_takes_another_temperature() -> None:
    expected = torch.tensor([plain_sine(p, 8, temperature=20.0) for p in range(7)])
    torch.testing.assert_close(sine(torch.arange(7), 8, temperature=20.0), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("width", [4, 24, 256])
def test_sine_2d_is_the_papers_formula_on_padded_maps(width: int) -> None:
    torch.testing.assert_close(sine_2d(MASK, width), plain_sine_2d(MASK, width), rtol=0, atol=2e-6)


def test_sine_2d_of_an_image_does_not_move_with_its_padding() -> None:
    padded = torch.zeros(2, 9, 11, dtype=torch.bool)
    padded[0, :4, :7] = True
    padded[1] = True
    alone = sine_2d(torch.ones(1, 4, 7, dtype=torch.bool), 32)
    torch.testing.assert_close(sine_2d(padded, 32)[0, :4, :7], alone[0], rtol=0, atol=1e-6)


def test_sine_2d_tells_all_positions_apart() -> None:
    table = sine_2d(torch.ones(1, 25, 34, dtype=torch.bool), 128)[0].flatten(0, 1)
    distances = torch.cdist(table, table).fill_diagonal_(torch.inf)
    assert distances.min() > 0.01


def test_learned_positions_are_column_then_row() -> None:
    positions = Learned2d(6, side=5)
    got = positions(torch.ones(2, 3, 4, dtype=torch.bool))
    assert got.shape == (2, 3, 4, 6)
    for image in range(2):
        for i in range(3):
            for j in range(4):
                expected = torch.cat([positions.columns.weight[j], positions.rows.weight[i]])
                assert torch.equal(got[image, i, j], expected)


def test_learned_positions_start_uniform_and_learn() -> None:
    torch.manual_seed(0)
    positions = Learned2d(64)
    for table in (positions.rows.weight, positions.columns.weight):
        assert table.shape == (50, 32) and table.min() >= 0 and table.max() <= 1
        assert table.mean().item() == pytest.approx(0.5, abs=0.05)
    weight = torch.randn(2, 3, 4, 64, generator=generator("weight"))
    (positions(torch.ones(2, 3, 4, dtype=torch.bool)) * weight).sum().backward()
    torch.testing.assert_close(positions.columns.weight.grad[:4], weight.sum((0, 1))[:, :32])
    torch.testing.assert_close(positions.rows.weight.grad[:3], weight.sum((0, 2))[:, 32:])


@pytest.mark.parametrize("height, width", [(51, 1), (1, 51)])
def test_a_map_larger_than_the_learned_tables_is_refused(height: int, width: int) -> None:
    positions = Learned2d(4)
    positions(torch.ones(1, 50, 50, dtype=torch.bool))
    with pytest.raises(UserError, match=f"map of {height}x{width} does not fit learned positions of 50x50"):
        positions(torch.ones(1, height, width, dtype=torch.bool))
