"""Train a model: `python train.py model=detr`. `--help` lists the models and data sets, and `--cfg job` all keys."""

import json
import os
from pathlib import Path
from typing import Any

from common.cli import start


def train(config: dict[str, Any], run_dir: Path | None) -> float | None:
    """Start or resume a training run and complete it.

    Returns the best value on val of the task's goal (the metric that selects the checkpoint), or None if there is no
    such value. `run_dir` is the run's folder; it is None on ranks above 0. Slow imports are inside this function, so
    that a mistake in the config is reported before torch is imported.
    """
    import torch

    from common.config.check import construct
    from common.files import loggers
    from common.files.lines import as_json, write_atomically
    from common.files.log import Log
    from common.files.records import goal_value, read_record
    from common.files.run_folder import config_text
    from common.machine import collector, device, distributed
    from common.train import assembly
    from common.train.optim import OptimizerOptions, ScheduleOptions
    from common.train.state import Run

    if config["trainer"]["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS at the first matrix product
    if "mlflow" in config["trainer"]["log"]:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # do not send usage statistics to MLflow
    if config["trainer"]["deterministic"] != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(config["trainer"]["deterministic"])  # imports PyTorch's compiler
    local_device = device.select(config["trainer"]["device"], distributed.local_rank())
    with distributed.process_group(local_device, config["trainer"]["timeout"]):
        folder = distributed.broadcast(run_dir)
        results = folder / "results.json"
        with Log(folder, distributed.is_main()) as log:
            if results.exists():
                log.info(f"{folder} is finished; its results are in {results}.")
                return goal_value(read_record(results))
            if distributed.is_main():
                loggers.refuse_missing(config["trainer"]["log"])
            state_file = folder / "task.json"  # the task's state, such as class names or tokenizers
            resumes = config["resume"] == "auto" and any(folder.glob("checkpoints/st*_*.pt"))
            task_state = read_record(state_file) if state_file.exists() else {}  # runs of the first version lack it
            # All ranks take the precision and the data's config of rank 0. A resumed run keeps the precision that
            # trainer.precision=auto resolved to at its start, and the sizes of val and test that were cut from train.
            # Only rank 0 has read these values from the run's folder.
            precision = device.resolve_precision(config["trainer"]["precision"], local_device)
            config["trainer"]["precision"], config["data"] = distributed.broadcast((precision, config["data"]))
            parts = assembly.assemble(config, resumed_state=task_state if resumes else None)
            collector.resume()
            log.info(parts.weights_line)
            if distributed.is_main() and not resumes:
                write_atomically(folder / "config.yaml", config_text(config))
            if distributed.is_main() and not (resumes and state_file.exists()):
                write_atomically(state_file, json.dumps(parts.task.state(), indent=1, ensure_ascii=False))
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
            log.flush()  # metrics.jsonl must be complete before results.json marks the run as finished
            if distributed.is_main():
                write_atomically(results, as_json({**numbers, **goal}, indent=1))  # marks the run as finished
            log.table("results", [("number", "value"), *numbers.items()])
            files = [name for name in ("checkpoints/", "metrics.jsonl", "predictions/") if (folder / name).exists()]
            files += ["TensorBoard events"] * any(folder.glob("events.out.tfevents*"))
            log.info(f"Everything is in {folder}: {', '.join(files)}.")
            return goal_value({**numbers, **goal})


if __name__ == "__main__":
    start.door(train, "train")
