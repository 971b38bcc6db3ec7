"""Printing to a console whose reader may leave: no result is lost to a print."""

import os
import sys


def print_line(text: str) -> bool:
    """Print one or more lines and flush them; False when the reader has closed the pipe, as `| head -1` does.

    All further output is then discarded: the work goes on, and Python reports no error when it flushes at exit.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        discard_output()
        return False
    return True


def discard_output() -> None:
    """Send standard output to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
