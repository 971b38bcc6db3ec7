"""The teacher of distillation in a run: its line in the start summary, its digest, and the check of it on resuming."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.config.diff import TEACHER_PATH
from common.data import fingerprints
from common.errors import UserError
from common.task import Task, Teacher


def teacher_of(task: Task) -> Teacher | None:
    """Return the teacher from which the task's model learns; None without distillation."""
    teacher: Teacher | None = getattr(task, "teacher", None)
    return teacher


def digest_of(task: Task) -> str | None:
    """Return the digest of the weights of the task's teacher; None without distillation."""
    teacher = teacher_of(task)
    return teacher.digest if teacher else None


def summary(task: Task, precision: str) -> list[str]:
    """Return a list with one line on the teacher, which computes in the run's precision; empty without a teacher."""
    teacher = teacher_of(task)
    if teacher is None:
        return []
    size = f"{type(teacher.model).__name__}, {sum(p.numel() for p in teacher.model.parameters()):,} parameters"
    return [f"teacher   {teacher.title}; {size}, {precision}, not trained"]


def digest(model: nn.Module) -> str:
    """Return a digest of the names and values of a model's weights."""
    parts: list[Any] = []
    for name, tensor in model.state_dict().items():
        parts += [name.encode(), tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()]
    return fingerprints.digest(parts)


def refuse_other(task: Task, content: dict[str, Any], path: Path, allowed: list[str]) -> list[str]:
    """Raise UserError if the run of a checkpoint had another teacher than `task`, unless `allowed` permits the change.

    The teachers are compared by the digests of their weights; `content` is that of the checkpoint. Returns a
    description of a permitted change. Nothing is compared if the checkpoint's run had no teacher.
    """
    teacher, before = teacher_of(task), content.get("teacher")
    if before in (None, digest_of(task)):
        return []
    reason = f"the weights of the present one ({teacher.title}) differ" if teacher else "there is none"
    if not any(key in ("task", "task.distillation", TEACHER_PATH) for key in allowed):
        raise UserError(
            f"the teacher is not the one that the run of {path} had: {reason}; give its former file as {TEACHER_PATH}, "
            f"or give allow_changes=[{TEACHER_PATH}]."
        )
    return [f"the teacher is another: {reason}"]
