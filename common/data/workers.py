"""Worker processes: they obey their parent alone, end with it, and what each is at is known when one is killed."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, get_worker_info

from common.machine import signals

PARENT_CHECK_SECONDS = 1.0  # seconds between a worker's looks at whether its parent is still there
EXIT_SECONDS = 0.2  # seconds that a process may take to end once its files are closed


class Activity(IntEnum):
    """What a worker can be at."""

    NOTHING = 0
    SAMPLE = 1
    COLLATING = 2


class DeadWorker(NamedTuple):
    """How a worker ended, and what it was at."""

    code: int  # its exit code, or the negative number of the signal that killed it
    at: Activity
    sample: int  # its index, or of the first that it was collating


class ActivityTable:
    """What each worker is at, in memory that it shares with its parent."""

    def __init__(self, workers: int):
        self._parent = os.getpid()
        self._rows = multiprocessing.RawArray("q", 3 * workers)  # process, what it is at, index of a sample

    def begin(self, worker: int) -> None:
        """What a worker does first: a DataLoader's `worker_init_fn`."""
        self._rows[3 * worker] = os.getpid()
        _react_only_to(self._parent)
        sys.excepthook = _print_unless_disconnected

    def write(self, at: Activity, index: int = 0) -> None:
        """Note what this worker turns to; nothing in a process that is no worker."""
        if (info := get_worker_info()) is not None:
            self._rows[3 * info.id + 1 : 3 * info.id + 3] = [at, index]

    def read(self, process: int | None) -> tuple[Activity, int]:
        """What the worker of that process number turned to last."""
        rows = [*self._rows]
        row = rows[::3].index(process) if process in rows[::3] else None
        return (Activity.NOTHING, 0) if row is None else (Activity(rows[3 * row + 1]), rows[3 * row + 2])


class WorkerPool:
    """The workers of one DataLoader; none where it has none and works in this process."""

    def __init__(self, loader: DataLoader[Any], notes: ActivityTable):
        """Start the workers.

        PyTorch answers the death of any with an exception at whatever line this process is just then, in the middle of
        writing a checkpoint, say. So its handler is taken away again, and deaths are looked for in `take` alone.
        """
        self._notes = notes
        others = multiprocessing.active_children()
        handler = signal.getsignal(signal.SIGCHLD) if _can_handle_sigchld() else None
        self._batches: Iterator[Any] = iter(loader)
        self._workers = [one for one in multiprocessing.active_children() if one not in others]
        if _can_handle_sigchld():
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)

    def take(self) -> Any:
        """The next batch; raises StopIteration behind the last, and any exception when there are `deaths`."""
        with self._alarm():
            return next(self._batches)

    def deaths(self) -> list[DeadWorker]:
        """Workers that ended although nobody told them to."""
        if all(one.is_alive() for one in self._workers):
            wait([one.sentinel for one in self._workers], EXIT_SECONDS)
        ended = [(one.exitcode, one.pid) for one in self._workers]
        return [DeadWorker(code, *self._notes.read(process)) for code, process in ended if code is not None]

    def end(self) -> None:
        """End the workers, at once where they are idle, and else after the batch in hand or 5 s."""
        self._batches = iter(())  # PyTorch's iterator ends its workers when it goes, and in the right order
        for one in self._workers:
            one.terminate()  # where an exception on its way up still holds that iterator

    @contextmanager
    def _alarm(self) -> Iterator[None]:
        """Raise ChildProcessError if a worker was killed, or when one is; PyTorch looks every 5 s alone."""
        if not self._workers or not _can_handle_sigchld():
            yield
            return
        before = signal.signal(signal.SIGCHLD, lambda number, frame: self._look())
        try:
            self._look()
            yield
        finally:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)

    def _look(self) -> None:
        if any(one.exitcode for one in self._workers):  # 0 is how they end when they are told to
            raise ChildProcessError


def _can_handle_sigchld() -> bool:
    """Whether this thread may take SIGCHLD, which Windows has not."""
    return hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()


def _react_only_to(parent: int) -> None:
    """Leave signals that are meant for the run to the parent, which takes them down and finishes its step.

    They reach workers too: torchrun and SLURM send them to all processes of a run, a terminal to all in its
    foreground. PyTorch's workers would die of them, and the run of that.
    """
    for name in signals.SIGNALS:
        if name != "SIGTERM" and hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # else PyTorch's: SIGTERM kills, and an idle worker looks for its parent
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # in all threads that start from here on
        threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _print_unless_disconnected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print what went wrong in the thread that hands tensors over, but not that the parent stopped taking one.

    It does so when another worker was killed, and that is what the reader shall see.
    """
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _exit_with(parent: int) -> None:
    """End this process when the parent tells it to or is gone, however busy the main thread is."""
    while os.getppid() == parent:
        told = signal.sigtimedwait({signal.SIGTERM}, PARENT_CHECK_SECONDS)
        if told is not None and told.si_pid == parent:
            break
    os._exit(0)
