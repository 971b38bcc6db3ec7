"""Answer for a user's own input: `python predict.py checkpoint=FILE input=FILE_OR_FOLDER_OR_-`.

Standard output holds the answers and nothing else, so that they can be sent on; all else goes to standard error.
"""

import os
import sys
from pathlib import Path
from typing import Any

from common.cli import main as cli
from common.cli.main import stored_config


def predict(config: dict[str, Any]) -> None:
    """Read the input batch by batch, print a line for each answer, and write the answers under `output`."""
    from common.machine import device
    from common.train import assembly

    parts, folder = assembly.restore(config), Path(config["output"])
    print(parts.weights_line, file=sys.stderr)
    for batch in parts.task.read(config["input"]):
        with device.autocast(parts.device, parts.trainer.precision):
            answers = parts.task.predict(parts.model, batch)
        for line in parts.task.show(batch, answers, folder):
            if not say(line):
                return


def send_utf8() -> None:
    """Answers leave in UTF-8, as text comes in, whatever the locale; but in a terminal's own encoding into that."""
    if sys.stdout and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8")


def say(line: str) -> bool:
    """Print a line at once; False when nobody reads on, as behind `| head -1`, which is no mistake."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains as it flushes at the end
        return False
    return True


if __name__ == "__main__":
    send_utf8()
    cli.launch(predict, door="predict", base=stored_config)
