"""The translator's loss against PyTorch's, and worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.machine.seeds import generator
from seq2seq.criterion.cross_entropy import LossOptions, cross_entropy, token_losses

TARGETS = torch.tensor([[4, 1, 2, 0], [3, 2, 0, 0], [5, 6, 4, 2]])  # padded with 0


def random_logits(dtype: torch.dtype = torch.float64) -> Tensor:
    logits = 3 * torch.randn(3, 4, 7, dtype=torch.float64, generator=generator("logits", 0))
    return logits.to(dtype).requires_grad_()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_it_is_pytorchs_smoothed_cross_entropy_with_its_gradients(smoothing: float) -> None:
    logits, theirs = random_logits(), random_logits()
    smoothed, plain = cross_entropy(LossOptions(smoothing=smoothing), logits, TARGETS)
    rows, options = (theirs.flatten(0, 1), TARGETS.flatten()), {"ignore_index": 0, "reduction": "sum"}
    expected = F.cross_entropy(*rows, label_smoothing=smoothing, **options)
    torch.testing.assert_close(smoothed, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(plain, F.cross_entropy(*rows, **options).detach(), rtol=0, atol=1e-12)
    assert not plain.requires_grad
    smoothed.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad, theirs.grad, rtol=0, atol=1e-12)
    assert (logits.grad[TARGETS == 0] == 0).all(), "padding has no gradient"


def test_three_entries_by_hand() -> None:
    """Probabilities 1/2, 1/4, 1/4, target the second: ln 4 plain; 0.9 ln 4 + 0.1 (ln 2 + 2 ln 4) / 3 smoothed."""
    logits = torch.tensor([[[0.5, 0.25, 0.25]]], dtype=torch.float64).log() + 1.7  # softmax ignores a constant
    smoothed, plain = cross_entropy(LossOptions(smoothing=0.1), logits, torch.tensor([[1]]))
    assert float(plain) == pytest.approx(2 * math.log(2), abs=1e-12)
    assert float(smoothed) == pytest.approx((1.8 + 0.5 / 3) * math.log(2), abs=1e-12)


def test_token_losses_add_up_to_the_plain_loss_and_are_zero_for_padding() -> None:
    logits = random_logits()
    losses = token_losses(logits, TARGETS)
    assert losses.shape == TARGETS.shape and (losses[TARGETS == 0] == 0).all() and (losses[TARGETS != 0] > 0).all()
    torch.testing.assert_close(losses.sum(), cross_entropy(LossOptions(smoothing=0.3), logits, TARGETS)[1])


def test_only_padding_has_zero_loss_and_zero_gradients() -> None:
    logits = random_logits()
    smoothed, plain = cross_entropy(LossOptions(smoothing=0.1), logits, torch.zeros_like(TARGETS))
    smoothed.backward()
    assert smoothed.item() == plain.item() == 0 and (logits.grad == 0).all()


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_types_are_cast_to_fp32_first(dtype: torch.dtype, computed: torch.dtype) -> None:
    logits = random_logits(dtype).detach()
    cast = logits.to(computed)
    for loss, expected in zip(
        cross_entropy(LossOptions(smoothing=0.1), logits, TARGETS),
        cross_entropy(LossOptions(smoothing=0.1), cast, TARGETS),
        strict=True,
    ):
        assert loss.dtype == computed and torch.equal(loss, expected)
    assert token_losses(logits, TARGETS).dtype == computed


@pytest.mark.parametrize(
    ("mask", "dtype"),
    [(-1e9, torch.float64), (-1e9, torch.float32), (-1e9, torch.bfloat16), (-math.inf, torch.float16)],
)
def test_smoothing_leaves_masked_entries_out(mask: float, dtype: torch.dtype) -> None:
    """Entries 0 (PAD) and 3 are masked: the loss and its gradients are those of the five that remain."""
    targets = torch.tensor([[4, 1, 2, 0], [5, 6, 4, 2]])  # (2, 4), padded with 0
    logits = random_logits(dtype).detach()[:2]
    masked = logits.clone()
    masked[..., [0, 3]] = mask
    remaining = [1, 2, 4, 5, 6]
    of_remaining = torch.tensor([-100, 0, 1, -100, 2, 3, 4])[targets]  # (2, 4), -100 for padding
    masked.requires_grad_()
    reference = logits[..., remaining].to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    smoothed, plain = cross_entropy(LossOptions(smoothing=0.1), masked, targets, masked_entries=True)
    rows = reference.flatten(0, 1), of_remaining.flatten()
    expected = F.cross_entropy(*rows, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(smoothed, expected)
    torch.testing.assert_close(plain, F.cross_entropy(*rows, reduction="sum").detach())
    smoothed.backward()
    expected.backward()
    assert masked.grad is not None and not masked.grad[..., [0, 3]].any()
    torch.testing.assert_close(masked.grad[..., remaining], reference.grad.to(dtype))


def test_without_masked_entries_the_search_for_them_changes_no_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        losses, gradients = [], []
        for masked_entries in (False, True):
            logits = random_logits(dtype)
            smoothed, _ = cross_entropy(LossOptions(smoothing=0.1), logits, TARGETS, masked_entries=masked_entries)
            (gradient,) = torch.autograd.grad(smoothed, logits)
            losses.append(smoothed)
            gradients.append(gradient)
        assert torch.equal(*losses) and torch.equal(*gradients)
