"""Train a model: `python train.py model=detr`; `python train.py --help` lists the choices."""

import json
from pathlib import Path
from typing import Any

from common import cli


def train(config: dict[str, Any], run_dir: Path | None) -> float | None:
    """Run one training from start or stop to its end; returns the goal's value, for sweeps.

    Heavy imports are inside, so that a mistake in the config shows at once.
    """
    from common import assembly, device, distributed
    from common.config import construct
    from common.log import Log
    from common.optim import OptimizerOptions, ScheduleOptions
    from common.run import Run

    distributed.start(device.choose(config["trainer"]["device"], distributed.local_rank()))
    try:
        folder = distributed.broadcast(run_dir)
        results = folder / "results.json"
        with Log(folder, distributed.is_main()) as log:
            if results.exists():
                log.say(f"{folder} is finished; {results} holds its numbers.")
                return None
            state = folder / "task.json"  # what the data decided: names of classes, tokenizers
            goes_on = config["resume"] == "auto" and state.exists() and any(folder.glob("checkpoints/step_*.pt"))
            parts = assembly.assemble(config, goes_on=json.loads(state.read_text("utf-8")) if goes_on else None)
            log.say(parts.said)
            if distributed.is_main():
                _write(state, parts.task.state())
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
            if distributed.is_main():
                _write(results, numbers)  # its being there says that the run is finished
            log.table("results", [("number", "value"), *numbers.items()])
            log.say(f"All of it lies in {folder}: checkpoints/, metrics.jsonl, predictions/, TensorBoard events.")
            return run.best
    finally:
        distributed.stop()


def _write(path: Path, content: dict[str, Any]) -> None:
    """All of it, or nothing."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    draft.rename(path)


if __name__ == "__main__":
    cli.launch(train, door="train")
