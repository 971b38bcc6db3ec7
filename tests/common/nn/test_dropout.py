"""Dropout in bf16 on the CPU by what dropout is; in fp32 it is torch's."""

import pytest
import torch
import torch.nn.functional as F

from common.nn.dropout import Dropout, dropout

COUNT = 400_003  # no multiple of four


def drawn(p: float, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return dropout(torch.ones(COUNT, dtype=torch.bfloat16), p)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.3, 0.5, 0.9])
def test_as_many_are_zero_as_asked_for_and_the_others_make_up_for_them(p: float) -> None:
    x = drawn(p)
    deviation = (p * (1 - p) / COUNT) ** 0.5
    assert abs((x == 0).float().mean().item() - p) < 5 * deviation
    assert x[x != 0].unique().tolist() == [torch.tensor(1 / (1 - p)).bfloat16().item()]


def test_neighbours_and_seeds_have_nothing_to_do_with_each_other() -> None:
    zero = (drawn(0.3) == 0).double() - 0.3
    for step in (1, 2, 3, 4, 8):
        assert abs((zero[:-step] * zero[step:]).mean().item()) < 5 * 0.21 / COUNT**0.5, step
    other = (drawn(0.3, seed=1) == 0).double() - 0.3
    assert abs((zero * other).mean().item()) < 5 * 0.21 / COUNT**0.5


def test_a_seed_gives_the_same_again_and_two_calls_differ() -> None:
    assert torch.equal(drawn(0.1), drawn(0.1))
    x = torch.ones(1000, dtype=torch.bfloat16)
    assert not torch.equal(dropout(x, 0.5), dropout(x, 0.5))


def test_gradients_pass_where_numbers_do() -> None:
    x = torch.randn(3, 5, 7, dtype=torch.bfloat16, requires_grad=True)
    y = dropout(x, 0.4)
    y.sum().backward()
    assert y.shape == x.shape and torch.equal((y / x).nan_to_num() == 0, x.grad == 0) and (x.grad == 0).any()


def test_the_ends_are_all_and_nothing() -> None:
    x = torch.randn(10, dtype=torch.bfloat16)
    assert torch.equal(dropout(x, 0.0), x) and not dropout(x, 1.0).any() and dropout(x[:0], 0.5).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_elsewhere_it_is_torchs_own(dtype: torch.dtype) -> None:
    x = torch.randn(1000, dtype=dtype)
    torch.manual_seed(3)
    ours = dropout(x, 0.1)
    torch.manual_seed(3)
    assert torch.equal(ours, F.dropout(x, 0.1))


def test_the_module_acts_in_training_only() -> None:
    module, x = Dropout(0.5), torch.ones(100, dtype=torch.bfloat16)
    assert (module(x) == 0).any() and torch.equal(module.eval()(x), x)
