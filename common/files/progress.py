"""A run's progress: a bar in a terminal, and the remaining time elsewhere."""

import os
import sys
import time
from typing import Any

from tqdm import tqdm


class Progress:
    """A run's progress. The first step is left out of the timing, because it may include compilation."""

    def __init__(self, steps: int, start: int, bar: Any):
        """`start` of `steps` steps are already done; `bar` is tqdm's progress bar, or None without a terminal."""
        self.steps, self.step, self._bar = steps, start, bar
        self._first: tuple[int, float] | None = None

    def advance(self, step: int) -> None:
        """Record that `step` steps are done."""
        if self._bar is not None:
            self._bar.update(step - self.step)
        self.step = step
        self._first = self._first or (step, time.monotonic())

    def remaining(self) -> str:
        """The total number of steps and the remaining time: " of 1000 ([hours:]minutes:seconds left)".

        The time is extrapolated from the steps after the first one. It is left out until this process has done two
        steps.
        """
        timed_steps = self.step - self._first[0] if self._first else 0
        if not self._first or not timed_steps:
            return f" of {self.steps}"
        seconds = (time.monotonic() - self._first[1]) / timed_steps * (self.steps - self.step)
        return f" of {self.steps} ({tqdm.format_interval(seconds)} left)"


def is_terminal() -> bool:
    """Whether standard output and standard error are terminals in which tqdm draws a progress bar.

    tqdm draws none in a terminal that states zero columns, as in some containers.
    """
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        return False
    return os.get_terminal_size(sys.stderr.fileno()).columns > 0
