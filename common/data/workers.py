"""The worker processes of a DataLoader.

Workers react only to signals of their parent, exit when the parent ends, and record what they are doing.
"""

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

PARENT_CHECK_SECONDS = 1.0  # interval at which a worker checks that its parent is alive
EXIT_SECONDS = 0.2  # the longest wait for the exit of a process that has already closed its connections


class Activity(IntEnum):
    """What a worker is doing: nothing, building a sample, or collating samples."""

    IDLE = 0
    SAMPLE = 1
    COLLATING = 2


class DeadWorker(NamedTuple):
    """How a worker ended, and what it was doing."""

    code: int  # its exit code, or the negative number of the signal that killed it
    activity: Activity
    sample: int  # the index of the sample, or of the first sample to collate; 0 if the worker was idle


class ActivityTable:
    """A table in shared memory: each worker records what it is doing, and the parent reads the records."""

    def __init__(self, workers: int):
        self._parent = os.getpid()
        # For each worker: process id, activity, index of a sample.
        self._rows = multiprocessing.RawArray("q", 3 * workers)

    def start_worker(self, worker: int) -> None:
        """Record the process id of worker number `worker`, and install its handling of signals and exceptions.

        The DataLoader calls this method in the worker's own process, as its `worker_init_fn`.
        """
        self._rows[3 * worker] = os.getpid()
        _react_only_to(self._parent)
        sys.excepthook = _print_unless_disconnected

    def write(self, activity: Activity, index: int = 0) -> None:
        """Record what this worker begins to do; does nothing in a process that is not a worker."""
        if (info := get_worker_info()) is not None:
            self._rows[3 * info.id + 1 : 3 * info.id + 3] = [activity, index]

    def read(self, process: int | None) -> tuple[Activity, int]:
        """The activity and the sample index that the worker with this process id recorded last.

        They are (IDLE, 0) for a process that has recorded nothing.
        """
        rows = [*self._rows]
        row = rows[::3].index(process) if process in rows[::3] else None
        return (Activity.IDLE, 0) if row is None else (Activity(rows[3 * row + 1]), rows[3 * row + 2])


class WorkerPool:
    """The worker processes of one DataLoader, and its batches. Without workers, batches are built in this process."""

    def __init__(self, loader: DataLoader[Any], activities: ActivityTable):
        """Start the workers.

        When a worker dies, PyTorch's SIGCHLD handler raises an error in the main thread at an arbitrary line, such as
        in the middle of writing a checkpoint. So the previous handler is restored after the start, and only `take`
        checks whether a worker has died.
        """
        self._activities = activities
        earlier_children = multiprocessing.active_children()
        handler = signal.getsignal(signal.SIGCHLD) if _can_handle_sigchld() else None
        self._batches: Iterator[Any] = iter(loader)
        self._workers = [child for child in multiprocessing.active_children() if child not in earlier_children]
        if _can_handle_sigchld():
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)

    def take(self) -> Any:
        """Return the next batch; raises StopIteration after the last.

        Any other error may be the consequence of a worker's death; `dead_workers` says whether a worker has died.
        """
        with self._raise_on_death():
            return next(self._batches)

    def dead_workers(self) -> list[DeadWorker]:
        """The workers that have ended; to be called before `close`, which ends the others, too.

        If none has ended, waits up to EXIT_SECONDS for one.
        """
        if all(worker.is_alive() for worker in self._workers):
            wait([worker.sentinel for worker in self._workers], EXIT_SECONDS)
        ended = [(worker.exitcode, worker.pid) for worker in self._workers]
        return [DeadWorker(code, *self._activities.read(process)) for code, process in ended if code is not None]

    def close(self) -> None:
        """Stop the workers.

        An idle worker stops at once, and a busy one after its current batch. PyTorch waits for each worker for at most
        5 s, and then terminates it.
        """
        self._batches = iter(())  # PyTorch's iterator stops its workers, in the right order, when it is freed
        for worker in self._workers:
            worker.terminate()  # in case the traceback of an exception still holds the iterator

    @contextmanager
    def _raise_on_death(self) -> Iterator[None]:
        """A context that raises ChildProcessError if a worker has already died, or dies before the context ends.

        PyTorch itself checks only every 5 s. The context does nothing if `_can_handle_sigchld` is false.
        """
        if not self._workers or not _can_handle_sigchld():
            yield
            return
        handler = signal.signal(signal.SIGCHLD, lambda number, frame: self._check())
        try:
            self._check()
            yield
        finally:
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)

    def _check(self) -> None:
        if any(worker.exitcode for worker in self._workers):  # a worker that was asked to exit has the exit code 0
            raise ChildProcessError


def _can_handle_sigchld() -> bool:
    """Whether this is the main thread, the only one that may set handlers, on a system with SIGCHLD (not Windows)."""
    return hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()


def _react_only_to(parent: int) -> None:
    """Ignore the signals that ask a run to stop, except a SIGTERM from `parent`.

    Workers receive these signals too, because torchrun and SLURM signal all processes of a run, and a terminal signals
    all its foreground processes. If workers did not ignore the signals, they would be killed, and the run would end
    before the parent has handled its own signal.
    """
    for name in signals.SIGNALS:
        if name != "SIGTERM" and hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # On systems without sigtimedwait, any SIGTERM kills the worker. Idle workers still notice the end of their parent,
    # because PyTorch checks for it.
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads that start later inherit the mask
        threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _print_unless_disconnected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an exception of the thread that sends tensors to the parent, unless the parent closed the connection.

    When a worker is killed, the parent closes the connections of the other workers. The resulting errors of those
    workers are not printed, because only the killed worker should be reported.
    """
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _exit_with(parent: int) -> None:
    """Exit when `parent` sends SIGTERM or no longer exists, even while the main thread is busy."""
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, PARENT_CHECK_SECONDS)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)
