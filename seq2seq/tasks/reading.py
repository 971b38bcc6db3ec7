"""The lines that a user wants translated, from a file, a pipe or a terminal.

A line ends with a line feed, with or without a carriage return before it, as in tokenizers/text.py. Empty lines
count, so that the output has as many lines as the input.
"""

import importlib
import itertools
import os
import select
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError
from common.files import inputs
from seq2seq.tokenizers.text import (
    BYTE_ORDER_MARK,
    MAGIC_BYTES,
    UNSUPPORTED_MAGIC_BYTES,
    UTF_16_MARKS,
    read_lines,
    refuse_carriage_returns,
)

READ_BYTES = 1 << 16  # of one read; the capacity of a pipe on Linux
PROMPT = "> "


class Line(NamedTuple):
    """A line without its line end."""

    number: int  # from 1, over all files of the input
    text: str
    problem: str = ""  # why the line cannot be translated; if it is set, `text` is empty
    origin: str = ""  # the file and the number in it, if the input is several files


def lines(input: str, group_size: int) -> Iterator[list[Line]]:
    """Yield groups of 1 to `group_size` consecutive lines of the text file `input`, or of standard input for "-".

    If `input` is a pattern such as texts/*.txt, the lines are those of all matching files, one file after the other.
    From a pipe, a group contains the lines that have arrived: a single line is translated at once, a large file in
    large groups, and an empty pipe gives no group. A terminal shows a prompt for each line until Ctrl-D or Ctrl-C. A
    line that is not UTF-8 has a `problem`. Raises UserError for a file that is missing, broken, empty or no text, and
    for a pipe that begins as a compressed file or as UTF-16.
    """
    if input != inputs.STANDARD_INPUT:
        yield from _file_groups(_text_files(input), group_size)
    elif sys.stdin is None:  # the caller has closed it
        raise UserError("input=- reads standard input, which is closed; give a file, or a pipe.")
    elif sys.stdin.isatty():
        yield from _terminal_groups()
    else:
        yield from _pipe_groups(sys.stdin.fileno(), group_size)


def _text_files(input: str) -> list[Path]:
    """The text file `input`, or the files that match a pattern."""
    if Path(input).is_dir():
        raise UserError(f"input={input} is a folder; give a text file, or a pattern such as {Path(input, '*.txt')}.")
    if not inputs.is_pattern(input):
        return [Path(input)]
    files = [path for path in inputs.matches(input) if not path.is_dir()]
    if not files:
        raise UserError(f"input={input}: no file matches this pattern; give a text file, or another pattern.")
    return files


def _file_groups(files: list[Path], group_size: int) -> Iterator[list[Line]]:
    count = 0  # of lines in the files before
    for file, rows in [(file, read_lines(file, check_lines=False).rows) for file in files]:  # all, before an answer
        for start in range(0, len(rows), group_size):
            numbers = range(start + 1, min(start + group_size, len(rows)) + 1)
            group = [_line(number, rows[number - 1].tobytes()) for number in numbers]
            if len(files) > 1:
                group = [line._replace(number=count + line.number, origin=f"{file}:{line.number}") for line in group]
            yield group
        count += len(rows)


def _terminal_groups() -> Iterator[list[Line]]:
    """One line at a time until Ctrl-D or Ctrl-C, with line editing if the output is also a terminal."""
    read_line: Callable[[str], str] = _input_with_prompt_on_stderr
    if sys.stdout.isatty():  # otherwise input() would write its prompt into the translations
        read_line = input
        with suppress(ImportError):  # not available on every system
            importlib.import_module("readline")  # importing it gives input() line editing
    for number in itertools.count(1):
        try:
            # With the C locale, Python decodes invalid bytes to surrogates; this restores the bytes.
            raw = read_line(PROMPT).encode("utf-8", "surrogateescape")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)  # so that the shell's prompt begins on a line of its own
            return
        yield [_line(number, raw)]


def _input_with_prompt_on_stderr(prompt: str) -> str:
    """Like input(), but with the prompt on standard error."""
    print(prompt, end="", file=sys.stderr, flush=True)
    raw = sys.stdin.buffer.readline()
    if not raw:
        raise EOFError
    return raw.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", "surrogateescape")


def _pipe_groups(pipe: int, group_size: int) -> Iterator[list[Line]]:
    """Groups of lines from a file descriptor; Python's buffered reading would wait until the buffer is full."""
    complete: deque[bytes] = deque()  # lines that are not in a group yet
    partial = bytearray()  # the beginning of the next line
    number, is_start, is_open = 1, True, True
    while is_open or complete:
        while is_open and len(complete) < group_size and _is_readable(pipe, wait=not complete):
            chunk = _read(pipe)
            if is_start:
                _refuse_binary(chunk)
            is_start = False
            first, *rest = chunk.split(b"\n")
            partial += first
            if rest:
                complete += [bytes(partial), *rest[:-1]]
                partial = bytearray(rest[-1])
            if not chunk:
                is_open = False
                if number == 1 and not complete:  # there was no line feed
                    refuse_carriage_returns(bytes(partial), "Standard input")
                complete += [bytes(partial)] if partial else []  # a last line without a line end
        group = [complete.popleft() for _ in range(min(group_size, len(complete)))]
        if group:
            yield [_line(i, raw.removesuffix(b"\r")) for i, raw in enumerate(group, start=number)]
        number += len(group)


def _refuse_binary(start: bytes) -> None:
    """Raise UserError if the first bytes of a pipe cannot be those of text in UTF-8."""
    if start.startswith((*MAGIC_BYTES, *UNSUPPORTED_MAGIC_BYTES)):
        raise UserError(
            "Standard input is compressed; decompress it first (zcat FILE | python predict.py ...), or give input=FILE."
        )
    if start.startswith(UTF_16_MARKS):
        raise UserError("Standard input is UTF-16; convert it to UTF-8 first (iconv -f utf-16 -t utf-8 FILE).")


def _is_readable(pipe: int, wait: bool) -> bool:
    """Whether a read would return at once (bytes, or the end of the stream); with `wait`, wait until it would."""
    if sys.platform == "win32":  # its select accepts only sockets; without it, groups are smaller
        return wait
    return bool(select.select([pipe], [], [], None if wait else 0)[0])


def _read(pipe: int) -> bytes:
    """The next bytes, at least one; empty at the end of the stream."""
    try:
        return os.read(pipe, READ_BYTES)
    except OSError as error:
        raise UserError(f"Standard input cannot be read ({error.strerror}); give a file, or a pipe.") from error


def _line(number: int, raw: bytes) -> Line:
    """Decode the line `number`; line 1 loses a byte order mark at its start."""
    raw = raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw
    try:
        return Line(number, raw.decode())
    except UnicodeDecodeError as error:
        invalid = f"it is not valid UTF-8 (byte 0x{raw[error.start]:02x})"
        return Line(number, "", f"{invalid}; convert the text to UTF-8, or correct the line")
