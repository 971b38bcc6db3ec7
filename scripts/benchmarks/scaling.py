"""How cost grows: one kind of work at several sizes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from scripts.benchmarks.timing import Row, Setting


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """A row of each size.

    name: what grows, with its unit.
    build: makes the row of a size, a function of a module; all have the same contenders, and amounts, for each of which
        there is a cost.
    tiny: the sizes under --tiny.
    cuda: those on CUDA, where they are others.
    """

    name: str
    build: Callable[[int, Setting], Row]
    sizes: Sequence[int]
    tiny: Sequence[int]
    cuda: Sequence[int] | None = None

    def of(self, setting: Setting) -> Sequence[int]:
        """The sizes of a run."""
        if setting.tiny:
            return self.tiny
        return self.cuda if self.cuda and setting.device.type == "cuda" else self.sizes


def precision(device: torch.device) -> str:
    """Which one a scaling is shown for: the plain one on the CPU, and the usual one on CUDA."""
    return "bf16" if device.type == "cuda" else "fp32"


def lines(measured: Sequence[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of rows by size, in growing order: each contender's cost, and how it grew from the size before.

    growth: the exponent e of time ~ size^e between two neighbours, which for the first is None, as after a size of 0.
    """
    found = []
    for contender in measured[0][1]["amounts"]:
        before: tuple[int, float] | None = None
        for size, row in measured:
            ms, amount = row["times"][contender]["median"], row["amounts"][contender]
            line = {"contender": contender, "size": size, "ms": ms, "unit": amount["unit"].removesuffix("s")}
            line |= {"ms_per_unit": 1e3 / amount["a_second"], "peak_mib": row["peak_mib"].get(contender)}
            found.append(line | {"growth": growth(*before, size, ms) if before else None})
            before = size, ms
    return found


def growth(size: float, taken: float, larger: float, longer: float) -> float | None:
    """The exponent e of taken ~ size^e; None where a size is 0."""
    return math.log(longer / taken) / math.log(larger / size) if size and larger else None
