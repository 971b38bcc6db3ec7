"""Text files that are replaced atomically, and line files that lose no line while the disk is full."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A context that adds `path` to an OSError that names no file, such as the error of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Replace a file: at any time, also after a power cut, `path` is either the complete old or the complete new file.

    Half of a surrogate pair, as in a file's name that is not UTF-8, is written as an escape that JSON and YAML read.
    Raises OSError, which names a file, if the disk is full or the folder cannot be written.
    """
    draft = path.with_name(f".{path.name}.tmp")
    try:
        with naming(path), open(draft, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError:
        with suppress(OSError):
            draft.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names of new files in `folder` survive a power cut."""
    if os.name == "posix":  # other systems cannot open a folder
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


class LineFile:
    """A text file to which lines are only appended. Lines that could not be written are written in the next call."""

    def __init__(self, path: Path):
        """Prepare to append to `path`, which is opened, and created if missing, when the first line is written."""
        self.path = path
        self._file: BinaryIO | None = None
        self._pending = b""

    def add(self, line: str) -> None:
        """Write `line` and a newline; if that fails, raises OSError and keeps the text for the next call."""
        self._pending += line.encode("utf-8", "backslashreplace") + b"\n"
        self._write()

    def flush(self) -> None:
        """Write all lines to the disk; raises OSError, which names the file, if that fails."""
        self._write()
        if self._file is not None:
            with naming(self.path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, after a last attempt to write."""
        try:
            self._write()
        finally:
            if self._file is not None:
                self._file.close()
            self._file = None

    def _write(self) -> None:
        if self._pending and self._file is None:
            self._file = open(self.path, "ab", buffering=0)
        while self._pending:
            assert self._file is not None
            with naming(self.path):
                written = self._file.write(self._pending)  # unbuffered; on a nearly full disk, only a part
            self._pending = self._pending[written:]


def as_json(values: Mapping[str, Any], indent: int | None = None) -> str:
    """Write `values` as a JSON object, in which floats that are not finite are null: JSON has no NaN."""
    undefined = {name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
    return json.dumps({**values, **dict.fromkeys(undefined)}, indent=indent)
