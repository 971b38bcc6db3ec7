"""The losses of distillation against plain computations."""

import math
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F

from common.machine.seeds import generator
from common.nn.distillation import DistillationOptions, distillation_loss

STUDENT = torch.randn(7, 5, dtype=torch.float64, generator=generator("student"))
TEACHER = 2 * torch.randn(7, 5, dtype=torch.float64, generator=generator("teacher"))
EXACT = {"rtol": 0, "atol": 1e-12}  # float64, sums of five terms


def options(kind: Literal["hard", "soft"], temperature: float = 1.0) -> DistillationOptions:
    return DistillationOptions(teacher="file", kind=kind, weight=0.5, temperature=temperature)


def test_hard_is_the_cross_entropy_with_the_teachers_class_at_any_temperature() -> None:
    expected = F.cross_entropy(STUDENT, TEACHER.argmax(1), reduction="none")
    for temperature in (1.0, 3.0):
        torch.testing.assert_close(distillation_loss(options("hard", temperature), STUDENT, TEACHER), expected, **EXACT)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_is_the_divergence_at_the_temperature_times_its_square(temperature: float) -> None:
    losses = distillation_loss(options("soft", temperature), STUDENT, TEACHER)
    for loss, student, teacher in zip(losses, STUDENT, TEACHER, strict=True):
        p, q = ((logits / temperature).exp() for logits in (teacher, student))
        p, q = (p / p.sum()).tolist(), (q / q.sum()).tolist()
        expected = temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert float(loss) == pytest.approx(expected, abs=1e-12) and expected > 0.01


def test_the_mean_of_soft_over_samples_is_k_times_the_loss_of_deits_code() -> None:
    """DeiT's losses.py divides the sum by the number of elements, and not of samples."""
    logs = [F.log_softmax(logits / 3.0, dim=1) for logits in (STUDENT, TEACHER)]
    published = F.kl_div(*logs, reduction="sum", log_target=True) * 9.0 / STUDENT.numel()
    mean = distillation_loss(options("soft", 3.0), STUDENT, TEACHER).mean()
    torch.testing.assert_close(mean, 5 * published, **EXACT)


def test_a_student_with_the_teachers_logits_has_no_soft_loss_and_no_gradient() -> None:
    student = TEACHER.clone().requires_grad_()
    losses = distillation_loss(options("soft", 2.0), student, TEACHER + 7.0)
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    assert losses.abs().max() < 1e-12 and gradient.abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_there_is_a_loss_for_each_row_of_classes(kind: Any) -> None:
    rows = distillation_loss(options(kind), STUDENT[:6].view(2, 3, 5), TEACHER[:6].view(2, 3, 5))
    assert rows.shape == (2, 3)
    torch.testing.assert_close(rows.flatten(), distillation_loss(options(kind), STUDENT[:6], TEACHER[:6]), **EXACT)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_half_precision_gives_a_loss_in_fp32_and_double_one_in_double(kind: Any) -> None:
    half = distillation_loss(options(kind), STUDENT.bfloat16(), TEACHER.bfloat16())
    assert half.dtype == torch.float32
    expected = distillation_loss(options(kind), STUDENT.bfloat16().double(), TEACHER.bfloat16().double())
    torch.testing.assert_close(half.double(), expected, rtol=1e-5, atol=1e-6)
    assert expected.dtype == torch.float64
