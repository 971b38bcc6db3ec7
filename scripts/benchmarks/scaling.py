"""Scalings: measurements of how time and memory grow with one property of a benchmark, such as the image side."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from scripts.benchmarks.timing import Row, Setting


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """A property of a benchmark, its values, and a function that builds the benchmark for each value.

    name: the property and its unit, such as "image side in pixels".
    build: builds the benchmark for a value. It must be a top-level function of a module, since it is pickled for the
        process that measures peak memory. The benchmarks of all values must have the same contenders, and `Row.amounts`
        must have an entry for each contender.
    values: the values in ascending order.
    tiny: the values with --tiny, on all devices.
    cuda: the values on CUDA; None means `values`.
    """

    name: str
    build: Callable[[int, Setting], Row]
    values: Sequence[int]
    tiny: Sequence[int]
    cuda: Sequence[int] | None = None

    def values_for(self, setting: Setting) -> Sequence[int]:
        """Return the values to measure with `setting`."""
        if setting.tiny:
            return self.tiny
        return self.cuda if self.cuda and setting.device.type == "cuda" else self.values


def precision(device: torch.device) -> str:
    """Return the precision of the models in scalings: bf16 on CUDA, fp32 on other devices."""
    return "bf16" if device.type == "cuda" else "fp32"


def lines(rows: Sequence[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Tabulate the time and the peak memory of each contender at each value, and how the time grows with the value.

    `rows` are pairs of a value and the result of `timing.add_peaks`, in ascending order of value. Returns a dict for
    each contender and value:

    contender, size: the name of the contender, and the value.
    ms: the median time of a call.
    unit, ms_per_unit: what the contender processes, such as "image", and the time in ms for one such unit.
    peak_mib: the peak memory in MiB; None if it was not measured.
    growth: the exponent e in time ~ value^e between the previous value and this one. It is None for the first value,
        and if one of the two values is 0.
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
    """Return the exponent e in ms ~ value^e between two values, or None if one of the values is 0."""
    return math.log(larger_ms / ms) / math.log(larger_value / value) if value and larger_value else None
