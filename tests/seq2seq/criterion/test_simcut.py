"""SimCut's divergence against a loop over tokens, and worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from common.machine.seeds import generator
from seq2seq.criterion.simcut import divergence

TARGETS = torch.tensor([[4, 1, 2, 0], [3, 2, 0, 0], [5, 6, 4, 2]])  # padded with 0


def random_logits(name: str) -> Tensor:
    logits = 3 * torch.randn(3, 4, 7, dtype=torch.float64, generator=generator(name, 0))
    return logits.requires_grad_()


@pytest.mark.parametrize("masked_entries", [False, True])
def test_it_is_the_sum_of_the_real_tokens_divergences_with_both_gradients(masked_entries: bool) -> None:
    original, cut = random_logits("original"), random_logits("cut")
    total = divergence(original, cut, TARGETS, masked_entries=masked_entries)
    gradients = torch.autograd.grad(total, (original, cut))
    expected = torch.zeros((), dtype=torch.float64)
    for b in range(3):
        for t in range(4):
            if TARGETS[b, t] != 0:
                p, q = torch.softmax(original[b, t], 0), torch.softmax(cut[b, t], 0)
                for v in range(7):
                    expected = expected + p[v] * (torch.log(p[v]) - torch.log(q[v]))
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, (original, cut)), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-12)
        assert gradient.abs().max() > 0.1 and not gradient[TARGETS == 0].any()


def test_two_entries_by_hand() -> None:
    """Probabilities 1/2, 1/2 and 3/4, 1/4: ln 2/3 / 2 + ln 2 / 2."""
    logits = torch.tensor([[[0.5, 0.5]]], dtype=torch.float64).log()
    cut = torch.tensor([[[0.75, 0.25]]], dtype=torch.float64).log() - 2.0  # softmax ignores a constant
    expected = (math.log(2 / 3) + math.log(2)) / 2
    assert float(divergence(logits, cut, torch.tensor([[1]]))) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("mask", "dtype"),
    [(-1e9, torch.float64), (-1e9, torch.float32), (-1e9, torch.bfloat16), (-math.inf, torch.float16)],
)
def test_masked_entries_do_not_count(mask: float, dtype: torch.dtype) -> None:
    logits = [random_logits(name).detach().to(dtype) for name in ("original", "cut")]
    masked = [part.clone() for part in logits]
    for part in masked:
        part[..., [0, 3]] = mask
        part.requires_grad_()
    remaining = [part[..., [1, 2, 4, 5, 6]].clone().requires_grad_() for part in logits]
    total = divergence(*masked, TARGETS, masked_entries=True)
    expected = divergence(*remaining, TARGETS)
    torch.testing.assert_close(total, expected)
    assert total.dtype == torch.promote_types(dtype, torch.float32)
    total.backward()
    expected.backward()
    for part, reference in zip(masked, remaining, strict=True):
        assert part.grad is not None and not part.grad[..., [0, 3]].any()
        torch.testing.assert_close(part.grad[..., [1, 2, 4, 5, 6]], reference.grad)


def test_it_is_zero_for_equal_distributions_and_positive_for_others() -> None:
    logits, cut = random_logits("original").detach(), random_logits("cut").detach()
    assert float(divergence(logits, logits + 1.5, TARGETS)) == pytest.approx(0, abs=1e-12)
    assert float(divergence(logits, cut, TARGETS)) > 1
    assert float(divergence(logits, 2 * logits, TARGETS)) > 0.1
