"""Faults that a test puts into a door's process before it starts: each a function of plain values."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

PLACES = ("before the update", "after the update", "in an evaluation", "in a save")


def at(step: int, place: str, deed: str, *values: Any) -> None:
    """Do `deed`, one of the functions below, the first time that `place` is reached in step number `step` or later."""
    import torch

    import common.train.trainer
    from common.train.step import Stepper

    state = {"step": -1, "done": False}

    def here(name: str) -> None:
        if name == place and state["step"] >= step and not state["done"]:
            state["done"] = True
            globals()[deed](*values)

    def call(self: Any, batches: Any, number: int, *rest: Any, _real: Callable[..., Any] = Stepper.__call__) -> Any:
        state["step"] = number
        here("before the update")
        parts = _real(self, batches, number, *rest)
        here("after the update")
        return parts

    def evaluate(task: Any, *arguments: Any, _real: Any = common.train.trainer.evaluate, **options: Any) -> Any:
        predict = task.predict

        def answers(*of: Any) -> Any:
            here("in an evaluation")
            return predict(*of)

        task.predict = answers
        try:
            return _real(task, *arguments, **options)
        finally:
            del task.predict

    def save(content: Any, file: Any, _real: Any = torch.save, **options: Any) -> None:
        _real(content, file, **options)
        if hasattr(file, "name"):  # no buffer, by which objects travel to other ranks
            here("in a save")  # the bytes are there, the name is not

    Stepper.__call__ = call  # type: ignore[method-assign]
    common.train.trainer.evaluate = evaluate  # type: ignore[assignment]
    torch.save = save


def send(name: str, times: int = 1) -> None:
    """Signal this process, and wait a moment between two times."""
    for _ in range(times):
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(0.01)


def hang() -> None:
    """Be there and do nothing."""
    time.sleep(3600)


def fail() -> None:
    """Raise what nobody expects."""
    raise ZeroDivisionError("a defect on purpose")


def no_loss_at(step: int, kind: str) -> None:
    """In that step the loss is NaN, or (kind "gradient") only its gradient is infinite."""
    from common.train.step import Stepper

    def call(self: Any, batches: Any, number: int, *rest: Any, _real: Callable[..., Any] = Stepper.__call__) -> Any:
        if number == step and kind == "gradient":
            parameter = self.parameters[0]
            parameter.register_hook(lambda gradient: gradient * float("inf"))
        elif number == step:
            loss = self.task.loss

            def spoilt(*of: Any) -> Any:
                total, parts = loss(*of)
                return total * float("nan"), parts

            self.task.loss = spoilt
        return _real(self, batches, number, *rest)

    Stepper.__call__ = call  # type: ignore[method-assign]


def full_disk(first: int, last: int) -> None:
    """The saves number `first` to `last` of this process, counted from 1, meet a disk that is full."""
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


def in_sample(index: int, deed: str, *values: Any) -> None:
    """Do `deed` when the digits' sample number `index` of train is read in a worker process."""
    from torch.utils.data import get_worker_info

    from vit.data.folder import ImageFolder

    def sample(self: Any, split: str, number: int, random: Any, _real: Callable[..., Any] = ImageFolder.sample) -> Any:
        if get_worker_info() is not None and split == "train" and number == index:
            globals()[deed](*values)
        return _real(self, split, number, random)

    ImageFolder.sample = sample  # type: ignore[method-assign]
