"""Parallel text from files: two files line by line, or one with a tab in every line; UTF-8, gzipped or not.

A line ends with a line feed, with or without a carriage return before it. Unicode's other separators (U+2028, U+0085,
...) are part of the sentence, as they are for `wc -l` and in every aligned corpus.
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

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # U+FEFF, which Windows writes at the start of a file
GZIP_MAGIC = b"\x1f\x8b"  # the first bytes of a gzip file (RFC 1952)
LINE_FEED, CARRIAGE_RETURN, TAB = b"\n\r\t"


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths in one flat array, which forked workers share, unlike lists.

    flat (N,); row i is flat[starts[i]:ends[i]], with starts and ends int64 (n,). Rows may have gaps and any order.
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
    """Sentences as UTF-8 in one array: `lines[i]` is a str, and iterating, any number of times, gives all of them."""

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
        """The line number of `lines[index]` in its file, from 1; lines that were left out count."""
        return int(np.count_nonzero(self.rows.flat[: self.rows.starts[index]] == LINE_FEED)) + 1

    @classmethod
    def of(cls, texts: list[str]) -> "Lines":
        """Lines that are not from a file."""
        parts = [text.encode() + b"\n" for text in texts]
        bounds = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return cls(Ragged(np.frombuffer(b"".join(parts), np.uint8), bounds[:-1], bounds[1:] - 1))


def read_pair(source: Path, target: Path) -> tuple[Lines, Lines]:
    """Two files with sentences and their translations; raises UserError for a broken file or different line counts."""
    sides = read_lines(source), read_lines(target)
    counts = [len(side) for side in sides]
    if counts[0] != counts[1]:
        raise UserError(
            f"{source} has {counts[0]:,} lines and {target} has {counts[1]:,}; expected line n of the second to "
            "translate line n of the first; give two files with the same number of lines."
        )
    return sides


def read_tabbed(path: Path) -> tuple[Lines, Lines]:
    """One file with source, tab, target in every line; raises UserError naming the first line with another layout."""
    rows = read_lines(path).rows
    tabs = np.flatnonzero(rows.flat == TAB)
    first = np.searchsorted(tabs, rows.starts)
    counts = np.searchsorted(tabs, rows.ends) - first
    malformed = np.flatnonzero(counts != 1)
    if len(malformed):
        line = int(malformed[0])
        raise UserError(
            f"{path}: line {line + 1} has {counts[line] or 'no'} {'tab' if counts[line] < 2 else 'tabs'}; expected "
            "source, one tab, target in every line; correct the line, or remove other columns."
        )
    middle = tabs[first]
    return Lines(Ragged(rows.flat, rows.starts, middle)), Lines(Ragged(rows.flat, middle + 1, rows.ends))


def read_lines(path: Path) -> Lines:
    """A file's lines without line ends; raises UserError if it is missing, broken, empty or not UTF-8."""
    content = _content(path).removeprefix(BYTE_ORDER_MARK)
    if not content:
        raise UserError(f"The file {path} is empty; expected one sentence per line.")
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}: line {line} is not valid UTF-8 (byte 0x{content[error.start]:02x}); convert the file to UTF-8, "
            "or correct the line."
        ) from error
    flat = np.frombuffer(content, np.uint8)
    ends = np.flatnonzero(flat == LINE_FEED)
    if not content.endswith(b"\n"):
        ends = np.append(ends, len(flat))
    starts = np.concatenate([[0], ends[:-1] + 1])
    returns = (ends > starts) & (flat[ends - 1] == CARRIAGE_RETURN)
    return Lines(Ragged(flat, starts, ends - returns))


def _content(path: Path) -> bytes:
    """The file's bytes, decompressed if they are gzip's."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}; correct its path.") from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{path} cannot be read ({reason}); give a text file, gzipped or not.") from error
    if not content.startswith(GZIP_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is a broken gzip file ({error}); download or compress it again.") from error
