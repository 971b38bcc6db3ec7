"""Parallel text out of files: two of them, line by line, or one with a tab in every line; UTF-8, gzipped or not.

A line ends with a line feed, with or without a carriage return before it, and nowhere else: other separators that
Unicode knows (U+2028, U+0085 ...) are part of the sentence, as they are to `wc -l` and to every aligned corpus.
"""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError

MARK = b"\xef\xbb\xbf"  # U+FEFF at the start of a file, as Windows writes it
GZIP = b"\x1f\x8b"  # how a gzip file begins (RFC 1952), whatever its name
FEED, RETURN, TAB = b"\n\r\t"


@dataclass(frozen=True)
class Ragged:
    """Rows of unequal length in one flat array, which forked workers share, as they would not share lists.

    flat (N,); row i is flat[starts[i]:ends[i]], with starts and ends int64 (n,). Rows need not touch nor be in order.
    """

    flat: NDArray[Any]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> NDArray[Any]:
        return self.flat[self.starts[index] : self.ends[index]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Length of each row: (n,)."""
        return self.ends - self.starts

    def take(self, indices: NDArray[np.int64]) -> "Ragged":
        """These rows in this order, without copying them."""
        return Ragged(self.flat, self.starts[indices], self.ends[indices])


@dataclass(frozen=True)
class Lines:
    """Sentences as UTF-8 in one array: `lines[i]` is text, and iterating gives all of them, as often as asked."""

    rows: Ragged  # of uint8

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str:
        return self.rows[index].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def take(self, indices: NDArray[np.int64]) -> "Lines":
        """These lines in this order, without copying the text."""
        return Lines(self.rows.take(indices))

    def number(self, index: int) -> int:
        """Which line of its file `lines[index]` is, counted from 1, whatever was left out before it."""
        return int(np.count_nonzero(self.rows.flat[: self.rows.starts[index]] == FEED)) + 1

    @classmethod
    def of(cls, texts: list[str]) -> "Lines":
        """Lines that come out of no file."""
        parts = [text.encode() + b"\n" for text in texts]
        bounds = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return cls(Ragged(np.frombuffer(b"".join(parts), np.uint8), bounds[:-1], bounds[1:] - 1))


def read_pair(source: Path, target: Path) -> tuple[Lines, Lines]:
    """Two files whose lines translate each other; raises UserError where they are broken or do not belong together."""
    sides = read_lines(source), read_lines(target)
    counts = [len(side) for side in sides]
    if counts[0] != counts[1]:
        raise UserError(
            f"{source} has {counts[0]:,} lines and {target} has {counts[1]:,}; expected line n of one to translate "
            "line n of the other, so give two files of the same number of lines."
        )
    return sides


def read_tabbed(path: Path) -> tuple[Lines, Lines]:
    """One file with source, tab, target in every line; raises UserError that names the first line without just one."""
    rows = read_lines(path).rows
    tabs = np.flatnonzero(rows.flat == TAB)
    first = np.searchsorted(tabs, rows.starts)
    counts = np.searchsorted(tabs, rows.ends) - first
    wrong = np.flatnonzero(counts != 1)
    if len(wrong):
        line = int(wrong[0])
        raise UserError(
            f"{path}: line {line + 1} has {counts[line] or 'no'} {'tab' if counts[line] < 2 else 'tabs'}; expected "
            "source, one tab, target in every line, so correct the line, or cut other columns off."
        )
    middle = tabs[first]
    return Lines(Ragged(rows.flat, rows.starts, middle)), Lines(Ragged(rows.flat, middle + 1, rows.ends))


def read_lines(path: Path) -> Lines:
    """A file's lines without their ends; raises UserError where it is missing, broken, empty or no UTF-8."""
    content = _content(path).removeprefix(MARK)
    if not content:
        raise UserError(f"The file {path} is empty; expected a sentence in every line.")
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}: line {line} is not valid UTF-8 (byte 0x{content[error.start]:02x}); convert the file to UTF-8, "
            "or mend the line."
        ) from error
    flat = np.frombuffer(content, np.uint8)
    ends = np.flatnonzero(flat == FEED)
    if not content.endswith(b"\n"):
        ends = np.append(ends, len(flat))
    starts = np.concatenate([[0], ends[:-1] + 1])
    returns = (ends > starts) & (flat[ends - 1] == RETURN)
    return Lines(Ragged(flat, starts, ends - returns))


def _content(path: Path) -> bytes:
    """The file's bytes, unpacked where they are gzip's."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}; mend its path.") from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{path} cannot be read ({reason}); give a text file, gzipped or not.") from error
    if not content.startswith(GZIP):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is a broken gzip file ({error}); fetch or pack it again.") from error
