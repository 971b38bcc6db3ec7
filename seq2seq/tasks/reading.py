"""The lines that a user wants translated, from a file, a pipe or a terminal.

A line ends with a line feed, with or without a carriage return before it, as in tokenizers/text.py. An empty line is a
line, so that the output has as many lines as the input.
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
from seq2seq.tokenizers.text import BYTE_ORDER_MARK, read_lines

READ_BYTES = 1 << 16  # at once; the capacity of a pipe on Linux
PROMPT = "> "


class Line(NamedTuple):
    """A line without its line end."""

    number: int  # from 1
    text: str


def lines(input: str, group_size: int) -> Iterator[list[Line]]:
    """Groups of 1 to `group_size` consecutive lines of the text file `input`, or of standard input for "-".

    From a pipe, a group has the lines that have arrived, so that a single line is translated at once and a large file
    in large groups; an empty pipe gives no group. A terminal prompts for one line at a time, until Ctrl-D or Ctrl-C.
    Raises UserError for a file that is missing, broken or empty, and for a line that is not UTF-8, after the group of
    the lines before it if they come from a pipe.
    """
    if input != "-":
        yield from _file_groups(Path(input), group_size)
    elif sys.stdin is None:  # the caller has closed it
        raise UserError("input=- reads standard input, which is closed; give a file, or a pipe.")
    elif sys.stdin.isatty():
        yield from _terminal_groups()
    else:
        yield from _pipe_groups(sys.stdin.fileno(), group_size)


def _file_groups(path: Path, group_size: int) -> Iterator[list[Line]]:
    texts = read_lines(path)
    for start in range(0, len(texts), group_size):
        yield [Line(i + 1, texts[i]) for i in range(start, min(start + group_size, len(texts)))]


def _terminal_groups() -> Iterator[list[Line]]:
    """One line at a time until Ctrl-D or Ctrl-C, with line editing if the output is a terminal, too."""
    read_line: Callable[[str], str] = _input_with_prompt_on_stderr
    if sys.stdout.isatty():  # otherwise input() would write its prompt into the translations
        read_line = input
        with suppress(ImportError):  # not available on every system
            importlib.import_module("readline")  # importing it gives input() line editing
    for number in itertools.count(1):
        try:
            text = read_line(PROMPT)
            text.encode()  # with the C locale, Python turns invalid bytes into surrogates
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)  # so that the shell's prompt begins on a line of its own
            return
        except UnicodeError as error:
            raise _not_utf8(number) from error
        yield [Line(number, text)]


def _input_with_prompt_on_stderr(prompt: str) -> str:
    """Like input(), but standard output stays free of the prompt."""
    print(prompt, end="", file=sys.stderr, flush=True)
    raw = sys.stdin.buffer.readline()
    if not raw:
        raise EOFError
    return _text(raw.removesuffix(b"\n"))


def _pipe_groups(pipe: int, group_size: int) -> Iterator[list[Line]]:
    """Groups from a file descriptor, read without Python's buffer, which would wait until it is full."""
    complete: deque[bytes] = deque()  # lines that are not in a group yet
    partial = bytearray()  # the beginning of the next line
    number, is_open = 1, True
    while is_open or complete:
        while is_open and len(complete) < group_size and _is_readable(pipe, wait=not complete):
            chunk = _read(pipe)
            first, *rest = chunk.split(b"\n")
            partial += first
            if rest:
                complete += [bytes(partial), *rest[:-1]]
                partial = bytearray(rest[-1])
            if not chunk:
                is_open = False
                complete += [bytes(partial)] if partial else []  # the last line lacks a line end
        group = [complete.popleft() for _ in range(min(group_size, len(complete)))]
        yield from _decode(group, number)
        number += len(group)


def _is_readable(pipe: int, wait: bool) -> bool:
    """Whether a read returns at once, with bytes or at the end of the stream; `wait` waits until it does."""
    if sys.platform == "win32":  # its select accepts only sockets; without it, groups are smaller
        return wait
    return bool(select.select([pipe], [], [], None if wait else 0)[0])


def _read(pipe: int) -> bytes:
    """The next bytes, at least one; empty at the end of the stream."""
    try:
        return os.read(pipe, READ_BYTES)
    except OSError as error:
        raise UserError(f"Standard input cannot be read ({error.strerror}); give a file, or a pipe.") from error


def _decode(group: list[bytes], number: int) -> Iterator[list[Line]]:
    """One group of lines, numbered from `number`; a line that is not UTF-8 ends it and raises UserError afterwards."""
    decoded: list[Line] = []
    for i, raw in enumerate(group, start=number):
        try:
            decoded.append(Line(i, _text(raw.removeprefix(BYTE_ORDER_MARK) if i == 1 else raw)))
        except UnicodeDecodeError as error:
            if decoded:
                yield decoded
            raise _not_utf8(i) from error
    if decoded:
        yield decoded


def _text(raw: bytes) -> str:
    return raw.removesuffix(b"\r").decode()


def _not_utf8(number: int) -> UserError:
    return UserError(
        f"Standard input: line {number} is not valid UTF-8; convert the text to UTF-8, or correct the line."
    )
