"""Train a model: `python train.py model=detr`; `python train.py --help` lists the choices."""

import json
import os
from pathlib import Path
from typing import Any

from common.cli import main as cli
from common.errors import UserError


def train(config: dict[str, Any], run_dir: Path | None) -> float | None:
    """Run one training from start or stop to its end; returns the goal's value, for sweeps.

    Heavy imports are inside, so that a mistake in the config shows at once.
    """
    import torch

    from common.config.check import construct
    from common.files.lines import write_atomically
    from common.files.log import Log
    from common.files.run_folder import config_text
    from common.machine import device, distributed
    from common.train import assembly
    from common.train.optim import OptimizerOptions, ScheduleOptions
    from common.train.state import Run

    if config["trainer"]["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the GPU's first product
    torch.use_deterministic_algorithms(config["trainer"]["deterministic"])
    place = device.select(config["trainer"]["device"], distributed.local_rank())
    with distributed.process_group(place, config["trainer"]["timeout"]):
        folder = distributed.broadcast(run_dir)
        results = folder / "results.json"
        with Log(folder, distributed.is_main()) as log:
            if results.exists():
                log.info(f"{folder} is finished; {results} holds its numbers.")
                return _reached(_read(results))
            state = folder / "task.json"  # what the data decided: names of classes, tokenizers
            goes_on = config["resume"] == "auto" and any(folder.glob("checkpoints/st*_*.pt"))
            decided = _read(state) if state.exists() else {}  # runs of the first version have none
            # Rank 0 knows what a run that goes on had, and a run keeps what auto came to.
            wanted = device.resolve_precision(config["trainer"]["precision"], place)
            config["trainer"]["precision"] = distributed.broadcast(wanted)
            parts = assembly.assemble(config, resumed_state=decided if goes_on else None)
            log.info(parts.weights_line)
            if distributed.is_main() and not goes_on:
                write_atomically(folder / "config.yaml", config_text(config))
            if distributed.is_main() and not (goes_on and state.exists()):
                write_atomically(state, json.dumps(parts.task.state(), indent=1, ensure_ascii=False))
            run = Run(
                task=parts.task,
                data=parts.data,
                model=parts.model,
                optimizer=construct(OptimizerOptions, config["optimizer"]),
                schedule=construct(ScheduleOptions, config["schedule"]),
                config=config,
                seed=config["seed"],
                folder=folder,
                pretrained=parts.pretrained,
            )
            numbers = parts.trainer.fit(run, log, on=parts.device, resume=config["resume"] == "auto")
            goal = {
                "goal": f"val/{parts.task.goal.name}",
                "direction": "maximize" if parts.task.goal.higher_is_better else "minimize",
            }
            if distributed.is_main():
                write_atomically(results, json.dumps({**numbers, **goal}, indent=1))  # says that the run is finished
            log.table("results", [("number", "value"), *numbers.items()])
            log.info(f"All of it lies in {folder}: checkpoints/, metrics.jsonl, predictions/, TensorBoard events.")
            return _reached({**numbers, **goal})


def _reached(results: dict[str, Any]) -> float | None:
    """The goal's best value on val among a run's results."""
    return results.get(str(results.get("goal")))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and the same line makes it again.") from error
    return dict(content)


if __name__ == "__main__":
    cli.launch(train, door="train")
