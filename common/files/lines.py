"""Text on the disk: lines of which none is lost while it is full, and files that are whole or not there."""

import os
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file; at any moment, also after a power cut, `path` is the old one or the new one."""
    draft = path.with_name(f".{path.name}.tmp")
    with open(draft, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make new names in `folder` survive a power cut."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


class LineFile:
    """A text file that only grows; what cannot be written waits in memory and goes first at the next try."""

    def __init__(self, path: Path):
        """Append to `path`, which is opened, or made, with the first line."""
        self.path = path
        self._file: BinaryIO | None = None
        self._waiting = b""

    def add(self, line: str) -> None:
        """Write `line` and its end; raises OSError when it must wait."""
        self._waiting += line.encode() + b"\n"
        self._write()

    def flush(self) -> None:
        """Bring all lines to the disk; raises OSError when that cannot be."""
        self._write()
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, after a last try."""
        try:
            self._write()
        finally:
            if self._file is not None:
                self._file.close()
            self._file = None

    def _write(self) -> None:
        if self._waiting and self._file is None:
            self._file = open(self.path, "ab", buffering=0)
        while self._waiting:
            assert self._file is not None
            written = self._file.write(self._waiting)  # without a buffer it may be a part, of which the disk was full
            self._waiting = self._waiting[written:]
