"""Evaluate a model on a split, for train.py and evaluate.py; the result is the same for any number of ranks."""

import time
from collections.abc import Callable

import torch
from torch import nn

from common.data import batching
from common.errors import UserError
from common.machine import device as devices
from common.machine import distributed, memory
from common.machine.signals import StopSignals
from common.task import Answer, Batch, Data, Metric, Split, Task, answers_of

REPORT_SECONDS = 60  # between two progress lines of an evaluation


@torch.no_grad()
def evaluate(
    task: Task,
    data: Data,
    model: nn.Module,
    split: Split,
    *,
    device: torch.device,
    precision: str,
    batch_size: int,
    workers: int,
    limit: int | None = None,
    samples: int | None = None,
    on_answers: Callable[[Batch, list[Answer]], None] | None = None,
    stop: StopSignals | None = None,
    report: Callable[[str], None] | None = None,
) -> tuple[dict[str, float], Metric]:
    """Evaluate every sample of `split` once; returns the metric's numbers, equal on all ranks, and the metric.

    `batch_size` is in the unit of `data.batch_size` (samples, or tokens with padding). `limit` is for a trial that only
    looks for errors: evaluation stops after `limit` batches (of all ranks together), and the dict of numbers is empty.
    With `samples`, only that many samples of the split are evaluated, the same ones in every call. `on_answers`
    receives each batch of this rank with its answers before the metric does. `report` receives a line on the progress
    once a minute. A rank that received a signal (`stop`) skips its remaining batches; all ranks then raise Stopped. All
    ranks evaluate with the model buffers of rank 0, because checkpoints hold those.
    """
    metric = task.metric(split)
    count = data.count(split)
    if samples is not None and samples < count:
        _restrict(metric, samples)
        count = samples
    distributed.broadcast_buffers(model)
    training = model.training
    model.eval()
    batches = batching.evaluation(
        data,
        split,
        batch_size=batch_size,
        rank=distributed.rank(),
        world=distributed.world_size(),
        workers=workers,
        limit=limit,
        samples=samples,
    )
    evaluated, reported = 0, time.monotonic()
    try:
        with distributed.unsharded(model):
            for batch in batches:
                if stop is not None and stop.received:
                    break
                with memory.report_out_of_memory(f"The evaluation of {split}", batch, device, memory.EVALUATION_ADVICE):
                    on_device = devices.to_device(batch, device)
                    with devices.autocast(device, precision):
                        answers = answers_of(task, model, on_device)
                if on_answers is not None:
                    on_answers(batch, answers)
                metric.update(batch, answers)
                evaluated += len(batch["ids"]) * distributed.world_size()
                if report is not None and time.monotonic() - reported > REPORT_SECONDS:
                    reported = time.monotonic()
                    report(f"evaluating {split}: about {min(evaluated, count):,} of {count:,} samples")
    finally:
        model.train(training)
    if stop is not None and stop.requested():
        raise stop.stopped_error(f"during the evaluation of {split}")
    if limit is not None:
        return {}, metric
    metric.gather()
    return metric.compute(), metric


def _restrict(metric: Metric, count: int) -> None:
    """Tell the metric that only `count` samples are evaluated; raises UserError if it has no method `restrict`."""
    restrict = getattr(metric, "restrict", None)
    if restrict is None:
        raise UserError(
            f"trainer.eval_samples={count}: {type(metric).__name__} has no method restrict(count), so it takes only "
            "whole splits; give null."
        )
    restrict(count)
