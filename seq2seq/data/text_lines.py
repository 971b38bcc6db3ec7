"""The lines of text files of any size, read by memory map: a line is decoded when it is asked for.

Files are in UTF-8. A line ends with a line feed, with or without a carriage return before it, as in
seq2seq/tokenizers/text.py.
"""

import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.files import inputs
from seq2seq.tokenizers.text import (
    BYTE_ORDER_MARK,
    CARRIAGE_RETURN,
    LINE_FEED,
    carriage_returns_error,
    compression,
    decompressed,
    encoding_error,
    open_text,
)

SCAN_BYTES = 1 << 24  # bytes that are checked and searched for line ends at a time
MAX_MAGIC_BYTES = 16  # as many first bytes as `compression` needs
MAX_SEARCH_BYTES = 1 << 16  # how far from a position the next line end is searched for
SPACE = ord(" ")
CONTINUATION, CONTINUATION_MASK = 0x80, 0xC0  # the second and later bytes of a UTF-8 character are 0b10xxxxxx


def text_files(key: str, name: str) -> list[Path]:
    """The files that `key`=`name` stands for: one path, or the files that match a pattern such as texts/*.txt, sorted.

    Raises UserError for a pattern that no file matches.
    """
    path = Path(name).expanduser()
    if not inputs.is_pattern(str(path)):
        return [path]
    paths = [match for match in inputs.matches(str(path)) if match.is_file()]
    if not paths:
        raise UserError(f"{key}={name}: no file matches this pattern; give a text file, or another pattern.")
    return paths


class TextLines(Sequence[str]):
    """The lines of one or more text files, one file after the other, without line ends.

    Besides the mapped files, 8 bytes a line are held in memory. A file that is compressed (gzip, bzip2 or xz) is
    decompressed in memory. Raises UserError for a file that is missing, broken or not UTF-8, and if the files hold
    nothing but white space.
    """

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        self._files = [_MappedFile(path) for path in paths]
        self._firsts = np.cumsum([0, *(len(file.ends) for file in self._files)])  # number of lines before each file
        self._offsets = np.cumsum([0, *(len(file.flat) for file in self._files)])  # number of bytes before each file
        self.total = int(self._offsets[-1])  # bytes of all files, with line ends
        if not any(file.has_text for file in self._files):
            names = ", ".join(map(str, self.paths)) or "an empty list of files"
            raise UserError(f"{names}: there is no text, only white space or nothing; give files with text in UTF-8.")

    def __len__(self) -> int:
        return int(self._firsts[-1])

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """A line or, for a slice, a list of lines; raises IndexError beyond the last one."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        file = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return self._files[file].line(index - int(self._firsts[file]))

    def __iter__(self) -> Iterator[str]:
        for file in self._files:
            yield from map(file.line, range(len(file.ends)))

    def where(self, index: int) -> str:
        """The file and the number of a line, from 1, for messages."""
        file = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return f"line {index - int(self._firsts[file]) + 1:,} of {self.paths[file]}"

    def chunks(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[str]:
        r"""Yield the text in pieces of at most about `size` UTF-8 bytes; every line ends with "\n".

        A piece ends after a line. A line of more than `size` bytes is cut before a space or, if a piece has no space,
        between two characters. No piece holds text of two files. With `start` and `stop`, which `cut` returns, the text
        is that between these two positions.
        """
        stop = self.total if stop is None else stop
        for file, first in zip(self._files, self._offsets.tolist(), strict=False):
            yield from file.chunks(size, max(0, start - first), min(len(file.flat), stop - first))

    def cut(self, position: int, reach: int = MAX_SEARCH_BYTES) -> int:
        """The first position from `position` on at which the text can be cut, in bytes of all files from 0 to `total`.

        It is the start of the next line or, if that is more than `reach` bytes away, or there is no further line in the
        file, the next space within `reach` bytes or, without one, the next character.
        """
        if position >= self.total:
            return self.total
        file = int(np.searchsorted(self._offsets, position, side="right")) - 1
        first = int(self._offsets[file])
        return first + self._files[file].cut(position - first, reach)


class _MappedFile:
    """The bytes of a file and the positions of its line ends."""

    def __init__(self, path: Path):
        self.path, self.flat = path, _map(path)
        self.has_text = False
        self._line_feeds = self._returns = 0
        parts = list(self._scan())
        last = int(self.flat[-1]) if len(self.flat) else LINE_FEED
        if not self._line_feeds and self._returns > (last == CARRIAGE_RETURN):
            raise carriage_returns_error(str(path))
        if last != LINE_FEED:
            parts.append(np.array([len(self.flat)]))
        self.ends: NDArray[np.int64] = np.concatenate([np.empty(0, np.int64), *parts])  # of lines, exclusive

    def _scan(self) -> Iterator[NDArray[np.int64]]:
        """Check the encoding; yield the positions of line feeds, and count line feeds and carriage returns."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        for start in range(0, len(self.flat), SCAN_BYTES):
            part = self.flat[start : start + SCAN_BYTES]
            pending = len(decoder.getstate()[0])  # bytes of an incomplete character at the end of the last part
            try:
                text = decoder.decode(part.tobytes(), start + SCAN_BYTES >= len(self.flat))
            except UnicodeDecodeError as error:
                at = start - pending + error.start
                line = self._line_feeds + int(np.count_nonzero(self.flat[start : max(start, at)] == LINE_FEED)) + 1
                raise encoding_error(self.path, line, int(self.flat[at])) from error
            self.has_text = self.has_text or bool(text and not text.isspace())
            ends = np.flatnonzero(part == LINE_FEED) + start
            self._line_feeds += len(ends)
            self._returns += int(np.count_nonzero(part == CARRIAGE_RETURN))
            yield ends

    def line(self, index: int) -> str:
        start = int(self.ends[index - 1]) + 1 if index else 0
        return self.flat[start : int(self.ends[index])].tobytes().decode().removesuffix("\r")

    def chunks(self, size: int, start: int, end: int) -> Iterator[str]:
        """Yield the text from byte `start` to byte `end`; see `TextLines.chunks`."""
        while start < end:
            stop = self._end_of_piece(start, min(start + size, end)) if start + size < end else end
            text = self.flat[start:stop].tobytes().decode().replace("\r\n", "\n")
            complete = stop < len(self.flat) or text.endswith("\n")
            yield text if complete else text.removesuffix("\r") + "\n"
            start = stop

    def _end_of_piece(self, start: int, stop: int) -> int:
        """Where to end a piece of at most about stop - start bytes; see `TextLines.chunks`."""
        preceding = int(np.searchsorted(self.ends, stop))  # number of line ends before `stop`
        if preceding and self.ends[preceding - 1] >= start:
            return int(self.ends[preceding - 1]) + 1
        spaces = np.flatnonzero(self.flat[start + 1 : stop] == SPACE)
        return start + 1 + int(spaces[-1]) if len(spaces) else self._next_character(stop)

    def cut(self, position: int, reach: int) -> int:
        """See `TextLines.cut`; the position is one in this file."""
        if position == 0:
            return 0
        end = int(self.ends[np.searchsorted(self.ends, position - 1)])  # of the line that holds the byte before
        if end - position < reach and end + 1 < len(self.flat):
            return end + 1
        spaces = np.flatnonzero(self.flat[position : position + reach] == SPACE)
        return position + int(spaces[0]) if len(spaces) else self._next_character(position)

    def _next_character(self, position: int) -> int:
        """The first byte from `position` on that begins a character, after a line feed at `position`, if there is one.

        So no cut is between a carriage return and a line feed.
        """
        while position < len(self.flat) and self.flat[position] & CONTINUATION_MASK == CONTINUATION:
            position += 1
        return position + int(position < len(self.flat) and self.flat[position] == LINE_FEED)


def _map(path: Path) -> NDArray[Any]:
    """The bytes of a text file without a byte order mark, mapped or, if it is compressed, decompressed: uint8 (N,)."""
    with open_text(path) as file:
        module = compression(file.read(MAX_MAGIC_BYTES), path)
        if module is not None:
            file.seek(0)
            flat: NDArray[Any] = np.frombuffer(decompressed(file.read(), module, path), np.uint8)
        elif file.seek(0, 2):
            flat = np.asarray(np.memmap(file, np.uint8, mode="r"))
        else:
            flat = np.empty(0, np.uint8)  # an empty file cannot be mapped
    return flat[len(BYTE_ORDER_MARK) :] if flat[: len(BYTE_ORDER_MARK)].tobytes() == BYTE_ORDER_MARK else flat
