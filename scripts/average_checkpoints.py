"""Average the weights of a run's last checkpoints: `python scripts/average_checkpoints.py RUN --last 5 --output FILE`.

The input is one run's folder (or the checkpoints/ in it) or several checkpoint files; the output is one checkpoint.
Vaswani et al. (2017, section 6.1) average the last 5 checkpoints of the base model and the last 20 of the big one. A
run with `trainer.average_last=N` keeps its last N checkpoints and writes their average when it ends; with N = 0, it
keeps its last two. The exit code is 0, or 2 if no average was written.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Python adds only the script's own folder

from common.cli import start
from common.cli.command import to_run
from common.machine import console, threads

os.environ.update(threads.missing_settings(os.environ))  # before torch is imported

from common.errors import UserError
from common.files import checkpoint, names
from common.files.output import creating
from common.files.retention import CheckpointFolder
from common.train import averaging
from common.train.state import describe, select_weights
from common.weights import values

DEFAULT_COUNT = 5  # checkpoints averaged for the base model in the paper


def main(arguments: Sequence[str] | None = None) -> int:
    """Average the checkpoints, write the result and print how to evaluate it; returns the exit code."""
    console.guard()
    options = _options(arguments)
    try:
        files = select_checkpoints(options.checkpoints, options.last)
        _check_output(options.output, files)
        content = averaging.average(files)
        with creating(options.output):
            checkpoint.save(options.output, content)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join([*(f"read      {file}" for file in files), f"wrote     {describe(options.output, content)}"]))
    for warning in values.non_finite_note(select_weights(content)):
        print(f"warning   {warning}")
    print(f"evaluate  {to_run('evaluate.py')} {names.shell_command([f'checkpoint={options.output}'])}")
    return 0


def select_checkpoints(paths: Sequence[Path], last: int | None) -> list[Path]:
    """Return `paths` if they are files; if `paths` is one folder, return its `last` newest step checkpoints.

    If `last` is None, the `DEFAULT_COUNT` newest are returned. Raises UserError for a folder among several paths, for a
    folder with too few step checkpoints, and for `last` together with files.
    """
    folders = [path for path in paths if path.is_dir()]
    if not folders:
        if last is not None:
            raise UserError(f"--last {last} applies to a run's folder; leave it out when you give checkpoint files.")
        return list(paths)
    if len(paths) > 1:
        raise UserError(f"{folders[0]} is a folder among several paths; give one run's folder, or only files.")
    subfolder = folders[0] / "checkpoints"
    folder, count = subfolder if subfolder.is_dir() else folders[0], DEFAULT_COUNT if last is None else last
    files = CheckpointFolder(folder, writes=False).last(count)
    if len(files) < count:
        advice = f"give --last {len(files)}, or " if len(files) > 1 else ""
        raise UserError(
            f"{folder} holds {len(files)} step checkpoints (such as step_00001000.pt), but {count} are to be averaged; "
            f"{advice}train with trainer.average_last={count}, so that the run keeps {count}."
        )
    return files


def _check_output(output: Path, files: Sequence[Path]) -> None:
    """Raise UserError if `output` is a folder, is named best.pt or step_NUMBER.pt, or is one of the input files."""
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; give a file in it, such as {output / 'average.pt'}.")
    if re.fullmatch(r"best\.pt|step_\d+\.pt", output.name) or output.resolve() in {file.resolve() for file in files}:
        raise UserError(f"--output {output} has the name of a run's checkpoint; give another name, such as average.pt.")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n\n")[0], allow_abbrev=False)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="one run's folder, or two or more checkpoint files")
    parser.add_argument("--last", type=int, help=f"number of newest checkpoints to average (default {DEFAULT_COUNT})")
    parser.add_argument("--output", type=Path, required=True, help="the checkpoint to write")
    options = parser.parse_args(arguments)
    if options.last is not None and options.last < 2:
        parser.error("--last must be at least 2")
    return options


if __name__ == "__main__":
    start.script(main)
