"""Predict for a user's own input: `python predict.py checkpoint=FILE input=INPUT`.

Only the answers go to standard output, so that it can be piped; everything else goes to standard error.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from common.cli import start
from common.cli.start import stored_config
from common.machine import console


def predict(config: dict[str, Any]) -> None:
    """Read the input batch by batch, print a line for each answer, and write the answers to the folder `output`.

    If the task could not answer some inputs, they are listed at the end, and the exit code is 1.
    """
    from common.files import inputs, output
    from common.machine import collector, device
    from common.task import answers_of
    from common.train import assembly

    folder = Path(config["output"])
    output.refuse_input_folder(folder, config["input"])
    output.refuse_run_folder(folder)
    if note := inputs.reading_note(config["input"]):
        print(note, file=sys.stderr)
    parts = assembly.restore(config)
    collector.resume()
    print(parts.weights_line, file=sys.stderr)
    with output.writing_to(folder):
        stream = getattr(parts.task, "stream", None) if sys.stdout and sys.stdout.isatty() else None
        for batch in parts.task.read(config["input"]):
            with device.autocast(parts.device, parts.trainer.precision):
                if stream is not None and stream(parts.model, batch, partial(print, end="", flush=True)):
                    continue
                answers = answers_of(parts.task, parts.model, batch)
            for line in parts.task.show(batch, answers, folder):
                print(line, flush=True)
                if not console.is_read():  # the reader of the pipe has exited, as in `| head -1`
                    return
    unanswered = getattr(parts.task, "unanswered", [])
    print("".join(f"{sentence}\n" for sentence in unanswered), end="", file=sys.stderr)
    if unanswered:
        sys.exit(1)


def send_utf8() -> None:
    """Encode standard output as UTF-8 in every locale, because input is UTF-8, too. A terminal keeps its encoding."""
    if sys.stdout and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8")


if __name__ == "__main__":
    send_utf8()
    start.door(predict, "predict", stored_config)
