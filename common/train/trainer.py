"""The training loop, for any task: steps, logs, checkpoints, evaluation, and the numbers at the end."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from common.data import batching
from common.errors import UserError
from common.files import checkpoint
from common.files.log import Log
from common.files.retention import Folder, Found
from common.machine import device as devices
from common.machine import distributed
from common.machine.seeds import mix
from common.machine.signals import Stop
from common.task import Answer, Batch, Metric, Split
from common.train import averaging, optim
from common.train.ema import Average
from common.train.evaluator import evaluate
from common.train.optim import OptimizerOptions
from common.train.state import (
    Run,
    accumulate,
    checkpoint_content,
    describe,
    resume_run,
    select_weights,
    start_summary,
    take_means,
)
from common.train.step import Stepper
from common.types import Count, Fraction, Positive, PositiveFloat

TRIAL_BATCHES = 2  # evaluated before the first step, so that a mistake there shows at once
QUIET_STEPS = 300  # before which no alarm is raised: a model that has hardly begun always looks broken
PICTURES = 8  # validation samples whose answers go to TensorBoard


@dataclass
class _Work:
    """What the loop works with, beside the run."""

    stepper: Stepper
    average: Average | None
    folder: Folder
    log: Log
    stop: Stop
    device: torch.device


@dataclass(kw_only=True)
class Trainer:
    """How long, how often and on what; configs/trainer/default.yaml explains every key."""

    steps: Positive | None
    epochs: Positive | None
    micro_batch: Positive | None
    precision: Literal["auto", "fp32", "bf16", "fp16"]  # auto: common/train/assembly.py has decided by the device
    clip_norm: PositiveFloat | None
    ema_decay: Fraction
    compile: bool
    deterministic: bool
    strategy: Literal["ddp", "fsdp"]
    workers: Count
    device: Literal["auto", "cpu", "cuda", "mps"]
    timeout: Positive
    log_every: Positive
    eval_every: Positive | None
    save_every: Positive | None
    keep_best: Positive
    average_last: Count

    def __post_init__(self) -> None:
        if self.average_last == 1:
            raise UserError("trainer.average_last=1: one checkpoint has no average; give 0 for none, or at least 2.")
        if self.strategy == "fsdp" and self.precision == "fp16":
            raise UserError(
                "trainer.strategy=fsdp does not know trainer.precision=fp16, whose scale is not shared; use bf16."
            )

    def fit(self, run: Run, log: Log, *, on: torch.device, resume: bool) -> dict[str, float | str]:
        """Train `run` to its end and return the final numbers: the goal's best on val, and all of test.

        With `average_last`, `weights` among them names the file that was tested, seen from the run's folder.

        Raises UserError when a loss or gradient is not finite, or when a sample cannot be read; and Stopped when a
        signal asks for it, after a checkpoint. Whatever ends it, `resume` goes on from the last checkpoint to the same
        end, bit for bit: data and dropout are functions of the seed and the step, and a checkpoint holds the rest.
        """
        order = batching.Order(run.data.cost("train"), run.data.batch_size, run.seed)
        total = self.steps or order.steps(self.epochs or 1)
        run.model.to(on)
        if self.strategy == "fsdp":
            distributed.shard(run.model, on)
        options = optim.scale_to_batch(run.optimizer, run.data.batch_size)
        work = _Work(
            stepper=Stepper(run.task, run.model, optim.build(run.model, options), on, self.precision, self.clip_norm),
            average=Average(run.model, self.ema_decay) if self.ema_decay else None,
            folder=Folder(run.folder / "checkpoints", distributed.is_main(), keep=self.average_last),
            log=log,
            stop=Stop(),
            device=on,
        )
        with work.stop:
            if resume:
                resume_run(run, work.stepper, work.average, work.folder, log)
            else:
                log.cut_back(0)  # what a start that came to nothing left
            run.model.train()
            log.say(start_summary(run, options, devices.describe(on), self.precision, total, order.steps(1)))
            for advice in run.task.advice(run.pretrained):
                log.warning(advice)
            if self.compile:
                run.model.compile()  # in place: the state dict keeps its names
            if run.step == 0:
                self._try_evaluation(run, work)
            self._loop(run, work, order, options, total)
            return self._finish(run, work)

    def _loop(self, run: Run, work: _Work, order: batching.Order, options: OptimizerOptions, total: int) -> None:
        """All steps that are left, with what comes after each of them: logs, a checkpoint, an evaluation, a stop."""
        log, evaluates = work.log, self.eval_every or order.steps(1)
        if run.step and (run.unjudged or run.step % evaluates == 0 or run.step == total):
            self._validate(run, work)  # a kill may have come before it was done
        with log.progress(total, run.step) as progress:
            clock = time.monotonic()
            for epoch, micro_batches in self._steps(run, order, work.device, total):
                optim.set_rate(work.stepper.optimizer, optim.rate_factor(run.schedule, run.step, total))
                torch.manual_seed(mix(run.seed, "model", run.step, distributed.rank()))
                accumulate(run, work.stepper(micro_batches, run.step))
                run.step += 1
                if work.average is not None:
                    work.average.update(run.model)
                progress.advance(run.step)
                last = run.step == total
                due = run.step % evaluates == 0 or last
                saves = due or (self.save_every is not None and run.step % self.save_every == 0)
                logs = run.step % self.log_every == 0 or last
                stopping = work.stop.agreed()
                if logs or saves or stopping:
                    work.stepper.check_last_step()
                if logs:
                    speed = run.data.batch_size * run.window_steps / (time.monotonic() - clock)
                    rate = options.lr * optim.rate_factor(run.schedule, run.step - 1, total)
                    extra = {"train/lr": rate, "train/epoch": epoch}
                    log.numbers(run.step, {**take_means(run), **extra}, {"samples_per_s": speed})
                    clock = time.monotonic()
                if saves or stopping:
                    saved = self._save(run, work, regular=saves)
                    if last and not saved:
                        raise UserError(
                            f"the last checkpoint is not in {work.folder.path}, and without it there are no numbers; "
                            "make room, and the same line with resume=auto goes on from the one before."
                        )
                if stopping:
                    how = "with a checkpoint" if saved else "without a checkpoint of that step"
                    raise work.stop.stopped(f"after step {run.step} of {total}, {how}")
                if due:
                    self._validate(run, work)

    def _save(self, run: Run, work: _Work, regular: bool) -> bool:
        """Write a checkpoint; a disk that is full, or a folder that cannot be written, costs it, and not the run."""
        content = checkpoint_content(run, work.stepper, work.average)
        problem = None
        try:
            work.log.flush()  # the checkpoint promises those lines
            if regular:
                alone = self.keep_best == 1 and work.folder.has_best()  # the one best is best.pt
                spare = [] if alone else [step for _, step in run.ranking]
                work.folder.save(run.step, content, spare)
            else:
                work.folder.save_stop(run.step, content)
        except OSError as error:
            problem = error.strerror or str(error)
        problem = distributed.broadcast(problem)  # rank 0 writes
        if problem is not None:
            work.log.warning(f"The checkpoint of step {run.step} was not written ({problem}); older ones stay.")
        return problem is None

    def _steps(
        self, run: Run, order: batching.Order, on: torch.device, total: int
    ) -> Iterator[tuple[int, list[Batch]]]:
        yield from batching.steps(
            run.data,
            order,
            start=run.step,
            stop=total,
            micro_batch=self.micro_batch,
            rank=distributed.rank(),
            world=distributed.world_size(),
            workers=self.workers,
            pin=on.type == "cuda",
            equal=self.strategy == "fsdp",
        )

    def _evaluate(self, run: Run, work: _Work, split: Split, **options: Any) -> tuple[dict[str, float], Metric]:
        return evaluate(
            run.task,
            run.data,
            run.model,
            split,
            device=work.device,
            precision=self.precision,
            batch_size=self.micro_batch or run.data.batch_size,
            workers=self.workers,
            stop=work.stop,
            **options,
        )

    def _try_evaluation(self, run: Run, work: _Work) -> None:
        for split in ("val", "test"):
            if run.data.count(split):
                self._evaluate(run, work, split, limit=TRIAL_BATCHES)
                return

    def _validate(self, run: Run, work: _Work) -> None:
        """Evaluate val; keep the checkpoint just written if it is the best; show some answers."""
        if not run.data.count("val"):
            return
        shown: list[tuple[Batch, list[Answer]]] = []

        def keep_first(batch: Batch, answers: list[Answer]) -> None:
            if not shown:
                shown.append((batch, answers))

        weights: AbstractContextManager[None] = work.average.applied(run.model) if work.average else nullcontext()
        with weights:
            numbers, _ = self._evaluate(run, work, "val", on_answers=keep_first)
        self._rank(run, work, numbers[run.task.goal.name])
        work.log.numbers(run.step, {f"val/{name}": number for name, number in numbers.items()})
        for batch, answers in shown:
            work.log.pictures("val", run.task.pictures(batch, answers, PICTURES), run.step)
            new = [alarm for alarm in run.task.alarms(answers) if alarm not in run.said]
            for alarm in new if run.step >= QUIET_STEPS else []:
                work.log.warning(alarm)
                run.said.append(alarm)

    def _rank(self, run: Run, work: _Work, score: float) -> None:
        """Give this step's checkpoint its place among the best; without a file on the disk it has none."""
        there = distributed.broadcast(run.step in work.folder.steps())
        if there and run.rank_in(score, self.keep_best):
            try:
                work.folder.mark_best(run.step)
            except OSError as error:
                work.log.warning(f"best.pt was not written ({error.strerror}); step {run.step} is the best one.")

    def _finish(self, run: Run, work: _Work) -> dict[str, float | str]:
        """Evaluate test, once, on the best weights of the run (without val: on the average, or else the last ones)."""
        distributed.barrier()  # rank 0 may still be writing
        folder, log, goal = work.folder, work.log, f"val/{run.task.goal.name}"
        ranked = [step for _, step in run.ranking]
        averaged, best = self._average(run, work)
        kept = averaged or folder.best(ranked, log.warning) or folder.latest(log.warning)
        assert kept is not None, "the last step always leaves a checkpoint"
        path, content = kept
        if not averaged and ranked and ranked[0] not in (content["step"], 0):  # 0: files of before, which do not tell
            log.warning(f"The best checkpoint on val, of step {ranked[0]}, is gone; {path.name} is tested instead.")
        distributed.load(run.model, select_weights(content))
        numbers: dict[str, float | str] = {} if best is None else {goal: best}
        if self.average_last:
            numbers["weights"] = describe(path.relative_to(run.folder), content)
        if run.data.count("test"):
            scores, metric = self._evaluate(run, work, "test")
            tested = {f"test/{name}": number for name, number in scores.items()}
            log.numbers(run.step, tested)
            numbers = {**tested, **numbers}
            if distributed.is_main():
                metric.write(run.folder / "predictions")
        log.say(f"weights   {describe(path, content)}")
        return numbers

    def _average(self, run: Run, work: _Work) -> tuple[Found | None, float | None]:
        """Average the last checkpoints into average.pt, unless the best one of the run is better on val.

        Returns that file if it is to be tested, and the goal's best value on val.
        """
        if not self.average_last or not self._write_average(work.folder, work.log):
            return None, run.best
        content = checkpoint.load(work.folder.average())
        distributed.load(run.model, select_weights(content))
        if not run.data.count("val"):
            return (work.folder.average(), content), None
        numbers, _ = self._evaluate(run, work, "val")
        work.log.numbers(run.step, {f"average/{name}": number for name, number in numbers.items()})
        score = numbers[run.task.goal.name]
        if score != run.best and not run.task.goal.better(score, run.best):  # in this form for a score of nan
            return None, run.best
        return (work.folder.average(), content), score

    def _write_average(self, folder: Folder, log: Log) -> bool:
        """Whether there is an average of the checkpoints now; a file that cannot be read costs it, and no result."""
        written = False
        if distributed.is_main():
            try:
                checkpoint.save(folder.average(), averaging.average(folder.last(self.average_last)))
                written = True
            except (UserError, OSError) as error:
                log.warning(f"No average of the last checkpoints was made: {error}")
        return bool(distributed.broadcast(written))  # rank 0's word reaches the others when the file is whole
