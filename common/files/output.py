"""Create the folder that the key `output` of evaluate.py and predict.py names, and write answers to it.

Disk errors become UserErrors.
"""

import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.data.images import IMAGE_SUFFIXES
from common.data.video import VIDEO_SUFFIXES
from common.errors import UserError
from common.files.inputs import answered_file, is_pattern, matches
from common.files.run_folder import holds_a_run


def refuse_input_folder(folder: Path, input: str) -> None:
    """Raise UserError if `folder` is a folder that `input` names, or holds an image or video that `input` names.

    An answer in such a folder could replace one of the user's files.
    """
    paths = matches(input) if is_pattern(input) else [Path(input)]
    endings = {*IMAGE_SUFFIXES, *VIDEO_SUFFIXES}
    sources = {path.parent if path.suffix.lower() in endings and not path.is_dir() else path for path in paths}
    for source in sources:
        with suppress(OSError):  # `folder` or `source` does not exist, or cannot be read
            if source.is_dir() and os.path.samefile(folder, source):
                raise UserError(
                    f"output={folder} is the folder of the input, where answers could replace images; name another "
                    f"folder, such as output={folder / 'predictions'}."
                )


def refuse_run_folder(folder: Path) -> None:
    """Raise UserError if `folder` is the folder of a run, or lies inside one."""
    with suppress(OSError):  # `writing_to` reports a folder that cannot be read
        resolved = folder.resolve()
        if run := next((path for path in (resolved, *resolved.parents) if holds_a_run(path)), None):
            where = "the folder of a run" if run == resolved else f"inside the folder of a run, {run}"
            raise UserError(f"output={folder} is {where}, whose results would be replaced; name another.")


def create_output(folder: Path) -> None:
    """Create `folder` and test whether a file can be written in it.

    Raises UserError if this fails, or if `folder` is the folder of a run or lies inside one.
    """
    with writing_to(folder):
        refuse_run_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".output-{os.getpid()}"
        try:
            probe.write_text("A test of whether the disk has room.\n", encoding="utf-8")
        finally:
            probe.unlink(missing_ok=True)


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """A context that turns an OSError into a UserError if the disk is full or the error concerns `folder`.

    An error concerns `folder` if it names this folder, one of its parents, or a file in it. Other errors propagate.
    """
    try:
        yield
    except OSError as error:
        file = Path(str(error.filename)) if isinstance(error.filename, str) else folder
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not is_full and not (error.filename and (file.is_relative_to(folder) or folder.is_relative_to(file))):
            raise
        remedy = "make room, or name another folder" if is_full else "name another folder"
        raise UserError(f"output={folder}: {file} cannot be written ({error.strerror}); {remedy}.") from error


@contextmanager
def creating(path: Path) -> Iterator[None]:
    """A context in which a script writes the file or folder `path`; turns an OSError into a UserError with the path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); check its folder and the disk.") from error


def write_answer(file: Path, source: Path, content: dict[str, Any]) -> None:
    """Write the answer to the input `source` to `file` as JSON, with the path of `source` under the key "file".

    Warns if this replaces the answer to another input (see `note_replacement`).
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    note_replacement(file, source)
    file.write_text(json.dumps({"file": str(source), **content}, indent=1), encoding="utf-8")


def note_replacement(file: Path, source: Path) -> None:
    """Warn on stderr if `file`, which is about to be replaced, answers another input that still exists."""
    # These errors mean that there is no earlier answer, or that another program wrote the file.
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        former = answered_file(file)
        if not os.path.samefile(former, source):
            warning = f"{file} held the answer for {former}, which {source} of the same name now replaces"
            print(f"Warning: {warning}; output=FOLDER keeps them apart.", file=sys.stderr)
