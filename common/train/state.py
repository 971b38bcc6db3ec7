"""What a run is made of and where it stands; what a checkpoint keeps of it, and going on from there."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.config.diff import FREE, differences, refuse_changes
from common.errors import UserError
from common.files.log import Log
from common.files.retention import Folder
from common.machine import distributed
from common.task import Data, Task
from common.train import optim
from common.train.ema import Average
from common.train.optim import OptimizerOptions, ScheduleOptions
from common.train.step import Stepper


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
    ranking: list[tuple[float, int]] = field(default_factory=list)  # the goal's best values on val, and their steps
    window: dict[str, Tensor] = field(default_factory=dict)  # sums of what steps gave since the last log line
    window_steps: int = 0
    said: list[str] = field(default_factory=list)  # alarms, each once
    unjudged: bool = False  # whether this step was evaluated, which going on has forgotten

    @property
    def best(self) -> float | None:
        """The goal's best value on val so far."""
        return self.ranking[0][0] if self.ranking else None

    def rank_in(self, score: float, keep: int) -> bool:
        """Put this step's `score` in its place among the best `keep`; whether that is the first one."""
        better = self.task.goal.better
        place = next((n for n, (old, _) in enumerate(self.ranking) if better(score, old)), len(self.ranking))
        self.ranking.insert(place, (score, self.step))
        del self.ranking[keep:]
        return place == 0


def start_summary(run: Run, options: OptimizerOptions, device: str, precision: str, total: int, per_epoch: int) -> str:
    """What is about to run, and how to resume after a stop; `options` hold the rate in effect."""
    count = sum(p.numel() for p in run.model.parameters())
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    ranks, batch = distributed.world_size(), run.optimizer.reference_batch
    scaled = f", from {run.optimizer.lr:g} for {batch} by {run.optimizer.scaling} scaling" if batch else ""
    lines = [
        f"model     {type(run.model).__name__}, {count:,} parameters, {trained:,} of them trained",
        *(f"data      {line}" for line in run.data.summary()),
        f"device    {device}, {precision}" + (f", {ranks} processes" if ranks > 1 else ""),
        f"steps     {total:,} of {run.data.batch_size} each, {per_epoch:,} an epoch"
        + (f", resuming at {run.step:,}" if run.step else ""),
        *_cut_dependent(run),
        f"rate      {options.lr * optim.peak_rate_factor(run.schedule, total):.3g} at its highest{scaled}",
        f"folder    {run.folder}  (to resume after a stop: the same command with run_dir={run.folder} resume=auto)",
    ]
    return "\n".join(lines)


def _cut_dependent(run: Run) -> list[str]:
    """A line on what keeps a step from being the same however it is cut; none for a run where nothing does."""
    layers = sum(isinstance(module, _BatchNorm) and module.training for module in run.model.modules())
    names = [f"BatchNorm ({layers} {'layer' if layers == 1 else 'layers'})"] if layers else []
    names += [name for part in (run.model, run.task) for name in getattr(part, "per_micro_batch", ())]
    depends = "a step depends on trainer.micro_batch and on the number of processes"
    return [f"per micro-batch: {', '.join(names)}: {depends}"] if names else []


def select_weights(content: dict[str, Any], kind: str = "auto") -> dict[str, Tensor]:
    """A checkpoint's averaged weights when it has them (auto, ema), or those of the last update (raw).

    Raises UserError when averaged weights are asked for and the run kept none.
    """
    if kind == "ema" and content.get("mean"):
        raise UserError("weights=ema, but this file holds one set of weights, an average of steps; leave weights= out.")
    if kind == "ema" and content["average"] is None:
        raise UserError("weights=ema, but this checkpoint's run kept no average (trainer.ema_decay was 0); use raw.")
    tensors = content["model"] if kind == "raw" or content["average"] is None else content["average"]["weights"]
    return dict(tensors)


def describe(path: Path, content: dict[str, Any], kind: str = "auto") -> str:
    """Which weights of which file: shown beside every number."""
    averaged = kind != "raw" and content["average"] is not None
    step = f"step {content['step']}"
    if mean := content.get("mean"):  # see averaging.py; no other file has this key
        step, averaged = f"average of steps {', '.join(map(str, mean['steps']))}", mean["ema"]
    return f"{path}: {step}, {'averaged (EMA)' if averaged else 'raw'}"


def checkpoint_content(run: Run, stepper: Stepper, average: Average | None) -> dict[str, Any]:
    """All that a checkpoint holds, in plain types; buffers are rank 0's, here and on all ranks from now on."""
    distributed.share_buffers(run.model)
    return {
        "step": run.step,
        "best": run.best,
        "ranking": [list(place) for place in run.ranking],
        "model": distributed.whole(run.model.state_dict()),
        "average": average.state_dict() if average else None,
        "optimizer": optim.state(stepper.optimizer),
        "scaler": stepper.scaler.state_dict(),
        "overflows": stepper.overflows,
        "windows": distributed.gather({name: value.cpu() for name, value in run.window.items()}),
        "window_steps": run.window_steps,
        "said": list(run.said),
        "task": run.task.state(),
        "samples": run.data.count("train"),
        "config": run.config,
    }


def resume_run(run: Run, stepper: Stepper, average: Average | None, folder: Folder, log: Log) -> None:
    """Take up the newest whole checkpoint, and forget what was logged after it; without any, start.

    All that is refused is refused before anything is changed. Raises UserError when the checkpoint is of another run or
    of other data, when ranks see different ones, and when checkpoints that were written are gone.
    """
    found = folder.latest(log.warning)
    step = found[1]["step"] if found else 0
    if len({*distributed.gather(step)}) > 1:
        raise UserError(f"the processes see different checkpoints in {folder.path}; all machines must share it.")
    if found is None:
        _start_again(run, folder, log)
        return
    path, content = found
    allowed = run.config.get("allow_changes") or []
    refuse_changes(content["config"], run.config, f"{path}", allowed)
    _refuse_others(run, content, path, allowed)
    if changed := differences(content["config"], run.config, but=FREE):
        log.warning(f"Going on, as allow_changes says, although {', '.join(changed)}: no run from the start is equal.")
    run.unjudged = distributed.broadcast(log.cut_back(step, evaluated=False))
    run.step, run.window_steps = content["step"], content["window_steps"]
    run.ranking = _ranking(content)
    run.said = list(content.get("said", []))
    run.window = _own_window(content)
    distributed.load(run.model, content["model"])
    optim.restore(stepper.optimizer, content["optimizer"])
    if content["scaler"]:  # that of fp16 alone
        stepper.scaler.load_state_dict(content["scaler"])
    stepper.overflows = content["overflows"]
    if average is not None:  # where there was none it begins now
        average.load_state_dict(content["average"] or {"updates": 0, "weights": content["model"]})


def _start_again(run: Run, folder: Folder, log: Log) -> None:
    """Begin a run that has no checkpoint; raises UserError when it had one."""
    if folder.was_written() or log.has_evaluations():  # the latter for runs of before 2026-11-21
        raise UserError(
            f"{folder.path} holds no checkpoint, although some were written; put one there, or start anew with another "
            "run_dir."
        )
    if (run.folder / "metrics.jsonl").exists():
        log.warning("The run ended before its first checkpoint, and starts again at step 0.")
    log.cut_back(0, evaluated=False)


def _refuse_others(run: Run, content: dict[str, Any], path: Path, allowed: list[str]) -> None:
    """Raise UserError when the data on the disk, or the weights, are not those of the checkpoint."""
    shapes = {name: tuple(tensor.shape) for name, tensor in content["model"].items()}
    other = {name: tuple(tensor.shape) for name, tensor in run.model.state_dict().items()}
    if wrong := next((name for name in {**shapes, **other} if shapes.get(name) != other.get(name)), None):
        raise UserError(
            f"{path} holds the weights of another model: {wrong} is {shapes.get(wrong, 'missing')} there and "
            f"{other.get(wrong, 'missing')} here; go on with what was, or start a new run with checkpoint={path}."
        )
    if any(key.split(".")[0] in ("data", "task") for key in allowed):
        return
    count, now = content.get("samples"), run.data.count("train")
    if content["task"] != run.task.state() or count not in (None, now):
        what = f"train has {now} samples and had {count}" if count not in (None, now) else "classes or words are others"
        raise UserError(
            f"the data are not those that {path} was trained on: {what}; put them back, or say allow_changes=[data]."
        )


def _ranking(content: dict[str, Any]) -> list[tuple[float, int]]:
    """The best scores with their steps; files of before 2026-11-21 tell the best one alone, without its step."""
    places = content.get("ranking", [] if content["best"] is None else [[content["best"], 0]])
    return [(score, step) for score, step in places]


def _own_window(content: dict[str, Any]) -> dict[str, Tensor]:
    """This rank's sums since the last log line; rank 0 takes all of them when the number of ranks is another."""
    windows = content.get("windows") or [{name: torch.as_tensor(value) for name, value in content["window"].items()}]
    if len(windows) == distributed.world_size():
        return dict(windows[distributed.rank()])
    return {name: torch.tensor(value) for name, value in _added(windows).items()} if distributed.is_main() else {}


def accumulate(run: Run, parts: dict[str, Tensor]) -> None:
    """Keep sums on the device: reading a value there would wait for the step."""
    for name, value in parts.items():
        run.window[name] = run.window[name] + value if name in run.window else value
    run.window_steps += 1


def take_means(run: Run) -> dict[str, float]:
    """Means over the window's steps of what the ranks' shares add up to; starts the next window."""
    shares = distributed.gather({name: value.cpu() for name, value in run.window.items()})
    means = {f"train/{name}": value / run.window_steps for name, value in _added(shares).items()}
    run.window, run.window_steps = {}, 0
    return means


def _added(shares: list[dict[str, Tensor]]) -> dict[str, float]:
    """What the ranks' shares add up to."""
    names = dict.fromkeys(name for share in shares for name in share)
    return {name: sum(float(share[name]) for share in shares if name in share) for name in names}
