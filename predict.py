"""Answer for a user's own input: `python predict.py checkpoint=FILE input=IMAGE_OR_FOLDER`."""

from pathlib import Path
from typing import Any

from common import cli


def predict(config: dict[str, Any]) -> None:
    """Read the input batch by batch, print a line for each answer, and write the answers under `output`."""
    from common import assembly, device

    parts, folder = assembly.restore(config), Path(config["output"])
    print(parts.said)
    for batch in parts.task.read(config["input"]):
        with device.autocast(parts.device, parts.trainer.precision):
            answers = parts.task.predict(parts.model, batch)
        for line in parts.task.show(batch, answers, folder):
            print(line, flush=True)


def stored_config(file: Path) -> dict[str, Any]:
    """The config inside a checkpoint; torch is imported only once a command line has got this far."""
    from common import assembly

    return assembly.stored_config(file)


if __name__ == "__main__":
    cli.launch(predict, door="predict", base=stored_config)
