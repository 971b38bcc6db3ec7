"""Distillation: the loss of a student whose targets are a teacher's logits.

Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531; Touvron et al. 2021 (DeiT),
"Training data-efficient image transformers & distillation through attention", arXiv 2012.12877, section 4.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.types import Fraction, PositiveFloat


@dataclass(frozen=True, kw_only=True)
class DistillationOptions:
    """Options of distillation. The loss is (1 - weight) * (loss of the labels) + weight * (loss of distillation).

    teacher: the teacher's checkpoint: a file, a run's folder or the name of published weights; None = no distillation.
    kind: "hard": the teacher's most probable class is a second label (DeiT, equation 3). "soft": the teacher's
        probabilities are the targets (equation 2).
    weight: share of distillation in the loss: 0.5 in DeiT's hard distillation, 0.1 in its soft distillation.
    temperature: divides the logits of student and teacher in "soft": 3 in DeiT; "hard" does not read it.
    """

    teacher: str | None
    kind: Literal["hard", "soft"]
    weight: Fraction
    temperature: PositiveFloat


def distillation_loss(options: DistillationOptions, student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the loss of each sample in nats, in fp32 or higher: logits (..., K) of both -> (...).

    "hard" is the cross-entropy with the teacher's most probable class, without smoothing. "soft" is the divergence
    KL(teacher || student), summed over the classes, of the probabilities at the temperature, times its square.

    Differs: DeiT's code divides "soft" by the number of samples and of classes. Here, as in the paper's equation 2, the
    mean over the samples is taken, which is K times as large.
    """
    student, teacher = (logits.to(torch.promote_types(logits.dtype, torch.float32)) for logits in (student, teacher))
    if options.kind == "hard":
        labels = teacher.argmax(dim=-1, keepdim=True)  # (..., 1)
        return -student.log_softmax(dim=-1).gather(-1, labels)[..., 0]
    temperature = options.temperature
    logs, targets = ((logits / temperature).log_softmax(dim=-1) for logits in (student, teacher))
    divergence = F.kl_div(logs, targets, reduction="none", log_target=True).sum(dim=-1)  # (..., K) -> (...)
    return divergence * temperature**2
