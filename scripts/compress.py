"""Calibrate a checkpoint for int8: `python scripts/compress.py checkpoint=FILE quantize=int8 [output=FILE]`.

The ranges of the model's tensors are measured on val and written, with the unchanged fp32 weights, to `output`, by
default the checkpoint's path with the suffix .int8.pt. `evaluate.py` and `predict.py` compute that file in int8 with
trainer.precision=int8, on CPUs with VNNI or AMX, and like any other checkpoint without. Further keys override the
checkpoint's config, such as weights=raw or data.root=FOLDER. Prints the metrics on val in fp32 and in int8. The exit
code is 0, or 2 if nothing was written.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Python adds only the script's own folder

from common.cli import start
from common.cli.command import to_run
from common.machine import console, threads

os.environ.update(threads.missing_settings(os.environ))  # before torch is imported

from common.config.compose import configure
from common.errors import UserError
from common.files import checkpoint, names
from common.files.output import creating
from common.train.assembly import restore, stored_config
from scripts.compressing import int8


def main(arguments: Sequence[str] | None = None) -> int:
    """Calibrate, write the checkpoint and print the metrics; returns the exit code."""
    console.guard()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & {*arguments}:
        print(str(__doc__).strip())
        return 0
    try:
        own, overrides = _split(arguments)
        config = configure("evaluate", overrides, stored_config)
        config["trainer"] |= {"device": "cpu", "precision": "fp32"}
        parts = restore(config)
        assert parts.file is not None
        output = Path(own["output"]) if "output" in own else parts.file.with_suffix(".int8.pt")
        ranges = int8.calibrate(parts)
        with creating(output):
            checkpoint.save(output, int8.content(parts, config, ranges))
        print(f"{parts.weights_line}\nwrote     {output}")
        print(int8.report(parts, ranges))
    except UserError as error:
        # The config is composed as for evaluate.py, so the error messages name evaluate.py, which is replaced here.
        print(str(error).replace("evaluate.py", "compress.py"), file=sys.stderr)
        return 2
    command = names.shell_command([f"checkpoint={output}", "trainer.precision=int8"])
    print(f"evaluate  {to_run('evaluate.py')} {command}")
    return 0


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split the arguments into this script's own keys and overrides of the checkpoint's config."""
    pairs = [argument.partition("=") for argument in arguments]
    own = {key: value for key, _, value in pairs if key in ("quantize", "output")}
    if own.get("quantize") != "int8":
        raise UserError(f"quantize={own.get('quantize', '')}: expected quantize=int8; see --help.")
    return own, [argument for argument, (key, _, _) in zip(arguments, pairs, strict=True) if key not in own]


if __name__ == "__main__":
    start.script(main)
