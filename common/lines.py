"""Lines appended to a file, none of which is lost while the disk is full."""

import os
from pathlib import Path
from typing import BinaryIO


class Lines:
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
