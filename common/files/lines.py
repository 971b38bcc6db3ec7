"""Replace text files atomically, and append lines to files without losing any while the disk is full."""

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
    r"""Replace the content of the file `path` by `text`.

    At any time, even after a power cut, the file has either its old content or all of `text`.

    Python represents a byte of a file name that is not UTF-8 by half of a surrogate pair. Such a character is written
    as an escape (\udce9) that JSON and YAML can read. Raises OSError, which names a file, if the disk is full or the
    folder cannot be written.
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
    """A text file to which lines are appended. Lines that cannot be written are kept for the next call."""

    def __init__(self, path: Path):
        """Append to `path`. The file is opened, and created if missing, when the first line is written."""
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
        """Try to write the lines that are still pending, then close the file; raises OSError if writing fails."""
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
                written = self._file.write(self._pending)  # unbuffered; a nearly full disk may take only a part
            self._pending = self._pending[written:]


def as_json(values: Mapping[str, Any], indent: int | None = None) -> str:
    """Format `values` as a JSON object; a value that is NaN or infinite becomes null, because JSON has neither."""
    undefined = {name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
    return json.dumps({**values, **dict.fromkeys(undefined)}, indent=indent)
