"""The state of a run, the content of its checkpoints, and resuming a run from a checkpoint."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.config.diff import CHANGEABLE_KEYS, differences, flatten, refuse_changes
from common.errors import UserError
from common.files.content import TO_RESTORE, resume_mistake
from common.files.log import Log
from common.files.retention import CheckpointFolder
from common.machine import distributed
from common.task import Data, Task
from common.train import data_identity, optim, teacher
from common.train.data_identity import Fingerprints
from common.train.ema import Average
from common.train.optim import OptimizerOptions, ScheduleOptions
from common.train.step import Stepper
from common.weights import values


@dataclass(kw_only=True)
class Run:
    """The objects of a training run (task, data, model and options), and its progress.

    The goal is the metric on val that selects the best checkpoint (`common.task.Goal`).
    """

    task: Task
    data: Data
    model: nn.Module
    optimizer: OptimizerOptions
    schedule: ScheduleOptions
    config: dict[str, Any]  # stored in each checkpoint, to rebuild task and model from it
    seed: int
    folder: Path
    pretrained: bool = False  # whether any part of the model starts from trained weights
    fingerprints: Fingerprints = field(default_factory=dict)  # digests of the data, compared on resuming
    step: int = 0  # optimizer steps taken so far
    ranking: list[tuple[float, int]] = field(default_factory=list)  # (goal's value on val, step), best first
    evaluations_since_best: int = 0  # evaluations on val since the goal last improved
    # This rank's sums of the loss, its parts and the gradient norm over the steps since the last log line.
    sums: dict[str, Tensor] = field(default_factory=dict)
    summed_steps: int = 0  # number of steps in `sums`
    alarms: list[str] = field(default_factory=list)  # the warnings of `Task.alarms` so far; each is logged once
    evaluation_lost: bool = False  # whether resuming removed the evaluation after step `step` from the log

    @property
    def best(self) -> float | None:
        """The goal's best value on val so far; None before the first value."""
        return self.ranking[0][0] if self.ranking else None

    def rank_in(self, score: float, keep: int) -> bool:
        """Insert the current step's `score` into the ranking of the best `keep` steps; returns whether it is the best.

        If two scores are equal, the earlier step ranks higher. An undefined score (`Goal.is_defined`) is not inserted.
        """
        if not self.task.goal.is_defined(score):
            return False
        better = self.task.goal.better
        index = next((i for i, (old, _) in enumerate(self.ranking) if better(score, old)), len(self.ranking))
        self.ranking.insert(index, (score, self.step))
        del self.ranking[keep:]
        return index == 0


def start_summary(run: Run, options: OptimizerOptions, device: str, precision: str, total: int, per_epoch: int) -> str:
    """Return the lines that a run prints at its start.

    `options.lr` is the learning rate after scaling to the batch size. `total` is the number of optimizer steps of the
    run, and `per_epoch` that of an epoch.
    """
    count = sum(p.numel() for p in run.model.parameters())
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    ranks, batch = distributed.world_size(), run.optimizer.reference_batch
    scaled = f", {run.optimizer.scaling} scaling of {run.optimizer.lr:g} for a batch of {batch}" if batch else ""
    lines = [
        f"model     {type(run.model).__name__}, {count:,} parameters, {trained:,} trainable",
        *(f"model     {line}" for line in getattr(run.model, "input_summary", list)()),
        *teacher.summary(run.task, precision),
        *(f"data      {line}" for line in run.data.summary()),
        f"device    {device}, {precision}" + (f", {ranks} processes" if ranks > 1 else ""),
        f"steps     {total:,} of {run.data.batch_size:,} {batch_unit(run.data)} each, {per_epoch:,} per epoch"
        + (f", resuming at {run.step:,}" if run.step else ""),
        *_per_micro_batch(run),
        f"rate      {options.lr * optim.peak_rate_factor(run.schedule, total):.3g} at its peak{scaled}",
        f"folder    {run.folder}  (to resume after a stop: the same command with run_dir={run.folder} resume=auto)",
    ]
    return "\n".join(lines)


def batch_unit(data: Data) -> str:
    """The unit of `data.batch_size`; see `OptionalData.batch_unit`."""
    unit: str = getattr(data, "batch_unit", "samples")
    return unit


def _per_micro_batch(run: Run) -> list[str]:
    """Return a list with one line that names the modules and loss terms that depend on the split into micro-batches.

    The list is empty if there are no such modules and loss terms.
    """
    layers = sum(isinstance(module, _BatchNorm) and module.training for module in run.model.modules())
    names = [f"BatchNorm ({layers} {'layer' if layers == 1 else 'layers'})"] if layers else []
    names += [name for part in (run.model, run.task) for name in getattr(part, "per_micro_batch", ())]
    depends = "a step depends on trainer.micro_batch and on the number of processes"
    return [f"per micro-batch: {', '.join(names)}: {depends}"] if names else []


def select_weights(content: dict[str, Any], kind: str = "auto") -> dict[str, Tensor]:
    """Return a checkpoint's weights of the given `kind`.

    "ema" selects the EMA weights, "raw" the weights of the last update, and "auto" the EMA weights if there are any,
    otherwise the raw ones. Raises UserError for "ema" when the checkpoint holds no EMA weights, or is an average of
    checkpoints.
    """
    if kind == "ema" and content.get("mean"):
        raise UserError("weights=ema, but this file holds one set of weights, a mean of steps; leave weights= out.")
    if kind == "ema" and content["average"] is None:
        raise UserError("weights=ema, but this checkpoint's run kept no average (trainer.ema_decay was 0); use raw.")
    tensors = content["model"] if kind == "raw" or content["average"] is None else content["average"]["weights"]
    return dict(tensors)


def describe(path: Path, content: dict[str, Any], kind: str = "auto") -> str:
    """Describe a checkpoint for the log: its file, its step, and whether the weights are averaged (EMA) or raw."""
    averaged = kind != "raw" and content["average"] is not None
    step = f"step {content['step']}"
    if mean := content.get("mean"):  # only files of averaging.py have this key
        step, averaged = f"average of steps {', '.join(map(str, mean['steps']))}", mean["ema"]
    return f"{path}: {step}, {'averaged (EMA)' if averaged else 'raw'}"


def checkpoint_content(
    run: Run, stepper: Stepper, average: Average | None, line_counts: dict[str, int]
) -> dict[str, Any]:
    """Return the content of a checkpoint, in plain types and tensors. This is a collective: all ranks must call it.

    The model's persistent buffers are first copied from rank 0 to all ranks. `line_counts` are the numbers of lines in
    the log's files (`Log.line_counts`).
    """
    distributed.broadcast_buffers(run.model)
    return {
        "step": run.step,
        "best": run.best,
        "ranking": [[score, step] for score, step in run.ranking],
        "evaluations_since_best": run.evaluations_since_best,
        "model": distributed.full_tensors(run.model.state_dict()),
        "average": average.state_dict() if average else None,
        "optimizer": optim.state(stepper.optimizer),
        "scaler": stepper.scaler.state_dict(),
        "overflows": stepper.overflows,
        "windows": distributed.gather({name: value.cpu() for name, value in run.sums.items()}),
        "window_steps": run.summed_steps,
        "said": list(run.alarms),
        "lines": dict(line_counts),
        "task": run.task.state(),
        "samples": run.data.count("train"),
        "fingerprints": run.fingerprints,
        "teacher": teacher.digest_of(run.task),
        "config": run.config,
    }


def resume_run(run: Run, stepper: Stepper, average: Average | None, folder: CheckpointFolder, log: Log) -> None:
    """Load the newest undamaged checkpoint of this run, and remove the log's lines after its step.

    A run without a checkpoint starts at step 0. Config, model and data are checked before the run or its log is
    changed. Raises UserError when the checkpoint is of another run or other data, when ranks find different
    checkpoints, when all checkpoints are damaged, or when checkpoints were written but none is left.
    """
    latest = folder.latest(log.warning, lambda path, content: _refuse_other_run(run, stepper, path, content))
    step = latest[1]["step"] if latest else 0
    if len({*distributed.gather(step)}) > 1:
        raise UserError(f"the processes see different checkpoints in {folder.path}; all machines must share it.")
    if latest is None:
        _restart(run, folder, log)
        return
    path, content = latest
    allowed = run.config.get("allow_changes") or []
    paths = data_identity.recognised_paths(run.data, content)
    changed_data = _refuse_other_data(run, content, path, allowed)
    changed_teacher = teacher.refuse_other(run.task, content, path, allowed)
    if paths and not changed_data and (moved := data_identity.moved_paths(content["config"], run.config)):
        log.info(f"data      the same as before, elsewhere: {', '.join(moved)}")
    ignore = CHANGEABLE_KEYS if changed_data else (*CHANGEABLE_KEYS, *paths)
    if changed := differences(content["config"], run.config, ignore=ignore) + changed_data + changed_teacher:
        log.warning(f"Resuming with allowed changes: {', '.join(changed)}; an uninterrupted run would differ.")
    for other in folder.set_aside():
        log.info(f"The checkpoint of another run is now {other}.")
    run.evaluation_lost = distributed.broadcast(
        log.truncate_after(step, evaluated=False, expected=content.get("lines"))
    )
    run.step, run.summed_steps = content["step"], content["window_steps"]
    run.ranking = [entry for entry in _ranking(content) if run.task.goal.is_defined(entry[0])]
    run.evaluations_since_best = content.get("evaluations_since_best", 0)  # files of earlier versions lack it
    run.alarms = list(content.get("said", []))
    run.sums = _sums_of_this_rank(content)
    distributed.load_state_dict(run.model, content["model"])
    optim.restore(stepper.optimizer, content["optimizer"])
    if content["scaler"]:  # empty unless the precision is fp16
        stepper.scaler.load_state_dict(content["scaler"])
    stepper.overflows = content["overflows"]
    if average is not None:  # if the file has no average, the average starts from the file's weights
        average.load_state_dict(content["average"] or {"updates": 0, "weights": content["model"]})


def _restart(run: Run, folder: CheckpointFolder, log: Log) -> None:
    """Start a run that has no checkpoint at step 0; raises UserError if checkpoints were written but are missing."""
    if folder.was_written():
        raise UserError(
            f"{folder.path} holds no checkpoint, although some were written; put one there, or start a new run in "
            "another run_dir."
        )
    if (run.folder / "metrics.jsonl").exists():
        log.warning("The run ended before its first checkpoint, and starts again at step 0.")
    log.truncate_after(0, evaluated=False)


def _refuse_other_run(run: Run, stepper: Stepper, path: Path, content: dict[str, Any]) -> None:
    """Raise UserError when a checkpoint is of another config or model than the run, or lacks what resuming needs.

    Config keys that may change on resuming are not compared. Also raises UserError when the step in the file's name is
    not the step in its content.
    """
    if mistake := resume_mistake(content):
        raise UserError(f"{path} cannot be resumed from: {mistake}; start a new run with checkpoint={path}.")
    if int(path.stem.rpartition("_")[2]) != content["step"]:
        raise UserError(f"{path} holds step {content['step']}, which its name denies; it was altered or renamed.")
    allowed = run.config.get("allow_changes") or []
    paths = data_identity.recognised_paths(run.data, content)
    refuse_changes(content["config"], run.config, f"{path}", [*allowed, *paths])
    _refuse_other_weights(run, content, path)
    if content["step"] > content["overflows"]:  # at least one update was made
        former = flatten(content["config"])
        keeps_none = former.get("optimizer.name") == "sgd" and not former.get("optimizer.momentum")
        optim.refuse_incomplete(stepper.optimizer, content["optimizer"], path, may_be_empty=keeps_none)


def refuse_as_best(run: Run, path: Path, content: dict[str, Any]) -> None:
    """Raise UserError when a checkpoint is incomplete, of another model, or of a step that is not among the best."""
    if missing := [name for name in TO_RESTORE if name not in content]:
        raise UserError(f"{path} cannot be tested: {missing[0]} is missing.")
    _refuse_other_weights(run, content, path)
    ranked = [step for _, step in run.ranking]
    if not {content["step"], 0} & {*ranked}:  # 0 is an unknown step, see _ranking
        raise UserError(f"{path} is of step {content['step']}, which is not among the best ({ranked}).")


def _refuse_other_weights(run: Run, content: dict[str, Any], path: Path) -> None:
    """Raise UserError when a checkpoint's weights differ from the model's in names, shapes or kinds of numbers.

    `values.refuse_other_kinds` compares the kinds of numbers.
    """
    stored = {name: tuple(tensor.shape) for name, tensor in content["model"].items()}
    ours = {name: tuple(tensor.shape) for name, tensor in run.model.state_dict().items()}
    if name := next((name for name in {**stored, **ours} if stored.get(name) != ours.get(name)), None):
        raise UserError(
            f"{path} holds the weights of another model: {name} is {stored.get(name, 'missing')} in the file and "
            f"{ours.get(name, 'missing')} in this run; restore the config, or start a new run with checkpoint={path}."
        )
    for tensors in (content["model"], (content["average"] or {}).get("weights", {})):
        values.refuse_other_kinds(run.model, tensors, path)


def _refuse_other_data(run: Run, content: dict[str, Any], path: Path, allowed: list[str]) -> list[str]:
    """Raise UserError when the run's data differ from those of the checkpoint, unless `allowed` permits the change.

    `allowed` is the list of keys in the config's `allow_changes`. Returns a description of each permitted change.
    """
    sections = {key.split(".")[0] for key in allowed}
    changed = data_identity.changes(content.get("fingerprints") or {}, run.fingerprints)
    if "data" in sections:
        return changed
    count, expected = run.data.count("train"), content.get("samples")
    reason = "; ".join(changed)
    if "task" not in sections and content["task"] != run.task.state():
        reason = "its classes or tokens differ"
    if "task" not in sections and expected not in (None, count):
        reason = f"train has {count} samples and had {expected}"
    if reason:
        raise UserError(
            f"the data are not those that {path} was trained on: {reason}; put them back, or give allow_changes=[data]."
        )
    return changed


def _ranking(content: dict[str, Any]) -> list[tuple[float, int]]:
    """Return the best scores in a checkpoint's `content` and their steps, best first.

    Files of earlier versions may hold undefined scores. Files from before 2026-11-21 hold only the best score, without
    its step; step 0 then stands for the unknown step.
    """
    entries = content.get("ranking", [] if content["best"] is None else [[content["best"], 0]])
    return [(score, step) for score, step in entries]


def _sums_of_this_rank(content: dict[str, Any]) -> dict[str, Tensor]:
    """Return the part of a checkpoint's sums (`Run.sums`) with which this rank continues.

    These are the rank's own sums. But if the number of ranks has changed, rank 0 gets the sums over all former ranks,
    and the other ranks get none.
    """
    sums = content.get("windows") or [{name: torch.as_tensor(value) for name, value in content["window"].items()}]
    if len(sums) == distributed.world_size():
        return dict(sums[distributed.rank()])
    return {name: torch.tensor(value) for name, value in _total(sums).items()} if distributed.is_main() else {}


def accumulate(run: Run, parts: dict[str, Tensor]) -> None:
    """Add a step's `parts` to the run's sums.

    `parts` holds the loss, its parts and the gradient norm by name. The sums stay on the device, because copying a
    value to the host would wait until the device has finished the step.
    """
    for name, value in parts.items():
        run.sums[name] = run.sums[name] + value if name in run.sums else value
    run.summed_steps += 1


def take_means(run: Run) -> dict[str, float]:
    """Return the mean of each part over the steps since the last log line, and reset the sums.

    A part's value in one step is the sum of the values of all ranks, so this is a collective: all ranks must call it.
    """
    shares = distributed.gather({name: value.cpu() for name, value in run.sums.items()})
    means = {f"train/{name}": value / run.summed_steps for name, value in _total(shares).items()}
    run.sums, run.summed_steps = {}, 0
    return means


def _total(shares: list[dict[str, Tensor]]) -> dict[str, float]:
    """Return the sum of each value over the ranks, by name."""
    names = dict.fromkeys(name for share in shares for name in share)
    return {name: sum(float(share[name]) for share in shares if name in share) for name in names}
