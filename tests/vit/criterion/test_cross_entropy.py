"""The loss against torch's cross-entropy with soft targets written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.machine.seeds import generator
from vit.criterion.cross_entropy import LossOptions, cross_entropy

BATCH, CLASSES = 6, 5
EXACT = {"rtol": 0, "atol": 1e-12}


def logits(dtype: torch.dtype = torch.float64, scale: float = 3.0) -> Tensor:
    values = torch.randn(BATCH, CLASSES, dtype=torch.float64, generator=generator("logits")) * scale
    return values.to(dtype).requires_grad_()


LABELS = torch.tensor([0, 4, 2, 2, 1, 3])
OTHERS = torch.tensor([1, 4, 0, 3, 1, 2])
SHARES = torch.tensor([0.3, 0.6, 1.0, 0.0, 0.5, 0.9])


def targets(smoothing: float, mixed: bool) -> Tensor:
    """Target probabilities (B, K), computed for one class of one image at a time."""
    result = torch.zeros(BATCH, CLASSES, dtype=torch.float64)
    for i in range(BATCH):
        share = float(SHARES[i]) if mixed else 1.0
        for k in range(CLASSES):
            probability = share * (k == LABELS[i]) + (1 - share) * (k == OTHERS[i])
            result[i, k] = (1 - smoothing) * float(probability) + smoothing / CLASSES
    return result


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_the_loss_is_the_sum_of_cross_entropies_with_written_out_targets(smoothing: float, mixed: bool) -> None:
    expected, ours = logits(), logits()
    target = targets(smoothing, mixed)
    torch.testing.assert_close(target.sum(dim=1), torch.ones(BATCH, dtype=torch.float64), **EXACT)
    mixing = (OTHERS, SHARES.double()) if mixed else ()
    loss = cross_entropy(LossOptions(smoothing=smoothing), ours, LABELS, *mixing)
    expected_loss = F.cross_entropy(expected, target, reduction="sum")
    tolerance = {"rtol": 0, "atol": 1e-6}  # the shares are fp32
    torch.testing.assert_close(loss, expected_loss, **tolerance)
    loss.backward()
    expected_loss.backward()
    torch.testing.assert_close(ours.grad, expected.grad, **tolerance)
    # softmax minus target: rows add up to zero exactly when the target's shares add up to one
    torch.testing.assert_close(ours.grad.sum(dim=1), torch.zeros(BATCH, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_same_label_twice_or_a_share_of_one_equals_no_mixing(smoothing: float) -> None:
    options = LossOptions(smoothing=smoothing)
    plain = cross_entropy(options, logits(), LABELS)
    torch.testing.assert_close(cross_entropy(options, logits(), LABELS, LABELS, SHARES.double()), plain, **EXACT)
    ones, zeros = torch.ones(BATCH, dtype=torch.float64), torch.zeros(BATCH, dtype=torch.float64)
    torch.testing.assert_close(cross_entropy(options, logits(), LABELS, OTHERS, ones), plain, **EXACT)
    torch.testing.assert_close(cross_entropy(options, logits(), OTHERS, LABELS, zeros), plain, **EXACT)


@pytest.mark.parametrize("lengths", [[1] * 6, [2, 4], [5, 1]])
def test_the_loss_of_a_batch_is_the_sum_of_its_parts(lengths: list[int]) -> None:
    options = LossOptions(smoothing=0.1)
    columns = (logits(), LABELS, OTHERS, SHARES.double())
    parts = zip(*(column.split(lengths) for column in columns), strict=True)
    total = sum(cross_entropy(options, *part) for part in parts)
    torch.testing.assert_close(total, cross_entropy(options, *columns), **EXACT)


@pytest.mark.parametrize(
    ("dtype", "loss_dtype"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_the_loss_of_half_logits_is_fp32_and_that_of_double_logits_is_double(
    dtype: torch.dtype, loss_dtype: torch.dtype
) -> None:
    low = logits(dtype)
    loss = cross_entropy(LossOptions(smoothing=0.1), low, LABELS, OTHERS, SHARES.to(loss_dtype))
    assert loss.dtype == loss_dtype
    expected_loss = cross_entropy(LossOptions(smoothing=0.1), low.to(loss_dtype), LABELS, OTHERS, SHARES.to(loss_dtype))
    assert torch.equal(loss, expected_loss)
    loss.backward()
    assert low.grad is not None and low.grad.dtype == dtype


def test_huge_logits_give_a_finite_loss() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        loss = cross_entropy(LossOptions(smoothing=0.1), logits(dtype, scale=1e4), LABELS, OTHERS, SHARES)
        assert loss.isfinite()


def test_uniform_logits_cost_the_logarithm_of_the_number_of_classes() -> None:
    for smoothing in (0.0, 0.3):
        loss = cross_entropy(LossOptions(smoothing=smoothing), torch.zeros(7, 11), torch.arange(7))
        assert loss.item() == pytest.approx(7 * math.log(11), rel=1e-6)
