"""The part of the detection task that learns from a teacher, another detector; see detr/criterion/distillation.py."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.data.names import composed, first_names
from common.errors import UserError
from common.task import Batch, Teacher
from detr.criterion.answers import Classification, Outputs, Targets
from detr.criterion.distillation import DetectionDistillationOptions, confident_predictions, teacher_criterion
from detr.criterion.matcher import MatcherOptions
from detr.criterion.set_loss import LossOptions
from detr.tasks.detection_task import DetectionTask, are_unnamed

TEACHER = "teacher"  # the answer set of the student's queries as they are compared with the teacher


class DistilledDetection(DetectionTask):
    """A detection task with `distillation`, whose loss has a term of a teacher beside that of the labels."""

    classification: Classification
    distillation: DetectionDistillationOptions | None = None
    teacher: Teacher | None = None

    def use_distillation(
        self, options: DetectionDistillationOptions | None, loss: LossOptions, matcher: MatcherOptions
    ) -> None:
        """Store the options; called by the constructor."""
        self.distillation = options
        self.teacher_criterion = teacher_criterion(loss, matcher, options) if options and options.teacher else None

    @property
    def teacher_file(self) -> str | None:
        """The checkpoint of the teacher (`distillation.teacher`); None without distillation."""
        return self.distillation.teacher if self.distillation else None

    def set_teacher(self, teacher: Teacher) -> list[str]:
        """Store the teacher for `loss`; returns a list of notes for the log.

        Raises UserError if the teacher is no detector with queries, or has other classes, or if its probabilities are
        of another kind and `distillation.kind` is "soft".
        """
        if not isinstance(teacher.task, DistilledDetection):
            raise UserError("the teacher is no detector with queries; give a checkpoint of a DETR, or of a variant.")
        notes = _check_classes(teacher.task.categories, self.categories)
        kinds = teacher.task.classification, self.classification
        if self.distillation and self.distillation.kind == "soft" and len(set(kinds)) > 1:
            raise UserError(
                f"the teacher has task.loss.classification={kinds[0]}, and this run has {kinds[1]}, so that their "
                "probabilities are not comparable; give task.distillation.kind=hard, or another teacher."
            )
        self.teacher = teacher
        return notes

    def teacher_normalisers(self, counts: Sequence[int]) -> dict[str, float]:
        """Return the divisors of the teacher's terms, the number of labelled objects; empty without a teacher.

        The number of the teacher's predictions is not known before the first forward pass of a step.
        """
        if self.teacher_criterion is None:
            return {}
        return self.teacher_criterion.normalisers(TEACHER, counts, [0] * len(counts))

    def add_teacher(
        self, loss: Tensor, batch: Batch, layers: Sequence[Outputs], normalisers: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss with the share of the teacher, and the part "teacher" for the log, without this share.

        `loss` is that of the labels, and `layers` are the outputs of the student's queries. Without a teacher, the loss
        is unchanged and there is no part.
        """
        if self.teacher is None or self.distillation is None or self.teacher_criterion is None:
            assert self.teacher_file is None, "assembly provides the teacher before the first step"
            return loss, {}
        targets = self._teacher_targets(self.teacher, self.distillation.min_score, batch)
        values = self.teacher_criterion(TEACHER, layers, targets, normalisers)
        of_teacher = torch.stack(list(values.values())).sum()
        weight = self.distillation.weight
        return (1 - weight) * loss + weight * of_teacher, {TEACHER: of_teacher.detach()}

    @torch.no_grad()
    def _teacher_targets(self, teacher: Teacher, min_score: float, batch: Batch) -> Targets:
        """The confident predictions of the teacher's last layer for the student's augmented images."""
        return confident_predictions(teacher.task.classification, self._forward(teacher.model, batch)[-1], min_score)

    @abstractmethod
    def _forward(self, model: nn.Module, batch: Batch, hints: dict[str, Tensor] | None = None) -> list[Outputs]:
        """Return the outputs of each layer of the model."""


def _check_classes(of_teacher: list[dict[str, Any]], of_data: list[dict[str, Any]]) -> list[str]:
    """Raise UserError unless the classes have the same names in the same order; returns notes for the log."""
    theirs, ours = ([category["name"] for category in categories] for categories in (of_teacher, of_data))
    if [*map(composed, theirs)] == [*map(composed, ours)]:
        return []
    if are_unnamed(of_teacher) and len(theirs) == len(ours):
        return [
            f"the teacher's file does not name its {len(theirs)} classes; they are taken to have the order of the "
            f"data's: {first_names(ours)}"
        ]
    raise UserError(
        f"the teacher has {len(theirs)} classes ({first_names(theirs)}), and the data have {len(ours)} "
        f"({first_names(ours)}); give a teacher that was trained on the same classes in the same order."
    )
