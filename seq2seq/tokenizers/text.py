"""Read parallel text from two files line by line, or from one file with tab-separated columns.

Files are in UTF-8, plain or compressed. A line ends with a line feed, with or without a carriage return before it.
Unicode's other line separators (U+2028, U+0085, ...) are part of the sentence, as they are for `wc -l` and in corpora
that are aligned line by line.
"""

import importlib
import re
import zlib
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from common.data.opening import open_regular
from common.errors import UserError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # U+FEFF in UTF-8, which programs on Windows write at the start of a file
# The first bytes of compressed files, and the module of Python's standard library that decompresses such a file.
MAGIC_BYTES = {
    b"\x1f\x8b": "gzip",  # RFC 1952
    **{b"BZh%d1AY&SY" % level: "bz2" for level in range(1, 10)},  # ten bytes, since a text may begin with "BZh"
    **{b"BZh%d\x17rE8P\x90" % level: "bz2" for level in range(1, 10)},  # a compressed empty file
    b"\xfd7zXZ\x00": "lzma",
}
# The first bytes of other compressed files, and the command that decompresses such a file.
UNSUPPORTED_MAGIC_BYTES = {b"PK\x03\x04": "unzip", b"\x28\xb5\x2f\xfd": "zstd -d", b"7z\xbc\xaf\x27\x1c": "7z x"}
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
LINE_FEED, CARRIAGE_RETURN, TAB = b"\n\r\t"
NUMBER = re.compile(r"\s*[-+]?[0-9.,]*\s*")


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths in one flat array.

    Row i is flat[starts[i]:ends[i]]. `flat` has shape (N,); `starts` and `ends` are int64 (n,). Rows may be in any
    order, with gaps between them. Forked workers share the memory of an array. They would copy the memory of lists,
    because reading a Python object changes its reference count.
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
        """Return the rows with these `indices`, in this order, without copying `flat`."""
        return Ragged(self.flat, self.starts[indices], self.ends[indices])

    def divided(self, longest: int) -> tuple["Ragged", NDArray[np.int64]]:
        """Divide each row into pieces of `longest` elements, the last of which may be shorter, without copying `flat`.

        Returns the pieces, in order, and the index of each piece's row. An empty row gives no piece.
        """
        counts = -(-self.lengths // longest)  # (n,)
        owners = np.repeat(np.arange(len(self)), counts)  # (pieces,)
        firsts = np.repeat(np.cumsum(counts) - counts, counts)  # index of the first piece of each piece's row
        starts = self.starts[owners] + (np.arange(len(owners)) - firsts) * longest
        return Ragged(self.flat, starts, np.minimum(starts + longest, self.ends[owners])), owners

    @classmethod
    def of(cls, rows: Iterable[list[int]], end: int) -> "Ragged":
        """Store rows of token ids as int32, each followed by the id `end`."""
        return cls.of_parts(((row, True) for row in rows), end)

    @classmethod
    def of_parts(cls, parts: Iterable[tuple[list[int], bool]], end: int) -> "Ragged":
        """Store rows of token ids as `of` does; a row is given in parts, the last of which is True."""
        flat, bounds = array("i"), array("q", [0])
        for part, is_last in parts:
            flat.fromlist(part)
            if is_last:
                flat.append(end)
                bounds.append(len(flat))
        positions = np.frombuffer(bounds, np.int64)
        return cls(np.frombuffer(flat, np.int32), positions[:-1], positions[1:])


@dataclass(frozen=True)
class Lines:
    """A sequence of sentences, stored as UTF-8 in one array; `lines[i]` is a str."""

    rows: Ragged  # the bytes of each line, uint8

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str:
        return self.rows[index].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def take(self, indices: NDArray[np.int64]) -> "Lines":
        """Return the lines with these `indices`, in this order, without copying the text."""
        return Lines(self.rows.take(indices))

    def number(self, index: int) -> int:
        """Return the line number of `lines[index]` in its file, from 1; lines that `take` left out are counted, too."""
        return int(np.count_nonzero(self.rows.flat[: self.rows.starts[index]] == LINE_FEED)) + 1

    @classmethod
    def of(cls, texts: list[str]) -> "Lines":
        """Make `Lines` from texts that were not read from a file."""
        parts = [text.encode() + b"\n" for text in texts]
        bounds = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return cls(Ragged(np.frombuffer(b"".join(parts), np.uint8), bounds[:-1], bounds[1:] - 1))


def read_pair(source: Path, target: Path) -> tuple[Lines, Lines]:
    """Read two files with `read_two_files`; returns the source lines and the target lines without the notes."""
    return read_two_files(source, target)[:2]


def read_two_files(source: Path, target: Path) -> tuple[Lines, Lines, list[str]]:
    """Read a file with sentences and a file with their translations, one per line.

    Returns the source lines, the target lines, and notes on what was left out. If one file is longer only by blank
    lines at its end, these are left out. Raises UserError for a file that cannot be read, and for any other difference
    between the numbers of lines.
    """
    sides = read_lines(source), read_lines(target)
    counts = [len(side) for side in sides]
    shorter, (longer, path) = min(counts), max(zip(sides, (source, target), strict=True), key=lambda side: len(side[0]))
    surplus = len(longer) - shorter
    if any(longer[i].strip() for i in range(shorter, len(longer))):
        raise UserError(
            f"{source} has {counts[0]:,} lines and {target} has {counts[1]:,}; expected line n of the second to "
            "translate line n of the first; give two files with the same number of lines."
        )
    rows = np.arange(shorter)
    return sides[0].take(rows), sides[1].take(rows), [_blank_lines_note(surplus, path)] * bool(surplus)


def read_tabbed(path: Path) -> tuple[Lines, Lines, list[str]]:
    """Read a file with source, tab, target in every line.

    Returns the source lines, the target lines, and notes on what was not read. Lines at the end that are empty or only
    spaces are left out. If every line has the same number of columns, three or more, the first two columns are read.

    Raises UserError for a file that cannot be read, and for a line without a tab or with another number of columns than
    the first line. Also raises UserError if there are three or more columns and one of the first two has only numbers,
    because then the sentences must be in other columns.
    """
    lines = read_lines(path)
    count = len(lines)
    while count > 1 and not lines[count - 1].strip(" "):
        count -= 1
    rows = lines.rows.take(np.arange(count))
    notes = [_blank_lines_note(len(lines) - count, path)] * (count < len(lines))
    tabs = np.flatnonzero(rows.flat == TAB)
    first = np.searchsorted(tabs, rows.starts)
    counts = np.searchsorted(tabs, rows.ends) - first  # (n,)
    expected = max(int(counts[0]), 1)
    malformed = np.flatnonzero(counts != expected)
    if len(malformed):
        raise UserError(_layout_message(path, int(malformed[0]) + 1, int(counts[malformed[0]]), expected))
    middle = tabs[first]
    ends = tabs[first + 1] if expected > 1 else rows.ends
    sides = Lines(Ragged(rows.flat, rows.starts, middle)), Lines(Ragged(rows.flat, middle + 1, ends))
    if expected > 1:
        _refuse_numbers(path, sides)
        notes.append(f"{path} has {expected + 1} columns: the first was read as the source, the second as the target")
    return *sides, notes


def _blank_lines_note(count: int, path: Path) -> str:
    return f"{count:,} blank {'line' if count == 1 else 'lines'} at the end of {path} left out"


def _layout_message(path: Path, line: int, tabs: int, expected: int) -> str:
    """Return the error message for a line that has `tabs` tabs instead of `expected`."""
    number = f"{tabs or 'no'} {'tab' if tabs < 2 else 'tabs'}"
    if expected > 1:
        return (
            f"{path}: line {line} has {number}, and line 1 has {expected}; expected the same number of columns in "
            "every line, the first two of which are source and target; correct the line."
        )
    return (
        f"{path}: line {line} has {number}; expected source, one tab, target in every line; correct the line, or "
        f"remove other columns (cut -f1,2 FILE > pairs.tsv)."
    )


def _refuse_numbers(path: Path, sides: tuple[Lines, Lines]) -> None:
    """Raise UserError if the source or the target has only numbers (ids, scores) and so is not the right column."""
    for column, side in enumerate(sides, start=1):
        if all(NUMBER.fullmatch(text) for text in side):
            raise UserError(
                f"{path}: column {column} of three or more has only numbers; expected sentences in the first two "
                "columns; write a file with the columns of source and target, as cut -f2,3 FILE > pairs.tsv does."
            )


def read_lines(path: Path, *, check_lines: bool = True) -> Lines:
    """Read a file's lines without line ends; raises UserError if it is missing, broken, empty or not UTF-8.

    With check_lines=False, a file with invalid UTF-8 raises an error only if it also has a null byte. The caller must
    then handle invalid lines when decoding them.
    """
    content = _content(path).removeprefix(BYTE_ORDER_MARK)
    if not content:
        raise UserError(f"The file {path} is empty; expected one sentence per line.")
    refuse_carriage_returns(content, str(path))
    try:
        content.decode()
    except UnicodeDecodeError as error:
        if check_lines or b"\0" in content:  # a null byte occurs in UTF-16, and in files that are not text
            raise encoding_error(path, content.count(b"\n", 0, error.start) + 1, content[error.start]) from error
    flat = np.frombuffer(content, np.uint8)
    ends = np.flatnonzero(flat == LINE_FEED)
    if not content.endswith(b"\n"):
        ends = np.append(ends, len(flat))
    starts = np.concatenate([[0], ends[:-1] + 1])
    returns = (ends > starts) & (flat[ends - 1] == CARRIAGE_RETURN)
    return Lines(Ragged(flat, starts, ends - returns))


def encoding_error(path: Path, line: int, byte: int) -> UserError:
    """The error for a file whose line number `line` has a byte that is not UTF-8."""
    return UserError(
        f"{path}: line {line} is not valid UTF-8 (byte 0x{byte:02x}); convert the file to UTF-8, or correct the line."
    )


def refuse_carriage_returns(content: bytes, name: str) -> None:
    """Raise UserError if `content` has carriage returns and no line feed, as files of the classic Mac OS do.

    One carriage return at the end of `content` is permitted. `name` names the file in the message.
    """
    if b"\n" not in content and b"\r" in content[:-1]:
        raise carriage_returns_error(name)


def carriage_returns_error(name: str) -> UserError:
    """The error for text whose lines end with carriage returns alone; see `refuse_carriage_returns`."""
    return UserError(
        f"{name} has carriage returns and no line feed, so that all of it would be one line; convert the line ends "
        r"(tr '\r' '\n' < FILE > NEW)."
    )


def _content(path: Path) -> bytes:
    """Read a file's bytes and decompress them, see `compression`; raises UserError for a file that cannot be read."""
    with open_text(path) as file:
        content = file.read()
    module = compression(content, path)
    return content if module is None else decompressed(content, module, path)


@contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading bytes; raises UserError if it is missing or cannot be opened or read."""
    try:
        with open_regular(path) as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}; correct its path.") from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{path} cannot be read ({reason}); give a text file, compressed or not.") from error


def compression(start: bytes, path: Path) -> str | None:
    """The name of the module that decompresses a file with these first bytes, at least 16; None for plain text.

    The ending of the file's name is not considered. Raises UserError for a format that is not supported.
    """
    for magic, command in UNSUPPORTED_MAGIC_BYTES.items():
        if start.startswith(magic):
            raise UserError(
                f"{path} is compressed in an unsupported format; decompress it ({command} FILE), or give plain text, "
                "gzip, bzip2 or xz."
            )
    return next((name for magic, name in MAGIC_BYTES.items() if start.startswith(magic)), None)


def decompressed(content: bytes, module: str, path: Path) -> bytes:
    """Decompress the content of a file by a `module` of `compression`; raises UserError if the content is broken."""
    name = {"gzip": "gzip", "bz2": "bzip2", "lzma": "xz"}[module]
    try:
        library = importlib.import_module(module)
    except ImportError as error:  # this Python was built without the module
        raise UserError(f"{path} is compressed by {name}, which this Python lacks; decompress it first.") from error
    broken = (OSError, EOFError, ValueError, zlib.error, *([library.LZMAError] if module == "lzma" else []))
    try:
        text: bytes = library.decompress(content)
        return text
    except broken as error:
        raise UserError(f"{path} is a broken {name} file ({error}); download or compress it again.") from error
