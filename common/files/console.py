"""Print to a pipe whose reader may close it, without an error, so that the program goes on and loses no result."""

import os
import sys


def print_line(text: str) -> bool:
    """Print one or more lines and flush them; returns False if the reader has closed the pipe, as `| head -1` does.

    All further output is then discarded, so that the program goes on and Python reports no error when it flushes at
    exit.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        discard_output()
        return False
    return True


def discard_output() -> None:
    """Discard all further standard output."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
