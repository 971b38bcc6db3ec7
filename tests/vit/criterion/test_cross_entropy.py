"""The loss against torch's own with soft targets that are written out."""

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
    drawn = torch.randn(BATCH, CLASSES, dtype=torch.float64, generator=generator("logits")) * scale
    return drawn.to(dtype).requires_grad_()


LABELS = torch.tensor([0, 4, 2, 2, 1, 3])
OTHERS = torch.tensor([1, 4, 0, 3, 1, 2])
SHARES = torch.tensor([0.3, 0.6, 1.0, 0.0, 0.5, 0.9])


def targets(smoothing: float, mixed: bool) -> Tensor:
    """What the network should say, one class of one image at a time."""
    result = torch.zeros(BATCH, CLASSES, dtype=torch.float64)
    for i in range(BATCH):
        share = float(SHARES[i]) if mixed else 1.0
        for k in range(CLASSES):
            one = share * (k == LABELS[i]) + (1 - share) * (k == OTHERS[i])
            result[i, k] = (1 - smoothing) * float(one) + smoothing / CLASSES
    return result


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_the_loss_is_the_sum_of_cross_entropies_with_the_written_out_targets(smoothing: float, mixed: bool) -> None:
    expected, ours = logits(), logits()
    wanted = targets(smoothing, mixed)
    torch.testing.assert_close(wanted.sum(dim=1), torch.ones(BATCH, dtype=torch.float64), **EXACT)
    mixing = (OTHERS, SHARES.double()) if mixed else ()
    found = cross_entropy(LossOptions(smoothing=smoothing), ours, LABELS, *mixing)
    loss = F.cross_entropy(expected, wanted, reduction="sum")
    tolerance = {"rtol": 0, "atol": 1e-6}  # the shares are known to fp32
    torch.testing.assert_close(found, loss, **tolerance)
    found.backward()
    loss.backward()
    torch.testing.assert_close(ours.grad, expected.grad, **tolerance)
    # softmax minus target: rows add up to zero exactly when the target's shares add up to one
    torch.testing.assert_close(ours.grad.sum(dim=1), torch.zeros(BATCH, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixing_with_the_same_label_and_whole_shares_change_nothing(smoothing: float) -> None:
    options = LossOptions(smoothing=smoothing)
    plain = cross_entropy(options, logits(), LABELS)
    torch.testing.assert_close(cross_entropy(options, logits(), LABELS, LABELS, SHARES.double()), plain, **EXACT)
    ones, zeros = torch.ones(BATCH, dtype=torch.float64), torch.zeros(BATCH, dtype=torch.float64)
    torch.testing.assert_close(cross_entropy(options, logits(), LABELS, OTHERS, ones), plain, **EXACT)
    torch.testing.assert_close(cross_entropy(options, logits(), OTHERS, LABELS, zeros), plain, **EXACT)


@pytest.mark.parametrize("cuts", [[1] * 6, [2, 4], [5, 1]])
def test_the_loss_of_a_batch_is_the_sum_of_its_parts(cuts: list[int]) -> None:
    options = LossOptions(smoothing=0.1)
    columns = (logits(), LABELS, OTHERS, SHARES.double())
    parts = zip(*(column.split(cuts) for column in columns), strict=True)
    found = sum(cross_entropy(options, *part) for part in parts)
    torch.testing.assert_close(found, cross_entropy(options, *columns), **EXACT)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_types_are_raised_and_double_stays(given: torch.dtype, expected: torch.dtype) -> None:
    low = logits(given)
    found = cross_entropy(LossOptions(smoothing=0.1), low, LABELS, OTHERS, SHARES.to(expected))
    assert found.dtype == expected
    raised = cross_entropy(LossOptions(smoothing=0.1), low.to(expected), LABELS, OTHERS, SHARES.to(expected))
    assert torch.equal(found, raised)
    found.backward()
    assert low.grad is not None and low.grad.dtype == given


def test_huge_logits_give_a_finite_loss() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        found = cross_entropy(LossOptions(smoothing=0.1), logits(dtype, scale=1e4), LABELS, OTHERS, SHARES)
        assert found.isfinite()


def test_knowing_nothing_costs_the_logarithm_of_the_number_of_classes() -> None:
    for smoothing in (0.0, 0.3):
        found = cross_entropy(LossOptions(smoothing=smoothing), torch.zeros(7, 11), torch.arange(7))
        assert found.item() == pytest.approx(7 * math.log(11), rel=1e-6)
