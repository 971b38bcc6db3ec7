"""Record signals that stop a run, and let all ranks agree after a step or an evaluation whether to stop."""

import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from common.errors import Stopped
from common.machine import console, distributed

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")  # SLURM is often configured to send the last two
CTRL_C_MESSAGE = "\nCtrl-C: stopping after this step, with a checkpoint; once more stops at once.\n"
END = b"\0"  # this byte ends the watchdog's thread; no signal has the number 0
SECOND_CTRL_C_DELAY = 2.0  # seconds until a second Ctrl-C ends the process; until then, the main thread closes files


class StopSignals:
    """A context manager inside which signals that would end the process are only recorded.

    The handler records a signal and, for Ctrl-C, prints a message. It does not write a checkpoint or call a collective,
    because the signal may arrive while another checkpoint is being written or another collective is running. A second
    Ctrl-C raises KeyboardInterrupt at once. Signals that the process ignores (nohup) stay ignored.

    If the context ends with the exception Stopped, the Python handlers that other code had installed before are called
    for the signals that were received. For example, submitit's handler puts the job back into SLURM's queue.
    """

    def __init__(self, grace: float | None = None) -> None:
        """Create the context manager, without installing handlers.

        If the context is still open `grace` seconds after SIGTERM, the process is ended. If `grace` is None, there is
        no time limit.
        """
        self.received: list[str] = []
        self._grace = grace
        self._owner = os.getpid()
        self._earlier_handlers: dict[str, Any] = {}
        self._watchdog: _Watchdog | None = None

    def __enter__(self) -> "StopSignals":
        """Install the handler, and start the watchdog thread (`_Watchdog`).

        Does nothing outside the main thread, because Python allows handlers to be installed in the main thread only.
        """
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = getattr(signal, name, None)  # Windows has only SIGINT and SIGTERM
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._earlier_handlers[name] = signal.signal(number, self._record)
            self._watchdog = _Watchdog(self._grace)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the earlier handlers; if `error` is Stopped, also call them for the signals that were received."""
        if self._watchdog is not None:
            self._watchdog.close()
        for name, handler in self._earlier_handlers.items():
            signal.signal(getattr(signal, name), handler)
        if isinstance(error, Stopped):
            for name in self.received:
                if _is_custom(self._earlier_handlers.get(name)):
                    self._earlier_handlers[name](getattr(signal, name), None)

    def requested(self) -> bool:
        """Whether any rank received a signal. This is a collective: all ranks must call it at the same point."""
        return distributed.any_rank(bool(self.received))

    def stopped_error(self, where: str) -> Stopped:
        """Return the exception that all ranks raise after a signal. This is a collective: all ranks must call it.

        `where` says how far the run is, such as "after step 3 of 9".
        """
        names = sorted({name for names in distributed.gather(self.received) for name in names})
        return Stopped(names, where)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return  # this is a forked worker, which its parent stops
        name = signal.Signals(number).name
        if name == "SIGINT" and name in self.received:
            raise KeyboardInterrupt
        if name == "SIGINT" and distributed.is_main():
            console.notify(CTRL_C_MESSAGE)
        if name not in self.received:
            self.received.append(name)


class _Watchdog:
    """A thread that ends the process shortly after a second Ctrl-C, or `grace` seconds after SIGTERM.

    A signal handler could run too late: Python calls it only between two instructions of the main thread, and one
    instruction can take hours. In contrast, Python writes the number of each signal to a pipe at once
    (`signal.set_wakeup_fd`). This thread reads the pipe.
    """

    def __init__(self, grace: float | None):
        self._grace = grace
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._earlier = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._owner = os.getpid()
        os.register_at_fork(after_in_child=self._leave_to_parent)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, and stop writing signals to its pipe."""
        signal.set_wakeup_fd(self._earlier)
        os.write(self._write, END)  # closing the pipe would not end the thread: forked workers hold it open, too
        self._thread.join()
        os.close(self._write)
        os.close(self._read)
        self._write = -1

    def _leave_to_parent(self) -> None:
        """Keep a forked worker from writing signals to the pipe.

        Ctrl-C reaches the parent and its workers. If the workers wrote it to the pipe as well, one Ctrl-C would count
        as several.
        """
        if self._write >= 0:
            signal.set_wakeup_fd(-1)

    def _watch(self) -> None:
        deadline, code, reason, interrupts = math.inf, 0, "", 0
        while True:
            seconds = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
            if not select.select([self._read], [], [], seconds)[0]:
                console.notify(f"\n{reason}; the process ends without a checkpoint of this step.\n")
                os._exit(code)
            numbers = os.read(self._read, 64)
            if END in numbers:
                return
            interrupts += numbers.count(signal.SIGINT)
            if interrupts >= 2 and code != 130:
                deadline, code, reason = time.monotonic() + SECOND_CTRL_C_DELAY, 130, "Stopped by Ctrl-C"
            if signal.SIGTERM in numbers and not code and self._grace is not None:
                deadline, code = time.monotonic() + self._grace, 143
                reason = f"Stopped by SIGTERM {self._grace:g} seconds ago (trainer.grace)"


def _is_custom(handler: Callable[..., Any] | int | None) -> bool:
    return callable(handler) and handler is not signal.default_int_handler
