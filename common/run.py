"""What a run is made of and where it stands; what a checkpoint keeps of it, and going on from there."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import distributed, optim
from common.changes import refuse_changes
from common.ema import Average
from common.errors import UserError
from common.folder import Folder
from common.log import Log
from common.optim import OptimizerOptions, ScheduleOptions
from common.step import Stepper
from common.task import Data, Task


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


def weights(content: dict[str, Any], kind: str = "auto") -> dict[str, Tensor]:
    """A checkpoint's averaged weights when it has them (auto, ema), or those of the last update (raw).

    Raises UserError when averaged weights are asked for and the run kept none.
    """
    if kind == "ema" and content.get("mean"):
        raise UserError("weights=ema, but this file holds one set of weights, an average of steps; leave weights= out.")
    if kind == "ema" and content["average"] is None:
        raise UserError("weights=ema, but this checkpoint's run kept no average (trainer.ema_decay was 0); use raw.")
    return content["model"] if kind == "raw" or content["average"] is None else content["average"]["weights"]


def describe(path: Path, content: dict[str, Any], kind: str = "auto") -> str:
    """Which weights of which file: shown beside every number."""
    averaged = kind != "raw" and content["average"] is not None
    step = f"step {content['step']}"
    if mean := content.get("mean"):  # see averaging.py; no other file has this key
        step, averaged = f"average of steps {', '.join(map(str, mean['steps']))}", mean["ema"]
    return f"{path}: {step}, {'averaged (EMA)' if averaged else 'raw'}"


def content_of(run: Run, stepper: Stepper, average: Average | None) -> dict[str, Any]:
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


def go_on(run: Run, stepper: Stepper, average: Average | None, folder: Folder, log: Log) -> None:
    """Take up the newest whole checkpoint, and forget what was logged after it; without any, start."""
    found = folder.latest(log.warning)
    log.cut_back(found[1]["step"] if found else 0, evaluated=False)
    if found is None:
        return
    content = found[1]
    refuse_changes(content["config"], run.config, f"{found[0]}")
    run.step, run.best, run.window_steps = content["step"], content["best"], content["window_steps"]
    if distributed.is_main():  # the sums are of all ranks
        run.window = {name: torch.tensor(value) for name, value in content["window"].items()}
    run.model.load_state_dict(content["model"])
    optim.restore(stepper.optimizer, content["optimizer"])
    stepper.scaler.load_state_dict(content["scaler"])
    stepper.overflows = content["overflows"]
    if average is not None:
        average.load_state_dict(content["average"])


def add(run: Run, parts: dict[str, Tensor]) -> None:
    """Keep sums on the device: reading a value there would wait for the step."""
    for name, value in parts.items():
        run.window[name] = run.window[name] + value if name in run.window else value
    run.window_steps += 1


def close_window(run: Run) -> dict[str, float]:
    """Means over the window's steps of what the ranks' shares add up to; starts the next window."""
    means = {f"train/{name}": value / run.window_steps for name, value in _summed(run.window).items()}
    run.window, run.window_steps = {}, 0
    return means


def _summed(window: dict[str, Tensor]) -> dict[str, float]:
    """What the ranks' shares add up to."""
    shares = distributed.gather({name: float(value) for name, value in window.items()})
    names = dict.fromkeys(name for share in shares for name in share)
    return {name: sum(share.get(name, 0.0) for share in shares) for name in names}
