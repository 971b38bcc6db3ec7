"""Dropout in bf16 on the CPU fits its definition; in other types it is torch's."""

import pytest
import torch
import torch.nn.functional as F

from common.nn.dropout import Dropout, dropout

COUNT = 400_003  # no multiple of four


def dropped_ones(p: float, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return dropout(torch.ones(COUNT, dtype=torch.bfloat16), p)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.3, 0.5, 0.9])
def test_a_fraction_p_is_zero_and_the_rest_is_scaled(p: float) -> None:
    x = dropped_ones(p)
    deviation = (p * (1 - p) / COUNT) ** 0.5
    assert abs((x == 0).float().mean().item() - p) < 5 * deviation
    assert x[x != 0].unique().tolist() == [torch.tensor(1 / (1 - p)).bfloat16().item()]


def test_neighbours_and_seeds_are_uncorrelated() -> None:
    centred = (dropped_ones(0.3) == 0).double() - 0.3
    for step in (1, 2, 3, 4, 8):
        assert abs((centred[:-step] * centred[step:]).mean().item()) < 5 * 0.21 / COUNT**0.5, step
    other_seed = (dropped_ones(0.3, seed=1) == 0).double() - 0.3
    assert abs((centred * other_seed).mean().item()) < 5 * 0.21 / COUNT**0.5


def test_a_seed_gives_the_same_mask_again_and_two_calls_differ() -> None:
    assert torch.equal(dropped_ones(0.1), dropped_ones(0.1))
    x = torch.ones(1000, dtype=torch.bfloat16)
    assert not torch.equal(dropout(x, 0.5), dropout(x, 0.5))


def test_gradients_are_zero_exactly_where_outputs_are() -> None:
    x = torch.randn(3, 5, 7, dtype=torch.bfloat16, requires_grad=True)
    y = dropout(x, 0.4)
    y.sum().backward()
    assert y.shape == x.shape and torch.equal((y / x).nan_to_num() == 0, x.grad == 0) and (x.grad == 0).any()


def test_probabilities_zero_and_one_drop_nothing_and_everything() -> None:
    x = torch.randn(10, dtype=torch.bfloat16)
    assert torch.equal(dropout(x, 0.0), x) and not dropout(x, 1.0).any() and dropout(x[:0], 0.5).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_other_types_use_torchs_dropout(dtype: torch.dtype) -> None:
    x = torch.randn(1000, dtype=dtype)
    torch.manual_seed(3)
    ours = dropout(x, 0.1)
    torch.manual_seed(3)
    assert torch.equal(ours, F.dropout(x, 0.1))


def test_the_module_acts_in_training_only() -> None:
    module, x = Dropout(0.5), torch.ones(100, dtype=torch.bfloat16)
    assert (module(x) == 0).any() and torch.equal(module.eval()(x), x)
