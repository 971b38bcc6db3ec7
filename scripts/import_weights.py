"""Write a file of another program as a checkpoint: `python scripts/import_weights.py checkpoint=FILE model=NAME`.

FILE is any file of weights that evaluate.py accepts, or the name of published weights (configs/weights.yaml). The
checkpoint also holds its config, so that evaluate.py, predict.py, export.py and task.distillation.teacher take it
without further keys. Further arguments are config keys as for evaluate.py, such as data.mean=[0.5,0.5,0.5].

--output names the checkpoint (default: FILE with the suffix .imported.pt). The exit code is 0, or 2 if nothing was
written.
"""

import argparse
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
from common.train import imported
from common.train.assembly import restore, stored_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the checkpoint and print how to evaluate it; returns the exit code."""
    console.guard()
    options, overrides = _arguments(sys.argv[1:] if arguments is None else list(arguments))
    try:
        file = convert(overrides, options.output)
    except UserError as error:
        # The config is composed as for evaluate.py, so the error messages name evaluate.py, which is replaced here.
        print(str(error).replace("evaluate.py", "import_weights.py"), file=sys.stderr)
        return 2
    print(f"wrote     {file}")
    print(f"evaluate  {to_run('evaluate.py')} {names.shell_command([f'checkpoint={file}'])}")
    return 0


def convert(overrides: list[str], output: Path | None) -> Path:
    """Write the checkpoint to `output` (default: beside the file), and print the line of its weights; returns its path.

    Raises UserError if the file is a checkpoint already, if `output` exists, and if the weights are not those of the
    model.
    """
    config = configure("evaluate", overrides, stored_config)
    parts = restore(config)
    assert parts.file is not None
    if checkpoint.is_ours(checkpoint.load(parts.file, ("config",))):
        raise UserError(f"{parts.file} is a checkpoint of this program already; give a file of another program.")
    file = output or parts.file.with_suffix(".imported.pt")
    if file.exists():
        raise UserError(f"--output {file} exists already; name another file.")
    print(parts.weights_line)
    with creating(file):
        checkpoint.save(file, imported.content(parts, config))
    return file


def _arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, help="the checkpoint to write (default: FILE.imported.pt)")
    options, overrides = parser.parse_known_args(arguments)
    if not overrides or (unknown := [word for word in overrides if word.startswith("-")]):
        parser.error(f"unknown option {unknown[0]}" if overrides else "give checkpoint=FILE and model=NAME")
    return options, overrides


if __name__ == "__main__":
    start.script(main)
