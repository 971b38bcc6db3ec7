"""Distillation of classifiers: which teachers suit a task, and the logits of students with one head or two.

Touvron et al. 2021 (DeiT), arXiv 2012.12877, section 4. The loss is in common/nn/distillation.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from common.data.names import composed, first_names
from common.errors import UserError
from common.task import Teacher
from vit.data.protocol import ImageData
from vit.tasks.prediction import ClassificationPrediction

Logits = Tensor | tuple[Tensor, Tensor]  # (B, K), or those of the class head and of the distillation head in training


def check_teacher(teacher: Teacher, classes: Sequence[str], data: ImageData) -> list[str]:
    """Check that a teacher suits a student with these classes and data; returns a list of notes for the log.

    Teacher and student receive the same images. So they need the same classes in the same order, image size, channels
    and normalisation. An imported teacher has no class names; its classes are then taken to have the order of the data,
    and a note says so. Raises UserError if the teacher does not suit the student.
    """
    its_task = teacher.task
    if not isinstance(its_task, ClassificationPrediction):  # an image GPT has classes, too
        raise UserError("the teacher is no image classifier; give a checkpoint of one.")
    theirs = its_task.classes
    nameless = all(name == f"class {i}" for i, name in enumerate(theirs)) and len(theirs) == len(classes)
    if not nameless and [*map(composed, theirs)] != [*map(composed, classes)]:
        raise UserError(
            f"the teacher has {len(theirs)} classes ({first_names(theirs)}), and the data have {len(classes)} "
            f"({first_names(classes)}); give a teacher that was trained on the same classes in the same order."
        )
    for key in ("image_size", "channels", "mean", "std"):
        needed, present = (_plain(getattr(source, key, None)) for source in (teacher.task.data, data))
        if None not in (needed, present) and needed != present:
            raise UserError(
                f"the teacher was trained on images with data.{key}={needed}, and this run has data.{key}={present}; "
                "give the same value, or another teacher."
            )
    if not nameless or [*theirs] == [*classes]:
        return []
    return [
        f"the teacher's file does not name its {len(theirs)} classes; they are taken to have the order of the data's: "
        f"{first_names(classes)}"
    ]


def logits_of_heads(outputs: Logits) -> tuple[Tensor, Tensor]:
    """Return the logits (B, K) that learn from the labels and those that learn from the teacher.

    They are the same for a model with one head.
    """
    return outputs if isinstance(outputs, tuple) else (outputs, outputs)


def mean_logits(outputs: Logits) -> Tensor:
    """Return the mean of the logits of both heads (B, K), as in evaluation; for a model with one head, its logits."""
    return (outputs[0] + outputs[1]) / 2 if isinstance(outputs, tuple) else outputs


@torch.no_grad()
def teacher_logits(teacher: Teacher, images: Tensor) -> Tensor:
    """Compute the teacher's logits (B, K) for the student's augmented and mixed images (B, channels, H, W)."""
    logits: Tensor = teacher.model(images)
    return logits


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
