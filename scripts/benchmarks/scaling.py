"""How time and memory grow with one property of the input, from measurements at several values of this property."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from scripts.benchmarks.timing import Row, Setting


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """A property of the input, and a function that builds a row for each of its values.

    name: the property, with its unit.
    build: makes the row of a value. Must be a top-level function of a module, since it is pickled. All its rows must
        have the same contenders, with an amount for each contender.
    values: the values in ascending order.
    tiny: the values under --tiny.
    cuda: the values on CUDA; None: `values`.
    """

    name: str
    build: Callable[[int, Setting], Row]
    values: Sequence[int]
    tiny: Sequence[int]
    cuda: Sequence[int] | None = None

    def values_for(self, setting: Setting) -> Sequence[int]:
        """The values to measure with this setting."""
        if setting.tiny:
            return self.tiny
        return self.cuda if self.cuda and setting.device.type == "cuda" else self.values


def precision(device: torch.device) -> str:
    """The precision in which scalings are measured: fp32 on the CPU, bf16 on CUDA."""
    return "bf16" if device.type == "cuda" else "fp32"


def lines(rows: Sequence[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Tabulate time and peak memory of each contender at each value, and the growth of time with the value.

    `rows` are pairs (value, measured row) in ascending order of value. `growth` is the exponent e of time ~ value^e
    between the previous value and this one; None for the first value and if the previous one is 0.
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
    """The exponent e of ms ~ value^e between two values; None if one of the values is 0."""
    return math.log(larger_ms / ms) / math.log(larger_value / value) if value and larger_value else None
