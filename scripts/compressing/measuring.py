"""Metrics of a restored model, and its loss on the same samples of val, by which parts of the model are ranked."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from common.data import batching
from common.errors import UserError
from common.machine import device as devices
from common.machine.seeds import mix
from common.task import Answer, Batch, Split
from common.train import evaluator
from common.train.assembly import Components
from common.train.step import step_normalisers


def evaluate(
    parts: Components,
    split: Split,
    precision: str | None = None,
    on_answers: Callable[[Batch, list[Answer]], None] | None = None,
) -> dict[str, float]:
    """Return the metrics of a restored model on `split`, in `precision` or that of its config.

    `on_answers` receives each batch with its answers; the progress is then printed once a minute.
    """
    numbers, _ = evaluator.evaluate(
        parts.task,
        parts.data,
        parts.model,
        split,
        device=parts.device,
        precision=precision or parts.trainer.precision,
        batch_size=batch_size(parts),
        workers=parts.trainer.worker_count,
        on_answers=on_answers,
        report=None if on_answers is None else print,
    )
    return numbers


def batch_size(parts: Components) -> int:
    """The size of an evaluation's batches, in the unit of `data.batch_size`."""
    return parts.trainer.micro_batch or parts.data.batch_size


class Measure:
    """The task's loss on up to `samples` samples of val, in fp32 and without dropout.

    Raises UserError if the data have no val.
    """

    def __init__(self, parts: Components, samples: int):
        if not parts.data.count("val"):
            raise UserError(
                "The data have no val, on which the parts of the model are ranked; give a val split, or cut one from "
                "train (data.val_share or data.val_count)."
            )
        self.task = parts.task
        self.batches = [devices.to_device(batch, parts.device) for batch in _batches(parts, samples)]
        self.normalisers = step_normalisers(self.task, self.batches)

    def batch_losses(self, model: nn.Module) -> Iterator[Tensor]:
        """Yield each batch's share of the mean loss (scalar)."""
        for batch in self.batches:
            yield self.task.loss(model, batch, self.normalisers)[0]

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> float:
        """Compute the mean loss of the model, which must be in evaluation mode."""
        return sum(float(loss) for loss in self.batch_losses(model))


def _batches(parts: Components, samples: int) -> Iterator[Batch]:
    options = {"batch_size": batch_size(parts), "rank": 0, "world": 1, "workers": 0}
    count = parts.data.count("val")
    for batch in batching.evaluation(parts.data, "val", **options, samples=samples if samples < count else None):
        yield batch | {"seeds": [mix(0, "task", 0, id) for id in batch["ids"]]}  # for a task's random choices
