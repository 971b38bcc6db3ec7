"""The training loop, for any task: steps, logs, checkpoints, evaluation, and the numbers at the end."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from common import averaging, checkpoint, distributed, optim
from common import data as batching
from common import device as devices
from common.ema import Average
from common.errors import UserError
from common.evaluator import evaluate
from common.folder import Folder
from common.log import Log
from common.optim import OptimizerOptions
from common.randomness import mix
from common.run import Run, add, close_window, content_of, describe, go_on, weights
from common.step import Stepper
from common.task import Answer, Batch, Metric, Split
from common.types import Count, Fraction, Positive, PositiveFloat

TRIAL_BATCHES = 2  # evaluated before the first step, so that a mistake there shows at once
QUIET_STEPS = 300  # before which no alarm is raised: a model that has hardly begun always looks broken
PICTURES = 8  # validation samples whose answers go to TensorBoard


class Trainer:
    """How long, how often and on what; configs/trainer/default.yaml explains every key."""

    def __init__(
        self,
        *,
        steps: Positive | None,
        epochs: Positive | None,
        micro_batch: Positive | None,
        precision: Literal["fp32", "bf16", "fp16"],
        clip_norm: PositiveFloat | None,
        ema_decay: Fraction,
        compile: bool,
        workers: Count,
        device: Literal["auto", "cpu", "cuda", "mps"],
        log_every: Positive,
        eval_every: Positive | None,
        save_every: Positive | None,
        average_last: Count,
    ):
        if average_last == 1:
            raise UserError("trainer.average_last=1: one checkpoint has no average; give 0 for none, or at least 2.")
        self.steps, self.epochs = steps, epochs
        self.micro_batch = micro_batch
        self.precision = precision
        self.clip_norm = clip_norm
        self.ema_decay = ema_decay
        self.compile = compile
        self.workers = workers
        self.device = device
        self.log_every, self.eval_every, self.save_every = log_every, eval_every, save_every
        self.average_last = average_last

    def fit(self, run: Run, log: Log, *, on: torch.device, resume: bool) -> dict[str, float | str]:
        """Train `run` to its end and return the final numbers: the goal's best on val, and all of test.

        With `average_last`, `weights` among them names the file that was tested, seen from the run's folder.

        Raises UserError when a loss or gradient is not finite, or when a sample cannot be read.
        """
        order = batching.Order(run.data.cost("train"), run.data.batch_size, run.seed)
        per_epoch = order.steps(1)
        total = self.steps or order.steps(self.epochs or 1)
        run.model.to(on)
        options = optim.for_batch(run.optimizer, run.data.batch_size)
        optimizer = optim.build(run.model, options)
        average = Average(run.model, self.ema_decay) if self.ema_decay else None
        stepper = Stepper(run.task, run.model, optimizer, on, self.precision, self.clip_norm)
        folder = Folder(run.folder / "checkpoints", distributed.is_main(), keep=self.average_last)
        evaluates = self.eval_every or per_epoch
        if resume:
            go_on(run, stepper, average, folder, log)
        self._introduce(run, options, log, on, total, per_epoch)
        if self.compile:
            run.model.compile()  # in place: the state dict keeps its names
        if run.step == 0:
            self._try_evaluation(run, on)
        elif run.step % evaluates == 0 or run.step == total:
            self._validate(run, average, folder, log, on)  # a kill may have come before it was done

        run.model.train()
        with log.progress(total, run.step) as progress:
            clock = time.monotonic()
            for epoch, micro_batches in self._steps(run, order, on, total):
                optim.set_rate(optimizer, optim.rate(run.schedule, run.step, total))
                torch.manual_seed(mix(run.seed, "model", run.step, distributed.rank()))
                add(run, stepper(micro_batches, run.step))
                run.step += 1
                if average is not None:
                    average.update(run.model)
                progress.advance(run.step)
                if run.step % self.log_every == 0 or run.step == total:
                    speed = run.data.batch_size * run.window_steps / (time.monotonic() - clock)
                    rate = options.lr * optim.rate(run.schedule, run.step - 1, total)
                    extra = {"train/lr": rate, "train/epoch": epoch}
                    log.numbers(run.step, {**close_window(run), **extra}, {"samples_per_s": speed})
                    clock = time.monotonic()
                due = run.step % evaluates == 0 or run.step == total
                if due or (self.save_every and run.step % self.save_every == 0):
                    log.flush()
                    folder.save(run.step, content_of(run, stepper, average))
                if due:
                    self._validate(run, average, folder, log, on)
        return self._finish(run, folder, log, on)

    def _steps(
        self, run: Run, order: batching.Order, on: torch.device, total: int
    ) -> Iterator[tuple[int, list[Batch]]]:
        steps = batching.steps(
            run.data,
            order,
            start=run.step,
            stop=total,
            micro_batch=self.micro_batch,
            rank=distributed.rank(),
            world=distributed.world_size(),
            workers=self.workers,
            pin=on.type == "cuda",
        )
        yield from steps

    def _evaluate(self, run: Run, split: Split, on: torch.device, **options: Any) -> tuple[dict[str, float], Metric]:
        return evaluate(
            run.task,
            run.data,
            run.model,
            split,
            device=on,
            precision=self.precision,
            batch_size=self.micro_batch or run.data.batch_size,
            workers=self.workers,
            **options,
        )

    def _introduce(
        self, run: Run, options: OptimizerOptions, log: Log, on: torch.device, total: int, per_epoch: int
    ) -> None:
        """Say what is about to run, and how to go on after a stop."""
        count = sum(p.numel() for p in run.model.parameters())
        trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        ranks = distributed.world_size()
        lines = [
            f"model     {type(run.model).__name__}, {count:,} parameters, {trained:,} of them trained",
            *(f"data      {line}" for line in run.data.summary()),
            f"device    {devices.describe(on)}, {self.precision}" + (f", {ranks} processes" if ranks > 1 else ""),
            f"steps     {total:,} of {run.data.batch_size} each, {per_epoch:,} an epoch"
            + (f", going on at {run.step:,}" if run.step else ""),
            f"rate      {options.lr * optim.highest(run.schedule, total):.3g} at its highest"
            + (
                f", from {run.optimizer.lr:g} for {run.optimizer.reference_batch} by {run.optimizer.scaling} scaling"
                if run.optimizer.reference_batch
                else ""
            ),
            f"folder    {run.folder}  (to go on after a stop: the same command with run_dir={run.folder} resume=auto)",
        ]
        log.say("\n".join(lines))
        for advice in run.task.advice(run.pretrained):
            log.warning(advice)

    def _try_evaluation(self, run: Run, on: torch.device) -> None:
        for split in ("val", "test"):
            if run.data.count(split):
                self._evaluate(run, split, on, limit=TRIAL_BATCHES)
                return

    def _validate(self, run: Run, average: Average | None, folder: Folder, log: Log, on: torch.device) -> None:
        """Evaluate val; keep the checkpoint just written if it is the best; show some answers."""
        if not run.data.count("val"):
            return
        shown: list[tuple[Batch, list[Answer]]] = []

        def keep_first(batch: Batch, answers: list[Answer]) -> None:
            if not shown:
                shown.append((batch, answers))

        weights: AbstractContextManager[None] = average.applied(run.model) if average else nullcontext()
        with weights:
            numbers, _ = self._evaluate(run, "val", on, seen=keep_first)
        if run.task.goal.better(numbers[run.task.goal.name], run.best):
            run.best = numbers[run.task.goal.name]
            folder.mark_best(run.step)
        log.numbers(run.step, {f"val/{name}": number for name, number in numbers.items()})
        for batch, answers in shown:
            log.pictures("val", run.task.pictures(batch, answers, PICTURES), run.step)
            new = [alarm for alarm in run.task.alarms(answers) if alarm not in run.said]
            for alarm in new if run.step >= QUIET_STEPS else []:
                log.warning(alarm)
                run.said.append(alarm)

    def _finish(self, run: Run, folder: Folder, log: Log, on: torch.device) -> dict[str, float | str]:
        """Evaluate test, once, on the best weights of the run (without val: on the average, or else the last ones)."""
        distributed.barrier()  # rank 0 may still be writing
        kept = self._average(run, folder, log, on) or folder.best() or folder.latest(log.warning)
        assert kept is not None, "the last step always leaves a checkpoint"
        path, content = kept
        run.model.load_state_dict(weights(content))
        numbers: dict[str, float | str] = {} if run.best is None else {f"val/{run.task.goal.name}": run.best}
        if self.average_last:
            numbers["weights"] = describe(path.relative_to(run.folder), content)
        if run.data.count("test"):
            scores, metric = self._evaluate(run, "test", on)
            tested = {f"test/{name}": number for name, number in scores.items()}
            log.numbers(run.step, tested)
            numbers = {**tested, **numbers}
            if distributed.is_main():
                metric.write(run.folder / "predictions")
        log.say(f"weights   {describe(path, content)}")
        return numbers

    def _average(self, run: Run, folder: Folder, log: Log, on: torch.device) -> tuple[Path, dict[str, Any]] | None:
        """Average the last checkpoints into average.pt; returned unless the best one of the run is better on val."""
        if not self.average_last or not self._write_average(folder, log):
            return None
        content = checkpoint.load(folder.average())
        run.model.load_state_dict(weights(content))
        if run.data.count("val"):
            numbers, _ = self._evaluate(run, "val", on)
            log.numbers(run.step, {f"average/{name}": number for name, number in numbers.items()})
            score = numbers[run.task.goal.name]
            if score != run.best and not run.task.goal.better(score, run.best):  # in this form for a score of nan
                return None
            run.best = score
        return folder.average(), content

    def _write_average(self, folder: Folder, log: Log) -> bool:
        """Whether there is an average of the checkpoints now; a file that cannot be read costs it, and no result."""
        written = False
        if distributed.is_main():
            try:
                checkpoint.save(folder.average(), averaging.average(folder.last(self.average_last)))
                written = True
            except UserError as error:
                log.warning(f"No average of the last checkpoints was made: {error}")
        return distributed.broadcast(written)  # rank 0's word reaches the others when the file is whole
