"""Faults that tests inject into a door's process before it starts; each is a function of plain values."""

import builtins
import errno
import fcntl
import io
import os
import signal
import sys
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

MOMENTS = ("before the update", "after the update", "in an evaluation", "in a save")


def at_step(step: int, moment: str, action: str | Callable[..., None], *values: Any) -> None:
    """Call `action` at the first `moment` of step number `step` or of a later one.

    It is a function, or the name of one in this module.
    """
    import torch

    import common.train.trainer
    from common.train.step import Stepper

    state = {"step": -1, "done": False}

    def reach(name: str) -> None:
        if name == moment and state["step"] >= step and not state["done"]:
            state["done"] = True
            (globals()[action] if isinstance(action, str) else action)(*values)

    def call(self: Any, batches: Any, number: int, *rest: Any, _real: Callable[..., Any] = Stepper.__call__) -> Any:
        state["step"] = number
        reach("before the update")
        parts = _real(self, batches, number, *rest)
        reach("after the update")
        return parts

    def evaluate(task: Any, *arguments: Any, _real: Any = common.train.trainer.evaluate, **options: Any) -> Any:
        name = "answers" if hasattr(task, "answers") else "predict"  # as in common.task.answers_of
        answer = getattr(task, name)

        def reach_and_answer(*inputs: Any) -> Any:
            reach("in an evaluation")
            return answer(*inputs)

        setattr(task, name, reach_and_answer)
        try:
            return _real(task, *arguments, **options)
        finally:
            delattr(task, name)

    def save(content: Any, file: Any, _real: Any = torch.save, **options: Any) -> None:
        _real(content, file, **options)
        if hasattr(file, "name"):  # not a buffer, as for objects sent to other ranks
            reach("in a save")  # the draft is written, but not yet renamed

    Stepper.__call__ = call  # type: ignore[method-assign]
    common.train.trainer.evaluate = evaluate  # type: ignore[assignment]
    torch.save = save


def lose_console(kind: str, step: int, *signals: str) -> None:
    """Replace the console, let its other end go before the update of number `step`, and then send `signals`.

    `kind`: "pipe" (of stdout and stderr, as in `2>&1 | tee log`), "stdout in a pipe", or "terminal", which is the
    process's own and sends SIGHUP when it is closed: with "0 columns" without a progress bar, otherwise with one.
    """
    readers = []
    if "terminal" in kind:
        master, slave = os.openpty()
        termios.tcsetwinsize(slave, (24, 0 if "0 columns" in kind else 80))
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        readers.append(_redirect([1, 2], slave, master))
    if "pipe" in kind:
        reader, writer = os.pipe()
        readers.append(_redirect([1] if kind.startswith("stdout") else [1, 2], writer, reader))

    def lose() -> None:
        for reader in readers:
            os.kill(reader, signal.SIGKILL)
            os.waitpid(reader, 0)
        time.sleep(0.05)
        for name in signals:
            send(name)

    at_step(step, "before the update", lose)


def _redirect(descriptors: list[int], writer: int, reader: int) -> int:
    """Let `descriptors` lead to `writer`; returns the id of a process that reads what is written there."""
    process = os.fork()
    if process == 0:
        os.close(writer)
        with suppress(OSError):
            while os.read(reader, 65536):
                pass
        os._exit(0)
    for descriptor in descriptors:
        os.dup2(writer, descriptor)
    os.close(writer)
    os.close(reader)
    return process


def unwritable_stdout(kind: str) -> None:
    """Start with a standard output that is "full", as of a file on a full disk, or "closed"."""
    if kind == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    else:
        os.close(1)
        sys.stdout = None  # type: ignore[assignment]


def block() -> None:
    """Never return from one call in C, outside of which Python would call handlers; as one long operation does."""
    import ctypes

    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
    print("blocked", flush=True)
    for _ in range(2):  # the second call waits for the first one's lock
        library.pthread_mutex_lock(mutex)


def send(name: str, times: int = 1) -> None:
    """Send a signal to this process `times` times, 10 ms apart."""
    for _ in range(times):
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(0.01)


def hang() -> None:
    """Sleep for an hour."""
    time.sleep(3600)


def fail() -> None:
    """Raise an exception that nothing handles."""
    raise ZeroDivisionError("a defect on purpose")


def non_finite_at(step: int, kind: str) -> None:
    """Make the loss NaN in that step, or with kind "gradient" only a gradient infinite."""
    from common.train.step import Stepper

    def call(self: Any, batches: Any, number: int, *rest: Any, _real: Callable[..., Any] = Stepper.__call__) -> Any:
        if number == step and kind == "gradient":
            parameter = self.parameters[0]
            parameter.register_hook(lambda gradient: gradient * float("inf"))
        elif number == step:
            loss = self.task.loss

            def nan_loss(*inputs: Any) -> Any:
                total, parts = loss(*inputs)
                return total * float("nan"), parts

            self.task.loss = nan_loss
        return _real(self, batches, number, *rest)

    Stepper.__call__ = call  # type: ignore[method-assign]


def full_disk(first: int, last: int) -> None:
    """Let the saves number `first` to `last` of this process, counted from 1, fail as on a full disk."""
    import torch

    count = 0

    def save(content: Any, file: Any, _real: Any = torch.save, **options: Any) -> None:
        nonlocal count
        count += 1
        if first <= count <= last:
            with open("/dev/full", "wb", buffering=0) as full:
                full.write(b"no")
        _real(content, file, **options)

    torch.save = save


def full_disk_at_write(first: int) -> None:
    """Let every write into files below the working folder fail, from the write number `first` on, counted from 1."""
    count = 0

    def is_full() -> bool:
        nonlocal count
        count += 1
        return count >= first

    _let_writes_fail(is_full)


def full_disk_at_step(step: int, name: str) -> None:
    """Let every write into files below the working folder fail from step `step` on, and then send a signal."""
    full: list[bool] = []

    def fill() -> None:
        full.append(True)
        send(name)

    _let_writes_fail(lambda: bool(full))
    at_step(step, "before the update", fill)


def _let_writes_fail(is_full: Callable[[], bool]) -> None:
    real_open, folder = open, os.getcwd()

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if is_full():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def open_full(file: Any, mode: str = "r", buffering: int = -1, *text: Any, **text_options: Any) -> Any:
        reads = not {*mode} & {*"wax+"}
        if reads or isinstance(file, int) or not os.path.abspath(os.fsdecode(file)).startswith(folder):
            return real_open(file, mode, buffering, *text, **text_options)
        raw = Full(file, mode.replace("b", "").replace("t", ""))
        buffer = raw if buffering == 0 else io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffer if "b" in mode else io.TextIOWrapper(buffer, *text, **text_options)

    builtins.open = io.open = open_full


def in_sample(index: int, action: str, *values: Any) -> None:
    """Call `action` when a worker process reads sample number `index` of train from an image folder."""
    from torch.utils.data import get_worker_info

    from vit.data.folder import ImageFolder

    def sample(self: Any, split: str, number: int, random: Any, _real: Callable[..., Any] = ImageFolder.sample) -> Any:
        if get_worker_info() is not None and split == "train" and number == index:
            globals()[action](*values)
        return _real(self, split, number, random)

    ImageFolder.sample = sample  # type: ignore[method-assign]
