"""How cost grows with one property of the input: one kind of work at several values."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from scripts.benchmarks.timing import Row, Setting


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """One row for each value of a growing property.

    name: the property, with its unit.
    build: makes the row of a value; a function of a module, since it is pickled. All rows have the same contenders, and
        an amount for each of them.
    values: in ascending order.
    tiny: the values under --tiny.
    cuda: the values on CUDA; None: `values`.
    """

    name: str
    build: Callable[[int, Setting], Row]
    values: Sequence[int]
    tiny: Sequence[int]
    cuda: Sequence[int] | None = None

    def values_for(self, setting: Setting) -> Sequence[int]:
        """The values of a run."""
        if setting.tiny:
            return self.tiny
        return self.cuda if self.cuda and setting.device.type == "cuda" else self.values


def precision(device: torch.device) -> str:
    """The precision in which scalings are measured: fp32 on the CPU, bf16 on CUDA."""
    return "bf16" if device.type == "cuda" else "fp32"


def lines(rows: Sequence[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The cost of each contender at each value, and its growth from the value before.

    `rows` are (value, measured row) in ascending order. `growth` is the exponent e of time ~ value^e between
    neighbours; None for the first value and after a value of 0.
    """
    lines = []
    for contender in rows[0][1]["amounts"]:
        previous: tuple[int, float] | None = None
        for value, row in rows:
            ms, amount = row["times"][contender]["median"], row["amounts"][contender]
            line = {"contender": contender, "size": value, "ms": ms, "unit": amount["unit"].removesuffix("s")}
            line |= {"ms_per_unit": 1e3 / amount["a_second"], "peak_mib": row["peak_mib"].get(contender)}
            lines.append(line | {"growth": growth(*previous, value, ms) if previous else None})
            previous = value, ms
    return lines


def growth(value: float, ms: float, larger_value: float, larger_ms: float) -> float | None:
    """The exponent e of ms ~ value^e between two values; None if one of them is 0."""
    return math.log(larger_ms / ms) / math.log(larger_value / value) if value and larger_value else None
