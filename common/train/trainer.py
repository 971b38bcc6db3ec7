"""The training loop for any task: it takes steps, logs, writes checkpoints, evaluates, and computes final numbers."""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch

from common.data import batching
from common.errors import UserError
from common.files.log import Log
from common.files.loggers import LoggerName
from common.files.retention import CheckpointFolder
from common.machine import device as devices
from common.machine import distributed
from common.machine.seeds import mix
from common.machine.signals import StopSignals
from common.task import Answer, Batch, Metric, Split
from common.train import final, optim
from common.train.data_identity import fingerprints_of
from common.train.ema import Average
from common.train.evaluator import evaluate
from common.train.optim import OptimizerOptions
from common.train.sparsity import Sparsifier, SparsityOptions
from common.train.state import (
    Run,
    accumulate,
    batch_unit,
    checkpoint_content,
    resume_run,
    start_summary,
    take_means,
)
from common.train.step import Stepper
from common.types import Count, Fraction, Positive, PositiveFloat, Range

TRIAL_BATCHES = 2  # evaluated before the first step, so that errors in evaluation appear at once
FIRST_ALARM_STEP = 300  # no warnings of `Task.alarms` before this step: early in training, all answers look broken
PICTURES = 8  # number of validation samples whose answers the loggers show


@dataclass
class _Context:
    """The objects that the training loop needs in addition to the run."""

    stepper: Stepper
    average: Average | None
    sparsifier: Sparsifier | None
    folder: CheckpointFolder
    log: Log
    stop: StopSignals
    device: torch.device


@dataclass(kw_only=True)
class Trainer:
    """The options of the training loop, and the loop itself; configs/trainer/default.yaml explains the options."""

    steps: Positive | None
    epochs: Positive | None
    micro_batch: Positive | None
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"]  # auto is resolved in common/train/assembly.py
    clip_norm: PositiveFloat | None
    ema_decay: Fraction
    compile: bool
    deterministic: bool
    strategy: Literal["ddp", "fsdp"]
    workers: Annotated[int, Range(low=0, high=1024)] | Literal["auto"]  # auto is resolved in the same file
    device: Literal["auto", "cpu", "cuda", "mps"]
    timeout: Positive
    grace: Annotated[float, Range(above=0.0, high=1e7)] | None
    log: list[LoggerName]
    log_every: Positive
    eval_every: Positive | None
    eval_samples: Positive | None
    save_every: Positive | None
    keep_best: Positive
    patience: Positive | None
    average_last: Count
    sparsity: SparsityOptions | None

    def __post_init__(self) -> None:
        if self.average_last == 1:
            raise UserError("trainer.average_last=1: one checkpoint has no average; give 0 for none, or at least 2.")
        if self.strategy == "fsdp" and self.precision == "fp16":
            raise UserError(
                "trainer.strategy=fsdp does not support trainer.precision=fp16, as ranks share no loss scale; use bf16."
            )
        if self.strategy == "fsdp" and self.sparsity is not None:
            raise UserError(
                "trainer.sparsity needs whole matrices, which trainer.strategy=fsdp divides; use trainer.strategy=ddp."
            )

    @property
    def worker_count(self) -> int:
        """The number of worker processes that load data for this process."""
        assert self.workers != "auto"
        return self.workers

    def fit(self, run: Run, log: Log, *, on: torch.device, resume: bool) -> dict[str, float | str]:
        """Train `run` to its end; returns the goal's best value on val and all metrics of test, by name.

        The goal is the metric that selects the best checkpoint. If `average_last` is above 0, the result also has the
        entry "weights", which describes the weights that were tested. See `final.final_numbers`.

        Raises UserError when a loss or gradient is not finite, a sample cannot be read, the last checkpoint cannot be
        written, or `patience` is set without a val split. After a signal during a step, the run completes the step,
        writes a checkpoint and raises Stopped. After a signal during an evaluation, it raises Stopped without another
        checkpoint.

        With `resume`, the run continues from its last checkpoint. The result is then bit for bit that of an
        uninterrupted run (on a GPU, if `deterministic`), because data and dropout depend only on the seed, the step and
        the rank.
        """
        order = batching.Order(run.data.cost("train"), run.data.batch_size, run.seed)
        total = self.steps or order.steps(self.epochs or 1)
        run.model.to(on)
        if self.strategy == "fsdp":
            optim.refuse_sharding(run.optimizer)
            if reason := getattr(run.model, "unshardable", None):
                raise UserError(f"trainer.strategy=fsdp: {reason}; use trainer.strategy=ddp.")
            distributed.shard(run.model, on)
        if hasattr(run.task, "set_rate"):
            optim.refuse_scaled_steps(run.optimizer)
        options = optim.scale_to_batch(run.optimizer, run.data.batch_size)
        context = _Context(
            stepper=Stepper(run.task, run.model, optim.build(run.model, options), on, self.precision, self.clip_norm),
            average=Average(run.model, self.ema_decay) if self.ema_decay else None,
            sparsifier=Sparsifier(run.model, self.sparsity, total) if self.sparsity else None,
            folder=CheckpointFolder(run.folder / "checkpoints", distributed.is_main(), keep=self.average_last),
            log=log,
            stop=StopSignals(self.grace),
            device=on,
        )
        if self.patience and not run.data.count("val"):
            raise UserError(f"trainer.patience={self.patience} needs a val split, and the data have none; give null.")
        with context.stop:
            run.fingerprints = fingerprints_of(run.data)
            if resume:
                resume_run(run, context.stepper, context.average, context.folder, log)
            else:
                log.truncate_after(0)  # removes the lines of an earlier start that failed
            run.model.train()
            where = f"{devices.describe(on)}, {self.worker_count} workers"
            log.info(start_summary(run, options, where, self.precision, total, order.steps(1)))
            if self._evaluates_part(run):
                log.info(f"val       {self._evaluated_part(run)}")
            if context.sparsifier is not None:
                log.info(f"sparsity  {context.sparsifier.summary()}")
            for advice in [*getattr(run.model, "input_advice", list)(), *run.task.advice(run.pretrained)]:
                log.warning(advice)
            if self.compile:
                run.model.compile()  # in place: the state dict keeps its names
            if run.step == 0:
                self._try_evaluation(run, context)
            log.open_loggers(self.log, run.config)
            self._loop(run, context, order, options, total)
            distributed.barrier()  # rank 0 may still be writing
            evaluation = partial(self._evaluate, run, context)
            numbers = final.final_numbers(run, context.folder, log, evaluation, averaged=self.average_last)
            if f"val/{run.task.goal.name}" in numbers and self._evaluates_part(run):
                log.info(f"val/{run.task.goal.name} is that of {self._evaluated_part(run)}")
            return numbers

    def _loop(self, run: Run, context: _Context, order: batching.Order, options: OptimizerOptions, total: int) -> None:
        """Take the remaining steps. After each step, log, save and evaluate if due, and stop after a signal."""
        log, eval_every = context.log, self.eval_every or order.steps(1)
        if run.step and (run.evaluation_lost or run.step % eval_every == 0 or run.step == total):
            self._validate(run, context)  # the run may have been killed before or during this evaluation
            if self._ends_early(run, total):
                log.info(self._early_end(run, total))
                return
        self._show_best(run, log)
        with log.progress(total, run.step) as progress:
            clock = time.monotonic()
            for epoch, micro_batches in self._steps(run, order, context.device, total):
                factor = optim.rate_factor(run.schedule, run.step, total)
                optim.set_rate(context.stepper.optimizer, factor)
                if hasattr(run.task, "set_rate"):
                    run.task.set_rate(options.lr * factor)
                torch.manual_seed(mix(run.seed, "model", run.step, distributed.rank()))
                sparsifier = context.sparsifier
                with sparsifier.keeping_zeros(context.stepper.optimizer) if sparsifier else nullcontext():
                    accumulate(run, context.stepper(micro_batches, run.step))
                run.step += 1
                if sparsifier is not None:
                    sparsifier.increase(run.step)
                if context.average is not None:
                    context.average.update(run.model)
                    if sparsifier is not None:
                        sparsifier.apply_to(context.average.weights)
                progress.advance(run.step)
                last = run.step == total
                evaluates = run.step % eval_every == 0 or last
                saves = evaluates or (self.save_every is not None and run.step % self.save_every == 0)
                logs = run.step % self.log_every == 0 or last
                stopping = context.stop.requested()
                if logs or saves or stopping:
                    context.stepper.check_last_step()
                if logs:
                    speed = run.data.batch_size * run.summed_steps / (time.monotonic() - clock)
                    rate = options.lr * optim.rate_factor(run.schedule, run.step - 1, total)
                    extra = {"train/lr": rate, "train/epoch": epoch}
                    log.numbers(run.step, {**take_means(run), **extra}, {f"{batch_unit(run.data)}_per_s": speed})
                    clock = time.monotonic()
                if saves or stopping:
                    problem = self._save(run, context, regular=saves)
                if stopping:
                    outcome = "without a checkpoint of that step" if problem else "with a checkpoint"
                    raise context.stop.stopped_error(f"after step {run.step} of {total}, {outcome}")
                if last and problem:
                    raise self._unsaved_end(run, context, problem)
                if evaluates:
                    self._validate(run, context)
                    if self._ends_early(run, total):
                        if problem:
                            raise self._unsaved_end(run, context, problem)
                        log.info(self._early_end(run, total))
                        return

    def _ends_early(self, run: Run, total: int) -> bool:
        """Whether the run ends before step `total`, since the last `patience` evaluations did not improve the goal."""
        return self.patience is not None and run.evaluations_since_best >= self.patience and run.step < total

    def _early_end(self, run: Run, total: int) -> str:
        best = f"{run.best:.4f}" if run.best is not None else "no value"
        return (
            f"The run ends after step {run.step} of {total}: val/{run.task.goal.name} has not been better than {best} "
            f"for {run.evaluations_since_best} evaluations (trainer.patience={self.patience})."
        )

    def _unsaved_end(self, run: Run, context: _Context, problem: str) -> UserError:
        return UserError(
            f"the last checkpoint could not be written to {context.folder.path} ({problem}), and the final "
            f"numbers need it; make room, and repeat the command with run_dir={run.folder} resume=auto."
        )

    def _save(self, run: Run, context: _Context, regular: bool) -> str | None:
        """Write a checkpoint. If it cannot be written, warn and return the reason; otherwise return None.

        `regular` is False for a checkpoint that is written only because the run stops.
        """
        content = checkpoint_content(run, context.stepper, context.average, context.log.line_counts)
        problem: str | None = None
        try:
            context.log.flush()  # the log on disk must reach as far as the checkpoint
            if regular:
                only_best = self.keep_best == 1 and context.folder.has_best()  # best.pt keeps the best step
                ranked = [] if only_best else [step for _, step in run.ranking]
                context.folder.save(run.step, content, ranked)
            else:
                context.folder.save_stop(run.step, content)
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
        problem = distributed.broadcast(problem)  # only rank 0 writes
        if problem is not None:
            context.log.warning(f"The checkpoint of step {run.step} was not written ({problem}); older ones are kept.")
        return problem

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
            workers=self.worker_count,
            pin=on.type == "cuda",
            equal=self.strategy == "fsdp",
        )

    def _evaluate(self, run: Run, context: _Context, split: Split, **options: Any) -> tuple[dict[str, float], Metric]:
        return evaluate(
            run.task,
            run.data,
            run.model,
            split,
            device=context.device,
            precision=self.precision,
            batch_size=self.micro_batch or run.data.batch_size,
            workers=self.worker_count,
            stop=context.stop,
            samples=self.eval_samples if split == "val" else None,
            report=context.log.info,
            **options,
        )

    def _try_evaluation(self, run: Run, context: _Context) -> None:
        for split in ("val", "test"):
            if run.data.count(split):
                self._evaluate(run, context, split, limit=TRIAL_BATCHES)
                return

    def _validate(self, run: Run, context: _Context) -> None:
        """Evaluate val, rank this step's checkpoint, and log metrics, pictures of some answers and new warnings.

        The warnings are those of `Task.alarms`. With `sparsity`, a checkpoint before the last increase is not ranked.
        Without a val split, this does nothing.
        """
        if not run.data.count("val"):
            return
        first: list[tuple[Batch, list[Answer]]] = []

        def keep_first(batch: Batch, answers: list[Answer]) -> None:
            if not first:
                first.append((batch, answers))

        with context.average.applied(run.model) if context.average else nullcontext():
            numbers, _ = self._evaluate(run, context, "val", on_answers=keep_first)
        score = numbers.get(run.task.goal.name, math.nan)
        if context.sparsifier is None or context.sparsifier.is_complete(run.step):
            improved = run.task.goal.better(score, run.best)  # counts even if the checkpoint was not written
            run.evaluations_since_best = 0 if improved else run.evaluations_since_best + 1
            self._rank(run, context, score)
        self._show_best(run, context.log)
        context.log.numbers(run.step, {f"val/{name}": number for name, number in numbers.items()})
        final.warn_of_undefined(run, context.log, "val", score, "this checkpoint is not ranked")
        for batch, answers in first:
            context.log.pictures("val", run.task.pictures(batch, answers, PICTURES), run.step)
            new = [alarm for alarm in run.task.alarms(answers) if alarm not in run.alarms]
            for alarm in new if run.step >= FIRST_ALARM_STEP else []:
                context.log.warning(alarm)
                run.alarms.append(alarm)

    def _show_best(self, run: Run, log: Log) -> None:
        """Let the log's lines about training show the goal's best value, and its step if known (0 means unknown)."""
        if run.ranking:
            value, step = run.ranking[0]
            log.show_best(f"best val/{run.task.goal.name} {value:.4g}" + (f" at step {step}" if step else ""))

    def _rank(self, run: Run, context: _Context, score: float) -> None:
        """Insert this step's checkpoint, if it was written, into the ranking; if it is the best, make it best.pt."""
        written = distributed.broadcast(run.step in context.folder.steps())
        if written and run.rank_in(score, self.keep_best):
            try:
                context.folder.mark_best(run.step)
            except OSError as error:
                context.log.warning(f"best.pt was not written ({error.strerror}); the best step is {run.step}.")

    def _evaluates_part(self, run: Run) -> bool:
        """Whether evaluations during training use only a part of val (`eval_samples`)."""
        return self.eval_samples is not None and self.eval_samples < run.data.count("val")

    def _evaluated_part(self, run: Run) -> str:
        return (
            f"{self.eval_samples:,} of {run.data.count('val'):,} samples, always the same ones (trainer.eval_samples); "
            "evaluate.py split=val evaluates all"
        )
