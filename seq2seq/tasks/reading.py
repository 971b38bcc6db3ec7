"""Read the lines of a user's texts, such as sentences to translate, from files, a pipe or a terminal.

A line ends with a line feed, with or without a carriage return before it, as in seq2seq/tokenizers/text.py. Empty lines
are yielded, too, so that there can be a line of output for each line of input.
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

LINES_PER_BATCH = 64  # maximum number of lines of a user's input in one batch
READ_BYTES = 1 << 16  # maximum number of bytes of one read; the capacity of a pipe on Linux
PROMPT = "> "


class Line(NamedTuple):
    """A line without its line end."""

    number: int  # counted from 1 over all files of the input
    text: str
    problem: str = ""  # why the line cannot be used; if it is set, `text` is empty
    origin: str = ""  # FILE:NUMBER, counted within the file; empty if there is only one file


def lines(input: str, group_size: int) -> Iterator[list[Line]]:
    """Yield groups of 1 to `group_size` consecutive lines of the text file `input`, or of standard input for "-".

    If `input` is a pattern such as texts/*.txt, the lines are those of all matching files, one file after the other.
    From a pipe, a group contains the lines that have arrived, at most `group_size`. No group is delayed until it is
    full, so a line that arrives alone is a group of one. An empty pipe gives no group. At a terminal, each line is a
    group, and a prompt asks for the next line until Ctrl-D or Ctrl-C. A line that is not UTF-8 has a `problem`.

    Raises UserError for a folder, for a file that is missing, broken, empty or not text, and for a pattern that no file
    matches. Also raises UserError for a pipe whose content is compressed or UTF-16, and if standard input is closed.
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
    """The path `input`, or the files that match it if it is a pattern.

    Raises UserError for a folder, and for a pattern that no file matches.
    """
    if Path(input).is_dir():
        raise UserError(f"input={input} is a folder; give a text file, or a pattern such as {Path(input, '*.txt')}.")
    if not inputs.is_pattern(input):
        return [Path(input)]
    files = [path for path in inputs.matches(input) if not path.is_dir()]
    if not files:
        raise UserError(f"input={input}: no file matches this pattern; give a text file, or another pattern.")
    return files


def _file_groups(files: list[Path], group_size: int) -> Iterator[list[Line]]:
    count = 0  # of lines in the preceding files
    # All files are read before the first group, so that a broken file is reported before any answer.
    for file, rows in [(file, read_lines(file, check_lines=False).rows) for file in files]:
        for start in range(0, len(rows), group_size):
            numbers = range(start + 1, min(start + group_size, len(rows)) + 1)
            group = [_line(number, rows[number - 1].tobytes()) for number in numbers]
            if len(files) > 1:
                group = [line._replace(number=count + line.number, origin=f"{file}:{line.number}") for line in group]
            yield group
        count += len(rows)


def _terminal_groups() -> Iterator[list[Line]]:
    """Yield one line at a time until Ctrl-D or Ctrl-C, with line editing if standard output is also a terminal."""
    read_line: Callable[[str], str] = _input_with_prompt_on_stderr
    if sys.stdout.isatty():  # otherwise input() would write its prompt into the answers
        read_line = input
        with suppress(ImportError):  # not available on every system
            importlib.import_module("readline")  # importing it gives input() line editing
    for number in itertools.count(1):
        try:
            # In the C locale, input() decodes invalid bytes to surrogates; encoding restores the bytes.
            raw = read_line(PROMPT).encode("utf-8", "surrogateescape")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)  # so that the shell's prompt begins on a new line
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
    """Yield groups of the lines that have arrived on the file descriptor `pipe`.

    The descriptor is read directly, because Python's buffered reading would wait until its buffer is full.
    """
    complete: deque[bytes] = deque()  # lines that have arrived but are not in a group yet
    partial = bytearray()  # a line whose end has not arrived yet
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
                if number == 1 and not complete:  # no line feed has arrived
                    refuse_carriage_returns(bytes(partial), "Standard input")
                complete += [bytes(partial)] if partial else []  # a last line without a line end
        group = [complete.popleft() for _ in range(min(group_size, len(complete)))]
        if group:
            yield [_line(i, raw.removesuffix(b"\r")) for i, raw in enumerate(group, start=number)]
        number += len(group)


def _refuse_binary(start: bytes) -> None:
    """Raise UserError if the first bytes of a pipe are those of a compressed file, or a UTF-16 byte order mark."""
    if start.startswith((*MAGIC_BYTES, *UNSUPPORTED_MAGIC_BYTES)):
        raise UserError(
            "Standard input is compressed; decompress it first (zcat FILE | python predict.py ...), or give input=FILE."
        )
    if start.startswith(UTF_16_MARKS):
        raise UserError("Standard input is UTF-16; convert it to UTF-8 first (iconv -f utf-16 -t utf-8 FILE).")


def _is_readable(pipe: int, wait: bool) -> bool:
    """Whether a read would return bytes or the end of the stream at once; with `wait`, wait until it would."""
    if sys.platform == "win32":  # Windows' select takes no pipes; a group ends with the read that completes a line
        return wait
    return bool(select.select([pipe], [], [], None if wait else 0)[0])


def _read(pipe: int) -> bytes:
    """Wait for and return the next bytes; empty only at the end of the stream. Raises UserError if reading fails."""
    try:
        return os.read(pipe, READ_BYTES)
    except OSError as error:
        raise UserError(f"Standard input cannot be read ({error.strerror}); give a file, or a pipe.") from error


def _line(number: int, raw: bytes) -> Line:
    """Decode the line `number`, without the byte order mark if line 1 has one; invalid UTF-8 is stated in `problem`."""
    raw = raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw
    try:
        return Line(number, raw.decode())
    except UnicodeDecodeError as error:
        invalid = f"it is not valid UTF-8 (byte 0x{raw[error.start]:02x})"
        return Line(number, "", f"{invalid}; convert the text to UTF-8, or correct the line")
