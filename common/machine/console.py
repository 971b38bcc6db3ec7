"""Guard standard output and standard error, so that a failed write to them does not end the process.

Writing fails when the terminal is closed, when the reader of a pipe has ended (`| head -3`, or `| tee log` after
Ctrl-C), or when a disk is full.
"""

import errno
import io
import os
import re
import select
import sys
from contextlib import suppress
from typing import Any

# The control codes C0 (except tab and newline), DEL and C1, the line and paragraph separators, and the marks that
# override the direction of text.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
STREAMS = {"stdout": "standard output", "stderr": "standard error"}


class _Output(io.FileIO):
    """Unbuffered output to a descriptor. After a failed write, the descriptor is redirected to the null device.

    The redirection also affects other code that writes to the descriptor.
    """

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write some or all of `data`; returns the number of bytes written.

        If writing fails, `data` is discarded, and its size is returned.
        """
        try:
            while (count := super().write(data)) is None:  # the pipe is full, and another program made it non-blocking
                select.select([], [self], [])
            return count
        except OSError as error:
            self.failure = error
            with suppress(OSError):  # if no descriptor is free, the next write fails and redirection is tried again
                _discard(self.fileno())
            return memoryview(data).nbytes


class _Text(io.TextIOWrapper):
    """A guarded text stream. If `escapes` is True, characters that could control a terminal are escaped.

    A carriage return at the start of a text is not escaped, because tqdm writes it to redraw its bar.
    """

    escapes = True

    def write(self, text: str) -> int:
        """Write `text`; returns its number of characters."""
        start = "\r" if text.startswith("\r") else ""
        super().write(start + escape_controls(text[len(start) :]) if self.escapes else text)
        return len(text)


def escape_controls(text: str) -> str:
    r"""Escape characters that control a terminal or override text direction. For example, ESC becomes \x1b.

    Tab and newline are not escaped.
    """
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def guard() -> None:
    """Guard sys.stdout and sys.stderr: no write raises an error, and no text can control a terminal.

    Characters that a stream's encoding lacks are escaped, and text that cannot be written is discarded.

    A stream that was closed before the start (`>&-`) is opened on the null device; otherwise the next file that is
    opened would get its descriptor. A stream that is not an `io.TextIOWrapper`, such as a notebook's, is left
    unchanged.
    """
    for descriptor, name in enumerate(STREAMS, 1):
        stream = getattr(sys, name)
        if stream is None:
            if not _is_open(descriptor):
                _discard(descriptor)
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper) and _output(stream) is None:
            try:
                setattr(sys, name, _guarded(stream))
            except io.UnsupportedOperation:  # a stream in memory has no descriptor
                stream.reconfigure(errors="backslashreplace")


def failures() -> dict[str, OSError]:
    """The streams to which a write has failed, as a dict: name such as "standard output" -> error of the write."""
    outputs = {text: _output(getattr(sys, name)) for name, text in STREAMS.items()}
    return {text: output.failure for text, output in outputs.items() if output is not None and output.failure}


def is_read() -> bool:
    """Whether standard output may still be read: False after a write failed because the pipe's reader had ended."""
    failure = failures().get(STREAMS["stdout"])
    return failure is None or failure.errno != errno.EPIPE


def exit_code(code: int) -> int:
    """The exit code of a command that would otherwise exit with `code`.

    If a write to standard output failed, text is lost. A sentence on standard error then says so, and a code of 0
    becomes 2. Text that is not written because the reader of a pipe has ended (`| head -1`) does not count as lost.
    """
    if sys.stdout is not None:
        sys.stdout.flush()
    failure = failures().get(STREAMS["stdout"])
    if failure is None or not is_read():
        return code
    reason = f"standard output cannot be written ({failure.strerror}), and the rest of what was printed is lost"
    print(f"{reason}; make room, and repeat the command.", file=sys.stderr)
    return code or 2


def notify(text: str) -> None:
    """Write `text` to standard error if this does not block. Signal handlers use it: they must not raise or block."""
    with suppress(OSError):
        if select.select([], [2], [], 0)[1]:
            os.write(2, text.encode())


def _guarded(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """A guarded stream with the descriptor, the encoding and the line buffering of `stream`.

    If `stream` is standard output and leads to a file or another program, control characters are not escaped.
    """
    output = _Output(stream.fileno(), "w", closefd=False)
    with suppress(OSError):
        stream.flush()
    guarded = _Text(
        io.BufferedWriter(output),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering or stream.write_through,
    )
    guarded.escapes = stream is not sys.stdout or stream.isatty()
    return guarded


def _output(stream: object) -> _Output | None:
    output = getattr(getattr(stream, "buffer", None), "raw", None)
    return output if isinstance(output, _Output) else None


def _discard(descriptor: int) -> None:
    """Redirect `descriptor` to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True
