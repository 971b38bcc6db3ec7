"""Signals that ask a run to stop: a flag in the handler, agreed over ranks where a step ends, and an exit code."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from common.errors import Stopped
from common.machine import distributed

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")  # the last two are what SLURM is told to send
CTRL_C_MESSAGE = b"\nCtrl-C: stopping after this step, with a checkpoint; once more stops at once.\n"


class StopSignals:
    """While in use as a context manager, signals that would end the process are only taken down.

    Nothing is done in a handler: a checkpoint or a collective there could come in the middle of another. A second
    Ctrl-C raises KeyboardInterrupt at once. Signals that are ignored stay ignored (nohup). Handlers of others, such as
    submitit's, which puts a job back into SLURM's queue, are called when all is saved.
    """

    def __init__(self) -> None:
        self.received: list[str] = []
        self._owner = os.getpid()
        self._before: dict[str, Any] = {}

    def __enter__(self) -> "StopSignals":
        """Take over the signals; only Python's main thread may, so that elsewhere nothing happens."""
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = getattr(signal, name, None)  # Windows has two of them
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[name] = signal.signal(number, self._take_down)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Give the signals back; after a stop, tell those that were asked before us."""
        for name, handler in self._before.items():
            signal.signal(getattr(signal, name), handler)
        if isinstance(error, Stopped):
            for name in self.received:
                if _is_custom(self._before.get(name)):
                    self._before[name](getattr(signal, name), None)

    def requested(self) -> bool:
        """Whether any rank was asked to stop (a collective: all ranks call it at the same step)."""
        return distributed.any_rank(bool(self.received))

    def stopped_error(self, where: str) -> Stopped:
        """What all ranks raise then, with the end of a sentence on the place in the run (a collective)."""
        names = sorted({name for names in distributed.gather(self.received) for name in names})
        return Stopped(names, where)

    def _take_down(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return  # a forked worker, which its parent ends
        name = signal.Signals(number).name
        if name == "SIGINT" and name in self.received:
            raise KeyboardInterrupt
        if name == "SIGINT" and distributed.is_main():
            os.write(2, CTRL_C_MESSAGE)  # print() is not made for handlers
        if name not in self.received:
            self.received.append(name)


def _is_custom(handler: Callable[..., Any] | int | None) -> bool:
    return callable(handler) and handler is not signal.default_int_handler
