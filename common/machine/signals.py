"""Signals that stop a run: recorded by the handler, agreed on by all ranks at the end of a step."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from common.errors import Stopped
from common.machine import distributed

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")  # SLURM is commonly set to send the last two
CTRL_C_MESSAGE = b"\nCtrl-C: stopping after this step, with a checkpoint; once more stops at once.\n"


class StopSignals:
    """A context manager inside which signals that would end the process are only recorded.

    The handler does nothing else: a checkpoint or a collective there could interrupt another one. A second Ctrl-C
    raises KeyboardInterrupt at once. Signals that are ignored stay ignored (nohup). Earlier handlers are called after a
    stop, when the checkpoint is written; submitit's puts the job back into SLURM's queue.
    """

    def __init__(self) -> None:
        self.received: list[str] = []
        self._owner = os.getpid()
        self._earlier_handlers: dict[str, Any] = {}

    def __enter__(self) -> "StopSignals":
        """Install the handler; a no-op outside the main thread, the only one in which Python allows it."""
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = getattr(signal, name, None)  # Windows has only two of them
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._earlier_handlers[name] = signal.signal(number, self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the earlier handlers; after a stop, call those of the signals received."""
        for name, handler in self._earlier_handlers.items():
            signal.signal(getattr(signal, name), handler)
        if isinstance(error, Stopped):
            for name in self.received:
                if _is_custom(self._earlier_handlers.get(name)):
                    self._earlier_handlers[name](getattr(signal, name), None)

    def requested(self) -> bool:
        """Whether any rank received a signal (a collective: all ranks call it at the same step)."""
        return distributed.any_rank(bool(self.received))

    def stopped_error(self, where: str) -> Stopped:
        """The exception that all ranks then raise (a collective); `where` says how far the run is."""
        names = sorted({name for names in distributed.gather(self.received) for name in names})
        return Stopped(names, where)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return  # a forked worker, which its parent stops
        name = signal.Signals(number).name
        if name == "SIGINT" and name in self.received:
            raise KeyboardInterrupt
        if name == "SIGINT" and distributed.is_main():
            os.write(2, CTRL_C_MESSAGE)  # print() is not safe in a handler
        if name not in self.received:
            self.received.append(name)


def _is_custom(handler: Callable[..., Any] | int | None) -> bool:
    return callable(handler) and handler is not signal.default_int_handler
