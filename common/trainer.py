"""The training loop, for any task: steps, logs, checkpoints, evaluation, and the numbers at the end."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common import data as batching
from common import device as devices
from common import distributed, optim
from common.checkpoint import Folder
from common.ema import Average
from common.errors import UserError
from common.evaluator import evaluate
from common.log import Log
from common.optim import OptimizerOptions, ScheduleOptions
from common.randomness import mix
from common.step import Stepper
from common.task import Answer, Batch, Data, Metric, Split, Task
from common.types import Count, Fraction, Positive, PositiveFloat

TRIAL_BATCHES = 2  # evaluated before the first step, so that a mistake there shows at once
QUIET_STEPS = 300  # before which no alarm is raised: a model that has hardly begun always looks broken
PICTURES = 8  # validation samples whose answers go to TensorBoard


@dataclass(kw_only=True)
class Run:
    """What a run is made of, and where it stands."""

    task: Task
    data: Data
    model: nn.Module
    optimizer: OptimizerOptions
    schedule: ScheduleOptions
    config: dict[str, Any]  # kept in the checkpoint, to build the same again
    seed: int
    folder: Path
    pretrained: bool = False  # whether the model starts from weights that were learnt
    step: int = 0  # steps taken
    best: float | None = None  # the goal's best value on val so far
    window: dict[str, Tensor] = field(default_factory=dict)  # sums of what steps gave since the last log line
    window_steps: int = 0
    said: list[str] = field(default_factory=list)  # alarms, each once


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
    ):
        self.steps, self.epochs = steps, epochs
        self.micro_batch = micro_batch
        self.precision = precision
        self.clip_norm = clip_norm
        self.ema_decay = ema_decay
        self.compile = compile
        self.workers = workers
        self.device = device
        self.log_every, self.eval_every, self.save_every = log_every, eval_every, save_every

    def fit(self, run: Run, log: Log, *, on: torch.device, resume: bool) -> dict[str, float]:
        """Train `run` to its end and return the final numbers: the goal's best on val, and all of test.

        Raises UserError when a loss or gradient is not finite, or when a sample cannot be read.
        """
        order = batching.Order(run.data.cost("train"), run.data.batch_size, run.seed)
        per_epoch = len(order.epoch(0))
        total = self.steps or order.steps(self.epochs or 1)
        run.model.to(on)
        options = optim.for_batch(run.optimizer, run.data.batch_size)
        optimizer = optim.build(run.model, options)
        average = Average(run.model, self.ema_decay) if self.ema_decay else None
        stepper = Stepper(run.task, run.model, optimizer, on, self.precision, self.clip_norm)
        folder = Folder(run.folder / "checkpoints", writes=distributed.is_main())
        evaluates = self.eval_every or per_epoch
        if resume:
            _resume(run, stepper, average, folder, log)
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
                _add(run, stepper(micro_batches, run.step))
                run.step += 1
                if average is not None:
                    average.update(run.model)
                progress.advance(run.step)
                if run.step % self.log_every == 0 or run.step == total:
                    speed = run.data.batch_size * run.window_steps / (time.monotonic() - clock)
                    rate = options.lr * optim.rate(run.schedule, run.step - 1, total)
                    extra = {"train/lr": rate, "train/epoch": epoch}
                    log.numbers(run.step, {**_close(run), **extra}, {"samples_per_s": speed})
                    clock = time.monotonic()
                due = run.step % evaluates == 0 or run.step == total
                if due or (self.save_every and run.step % self.save_every == 0):
                    log.flush()
                    folder.save(run.step, _content(run, stepper, average))
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
            f"rate      {options.lr:.3g} at its highest"
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

    def _finish(self, run: Run, folder: Folder, log: Log, on: torch.device) -> dict[str, float]:
        """Evaluate test, once, on the best weights of the run (the last ones when there was no val)."""
        distributed.barrier()  # rank 0 may still be writing
        kept = folder.best() or folder.latest(log.warning)
        assert kept is not None, "the last step always leaves a checkpoint"
        path, content = kept
        run.model.load_state_dict(weights(content))
        numbers = {} if run.best is None else {f"val/{run.task.goal.name}": run.best}
        if run.data.count("test"):
            scores, metric = self._evaluate(run, "test", on)
            tested = {f"test/{name}": number for name, number in scores.items()}
            log.numbers(run.step, tested)
            numbers = {**tested, **numbers}
            if distributed.is_main():
                metric.write(run.folder / "predictions")
        log.say(f"weights   {describe(path, content)}")
        return numbers


def weights(content: dict[str, Any], kind: str = "auto") -> dict[str, Tensor]:
    """A checkpoint's averaged weights when it has them (auto, ema), or those of the last update (raw).

    Raises UserError when averaged weights are asked for and the run kept none.
    """
    if kind == "ema" and content["average"] is None:
        raise UserError("weights=ema, but this checkpoint's run kept no average (trainer.ema_decay was 0); use raw.")
    return content["model"] if kind == "raw" or content["average"] is None else content["average"]["weights"]


def describe(path: Path, content: dict[str, Any], kind: str = "auto") -> str:
    """Which weights of which file: shown beside every number."""
    averaged = kind != "raw" and content["average"] is not None
    return f"{path}: step {content['step']}, {'averaged (EMA)' if averaged else 'raw'}"


def _content(run: Run, stepper: Stepper, average: Average | None) -> dict[str, Any]:
    """All that a checkpoint holds, in plain types."""
    return {
        "step": run.step,
        "best": run.best,
        "model": run.model.state_dict(),
        "average": average.state_dict() if average else None,
        "optimizer": optim.state(stepper.optimizer),
        "scaler": stepper.scaler.state_dict(),
        "overflows": stepper.overflows,
        "window": _summed(run.window),
        "window_steps": run.window_steps,
        "task": run.task.state(),
        "config": run.config,
    }


def _resume(run: Run, stepper: Stepper, average: Average | None, folder: Folder, log: Log) -> None:
    """Take up the newest whole checkpoint, and forget what was logged after it; without any, start."""
    found = folder.latest(log.warning)
    log.cut_back(found[1]["step"] if found else 0, evaluated=False)
    if found is None:
        return
    content = found[1]
    _refuse_changes(content["config"], run.config, found[0])
    run.step, run.best, run.window_steps = content["step"], content["best"], content["window_steps"]
    if distributed.is_main():  # the sums are of all ranks
        run.window = {name: torch.tensor(value) for name, value in content["window"].items()}
    run.model.load_state_dict(content["model"])
    optim.restore(stepper.optimizer, content["optimizer"])
    stepper.scaler.load_state_dict(content["scaler"])
    stepper.overflows = content["overflows"]
    if average is not None:
        average.load_state_dict(content["average"])


FREE = ("run_dir", "resume", "trust", "checkpoint", *(f"trainer.{key}" for key in
        ("device", "workers", "compile", "micro_batch", "log_every", "eval_every", "save_every")))  # fmt: skip


def _refuse_changes(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Raise UserError when going on from `path` would not be the same run; keys in FREE may differ."""
    old, new = _flat(before), _flat(now)
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key) and key not in FREE]
    if changed:
        listed = ", ".join(f"{key} was {old.get(key)} and is {new.get(key)}" for key in changed)
        raise UserError(
            f"{path} is of another run than this one would be: {listed}; go on with what was, or start a new run from "
            f"these weights with another run_dir and checkpoint={path}."
        )


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, dict):
        return {prefix: config}
    return {
        k: v for key, value in config.items() for k, v in _flat(value, f"{prefix}.{key}" if prefix else key).items()
    }


def _add(run: Run, parts: dict[str, Tensor]) -> None:
    """Keep sums on the device: reading a value there would wait for the step."""
    for name, value in parts.items():
        run.window[name] = run.window[name] + value if name in run.window else value
    run.window_steps += 1


def _close(run: Run) -> dict[str, float]:
    """Means over the window's steps of what the ranks' shares add up to; starts the next window."""
    means = {f"train/{name}": value / run.window_steps for name, value in _summed(run.window).items()}
    run.window, run.window_steps = {}, 0
    return means


def _summed(window: dict[str, Tensor]) -> dict[str, float]:
    """What the ranks' shares add up to."""
    shares = distributed.gather({name: float(value) for name, value in window.items()})
    names = dict.fromkeys(name for share in shares for name in share)
    return {name: sum(share.get(name, 0.0) for share in shares) for name in names}
