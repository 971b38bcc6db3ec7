"""Evaluate a run's checkpoint or published weights: `python evaluate.py checkpoint=runs/.../checkpoints/best.pt`."""

import math
import sys
from pathlib import Path
from typing import Any

from common.cli import start
from common.cli.start import stored_config


def evaluate(config: dict[str, Any]) -> float | None:
    """Evaluate the checkpoint on one split, and print the metrics as a table and as JSON.

    If `output` is set, the metrics and the predictions are also written to this folder. Returns the value of the task's
    goal metric, or None if the split has no annotations.
    """
    from common.errors import UserError
    from common.files.lines import as_json
    from common.files.log import Log
    from common.files.output import create_output, writing_to
    from common.machine import collector, device, distributed
    from common.train import assembly, evaluator
    from common.train.provenance import provenance

    local_device = device.select(config["trainer"]["device"], distributed.local_rank())
    with distributed.process_group(local_device, config["trainer"]["timeout"]):
        folder = Path(config["output"]) if config["output"] and distributed.is_main() else None
        if folder:
            create_output(folder)
        parts, split = assembly.restore(config), config["split"]
        collector.resume()
        if not parts.data.count(split):
            raise UserError(f"split={split}: the data set has no such split; give its files or another split.")
        numbers, metric = evaluator.evaluate(
            parts.task,
            parts.data,
            parts.model,
            split,
            device=parts.device,
            precision=parts.trainer.precision,
            batch_size=parts.trainer.micro_batch or parts.data.batch_size,
            workers=parts.trainer.worker_count,
            report=lambda line: print(line, file=sys.stderr) if distributed.is_main() else None,
        )
        results = {f"{split}/{name}": value for name, value in numbers.items()}
        if folder:  # the files are written before the results are printed, because printing may fail
            record = {**results, **provenance(config, parts, split)}
            with writing_to(folder):
                (folder / "results.json").write_text(as_json(record, indent=1))
                metric.write(folder)
        log = Log(None, distributed.is_main())
        log.info(parts.weights_line)
        if distributed.is_main():  # only rank 0 logs, and `describe_data` may open files again
            describe_data(parts.data, parts.task, split, log)
        if numbers:
            log.table(f"{split}: {parts.data.count(split)} samples", [("number", "value"), *numbers.items()])
        else:
            unwritten = "" if config["output"] else "; output=FOLDER writes the predictions"
            log.warning(f"There are no numbers, because the {split} data have no annotations{unwritten}.")
        if undefined := [name for name, value in results.items() if math.isnan(value)]:
            log.warning(f"{', '.join(undefined)} is NaN: the model's outputs, or the truth, are not finite.")
        if config["details"] and numbers:
            log.table("details", metric.details())
        log.info(as_json(results))
        if config["output"]:
            log.info(f"The results and the predictions are in {config['output']}.")
        return numbers.get(parts.task.goal.name)


def describe_data(data: Any, task: Any, split: str, log: Any) -> None:
    """Log what a training run logs about `split` at its start: counts, notes on how the data were read, warnings.

    Also log the notes of `task` on the evaluation, such as assumptions about an imported model's classes.
    """
    if hasattr(data, "split_summary"):
        log.info("\n".join(f"data      {line}" for line in data.split_summary(split)))
    for note in task.evaluation_notes() if hasattr(task, "evaluation_notes") else []:
        log.info(f"note      {note}")
    for warning in task.split_advice(split) if hasattr(task, "split_advice") else []:
        log.warning(warning)


if __name__ == "__main__":
    start.door(evaluate, "evaluate", stored_config)
