"""Lines to translate, as a user gives them: a file, a pipe, or one after another in a terminal.

A line ends with a line feed, with or without a carriage return before it, and nowhere else: see tokenizers/text.py.
An empty line is a line, so that the answers have as many lines as the question.
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
from seq2seq.tokenizers.text import MARK, read_lines

READ_BYTES = 1 << 16  # bytes that are read at once: as much as a pipe holds on Linux
PROMPT = "> "


class Line(NamedTuple):
    """A line of the user's, without its end."""

    number: int  # from 1
    text: str


def lines(input: str, most: int) -> Iterator[list[Line]]:
    """Groups of 1 to `most` consecutive lines: of the file `input` (gzip or not), or of standard input for "-".

    A pipe gives what has arrived so far, so that a single line is answered at once and a large file in large groups;
    an empty pipe gives nothing. A terminal is asked for one line at a time, until Ctrl-D or Ctrl-C. Raises UserError
    for a file that is missing, broken or empty, and for a line that is not UTF-8; a pipe's lines before it come first.
    """
    if input != "-":
        yield from _filed(Path(input), most)
    elif sys.stdin is None:  # the caller has closed it
        raise UserError("input=- reads standard input, which is closed; give a file, or a pipe.")
    elif sys.stdin.isatty():
        yield from _typed()
    else:
        yield from _piped(sys.stdin.fileno(), most)


def _filed(path: Path, most: int) -> Iterator[list[Line]]:
    texts = read_lines(path)
    for start in range(0, len(texts), most):
        yield [Line(i + 1, texts[i]) for i in range(start, min(start + most, len(texts)))]


def _typed() -> Iterator[list[Line]]:
    """What a person types, with line editing where the output is a terminal too, until Ctrl-D or Ctrl-C."""
    ask: Callable[[str], str] = _ask
    if sys.stdout.isatty():  # elsewhere input() would write its prompt among the answers
        ask = input
        with suppress(ImportError):  # not there on every system
            importlib.import_module("readline")  # gives input() its line editing, by being imported
    for number in itertools.count(1):
        try:
            text = ask(PROMPT)
            text.encode()  # in an old-fashioned locale Python hides invalid bytes in the text
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)  # what the shell says next has a line of its own
            return
        except UnicodeError as error:
            raise _not_utf8(number) from error
        yield [Line(number, text)]


def _ask(prompt: str) -> str:
    """As input(), with the prompt on standard error."""
    print(prompt, end="", file=sys.stderr, flush=True)
    raw = sys.stdin.buffer.readline()
    if not raw:
        raise EOFError
    return _text(raw.removesuffix(b"\n"))


def _piped(pipe: int, most: int) -> Iterator[list[Line]]:
    """Groups of what a file descriptor gives, read past Python's own buffer, which would wait until it is full."""
    waiting: deque[bytes] = deque()  # whole lines
    rest = bytearray()  # the beginning of one more
    number, is_open = 1, True
    while is_open or waiting:
        while is_open and len(waiting) < most and _has_more(pipe, wait=not waiting):
            chunk = _read(pipe)
            first, *others = chunk.split(b"\n")
            rest += first
            if others:
                waiting += [bytes(rest), *others[:-1]]
                rest = bytearray(others[-1])
            if not chunk:
                is_open = False
                waiting += [bytes(rest)] if rest else []  # the last line lacks its end
        group = [waiting.popleft() for _ in range(min(most, len(waiting)))]
        yield from _decoded(group, number)
        number += len(group)


def _has_more(pipe: int, wait: bool) -> bool:
    """Whether a read would return at once: bytes or the end are there. With `wait`, once it would."""
    if sys.platform == "win32":  # where select knows sockets alone; groups are smaller then
        return wait
    return bool(select.select([pipe], [], [], None if wait else 0)[0])


def _read(pipe: int) -> bytes:
    """The next bytes, at least one; none at the end."""
    try:
        return os.read(pipe, READ_BYTES)
    except OSError as error:
        raise UserError(f"Standard input cannot be read ({error.strerror}); give a file, or a pipe.") from error


def _decoded(group: list[bytes], number: int) -> Iterator[list[Line]]:
    """The lines from `number` on as one group; up to one that is not UTF-8, of which an error tells afterwards."""
    found: list[Line] = []
    for i, raw in enumerate(group, start=number):
        try:
            found.append(Line(i, _text(raw.removeprefix(MARK) if i == 1 else raw)))
        except UnicodeDecodeError as error:
            if found:
                yield found
            raise _not_utf8(i) from error
    if found:
        yield found


def _text(raw: bytes) -> str:
    return raw.removesuffix(b"\r").decode()


def _not_utf8(number: int) -> UserError:
    return UserError(f"Standard input: line {number} is not valid UTF-8; convert the text to UTF-8, or mend the line.")
