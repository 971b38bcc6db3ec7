"""Compare the outputs of several contenders that do the same work, and time them in turn.

A contender is one implementation in one precision, such as "ours fp32" or "transformers bf16".
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.benchmarks import flops

# Seconds for which nothing is done after a call on the CPU, or as long as the call took, if that is less: the threads
# of some libraries spin on after their work, such as those of Intel's OpenMP for 0.2 s.
MAX_PAUSE = 0.3


class MismatchError(Exception):
    """The outputs of two contenders differ, so their times cannot be compared."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The options that apply to all benchmarks in a run of scripts/benchmark.py."""

    device: torch.device
    tiny: bool  # whether models and inputs have toy sizes, to check that everything runs
    compile: bool  # whether models are timed under torch.compile; most benchmarks then time eager models, too
    images: Path | None  # a folder of JPEGs for the input pipeline; None: synthetic ones
    scratch: Path  # a temporary folder for a benchmark's files
    batch: int | None = None  # images or sentences per batch, for benchmarks that do not fix it; None: their default
    in_process: bool = False  # whether contenders that otherwise have a process of their own run in this one

    def batch_size(self, cpu: int, cuda: int) -> int:
        """Return `batch`; if it is None, return the default for the device: `cuda` on CUDA, otherwise `cpu`."""
        return self.batch or (cuda if self.device.type == "cuda" else cpu)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One benchmark: a piece of work that several contenders do.

    name: describes the work and its size.
    contenders: name -> function that does the work once.
    pairs: pairs (contender, reference) of names. The ratio of the contender's time to the reference's is reported. If
        the reference is a tuple of names, the fastest of these contenders is the reference.
    check: compares the contenders' outputs before any of them is timed. It returns a text with the differences, and
        raises MismatchError if one is too large.
    amounts: name -> (amount, unit), what the contender processes in one call, such as (8, "images").
    flops: name -> (number of floating-point operations in one call, precision).
    threads: PyTorch's number of CPU threads; None means that the number is not changed.
    """

    name: str
    contenders: Mapping[str, Callable[[], object]]
    pairs: Sequence[tuple[str, str | tuple[str, ...]]]
    check: Callable[[], str]
    amounts: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    flops: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    threads: int | None = None

    def select(self, names: Sequence[str]) -> "Row":
        """Return a copy with only the contenders `names`; `check` still compares all contenders.

        The copy has the pairs in which both the contender and the reference are in `names`. Pairs whose reference is a
        tuple of names are left out.
        """
        return replace(
            self,
            contenders={name: self.contenders[name] for name in names},
            pairs=[pair for pair in self.pairs if all(name in names for name in pair)],
            amounts={name: self.amounts[name] for name in names if name in self.amounts},
            flops={name: self.flops[name] for name in names if name in self.flops},
        )

    @contextmanager
    def use_threads(self) -> Iterator[None]:
        """Set PyTorch's number of CPU threads to `threads` inside the block; None changes nothing."""
        previous = torch.get_num_threads()
        torch.set_num_threads(self.threads or previous)
        try:
            yield
        finally:
            torch.set_num_threads(previous)


def measure(row: Row, *, rounds: int, warm_up: int, device: torch.device) -> dict[str, Any]:
    """Call the check of a benchmark, then time each contender once per round, in random order.

    The first `warm_up` rounds are not counted; the next `rounds` are. If the benchmark has `flops`, a large matrix
    product is timed in the same rounds for each precision in `flops`, under a name such as "matrix product fp32".

    Returns a dict of plain Python types:

    row, agreement, threads: the name of the benchmark, the text that its check returned, and its number of CPU threads.
    seconds: name of a contender or matrix product -> list of its times in seconds, one for each counted round.
    times: name as in `seconds` -> median and quartiles of these times in ms.
    ratios: a list with the result of `_ratio` for each pair.
    amounts: name of each contender in `Row.amounts` -> the amount processed per second (`a_second`) and per call
        (`at_once`), and its unit (`unit`).
    rates: the result of the function `rates`.
    """
    with row.use_threads():
        agreement = row.check()
        limits = {
            precision: flops.fastest_product(precision, device)
            for precision in sorted({precision for _, precision in row.flops.values()})
        }
        products = {f"matrix product {precision}": limit.work for precision, limit in limits.items()}
        functions = {**row.contenders, **products}
        seconds = _time_in_turn(functions, rounds, warm_up, device)
        threads = torch.get_num_threads()
    product_flops = {f"matrix product {dtype}": (limit.operations, dtype) for dtype, limit in limits.items()}
    return {
        "row": row.name,
        "agreement": agreement,
        "threads": threads,
        "seconds": seconds,
        "times": {name: _spread([1e3 * elapsed for elapsed in seconds[name]]) for name in functions},
        "ratios": [_ratio(seconds, contender, reference) for contender, reference in row.pairs],
        "amounts": _amounts(row.amounts, seconds),
        "rates": rates({**row.flops, **product_flops}, seconds),
    }


def add_peaks(measurement: dict[str, Any], peaks: Mapping[str, int]) -> dict[str, Any]:
    """Add the contenders' peak memory to the result of `measure`; returns the extended result.

    `peaks` holds the peak in bytes of each contender whose peak was measured. The peaks are added as `peak_mib`, in
    MiB. Each dict in `ratios` gets the key `memory`: the contender's peak divided by the reference's, or None if one of
    these two peaks is unknown or zero.
    """
    for ratio in measurement["ratios"]:
        contender, reference = (peaks.get(ratio[side]) for side in ("one", "other"))
        ratio["memory"] = contender / reference if contender and reference else None
    return {**measurement, "peak_mib": {name: peak / 2**20 for name, peak in peaks.items()}}


def rates(flops: Mapping[str, tuple[float, str]], seconds: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return the operations per second of each contender and matrix product.

    `flops` is `Row.flops` with the matrix products added. `seconds` holds the times of the counted rounds. Returns name
    -> dict: `flops_per_s` is the number of operations per second, and `of_matrix_rate` is this number divided by that
    of the matrix product in the same precision.
    """
    per_second = {name: operations / statistics.median(seconds[name]) for name, (operations, _) in flops.items()}
    return {
        name: {"flops_per_s": rate, "of_matrix_rate": rate / per_second[f"matrix product {flops[name][1]}"]}
        for name, rate in per_second.items()
    }


def _time_in_turn(
    functions: Mapping[str, Callable[[], object]], rounds: int, warm_up: int, device: torch.device
) -> dict[str, list[float]]:
    """Call each function once per round, in random order; returns name -> its seconds in each round after warm-up.

    On the CPU, nothing is done for a moment after each call (`MAX_PAUSE`). The cores are then idle when the next one
    begins, except after short calls.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(warm_up + rounds):
        for name in random.Random(number).sample(list(functions), len(functions)):
            elapsed = _seconds(functions[name], device)
            if device.type == "cpu":
                time.sleep(min(elapsed, MAX_PAUSE))
            if number >= warm_up:
                seconds[name].append(elapsed)
    return seconds


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    _synchronise(device)
    start = time.perf_counter()
    work()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _amounts(amounts: Mapping[str, tuple[float, str]], seconds: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    return {
        name: {"a_second": amount / statistics.median(seconds[name]), "at_once": amount, "unit": unit}
        for name, (amount, unit) in amounts.items()
    }


def _ratio(seconds: dict[str, list[float]], contender: str, reference: str | tuple[str, ...]) -> dict[str, Any]:
    """Return the names of contender and reference, their median times in ms, and the ratio of these times.

    The contender's name has the key `one`, and the reference's name has the key `other`. These keys must not change,
    because --against reads them in earlier reports. `among` lists the references of which `other` is the fastest.
    `quartiles` holds the lower and the upper quartile of the per-round ratios.
    """
    references = [reference] if isinstance(reference, str) else [*reference]
    fastest = min(references, key=lambda name: statistics.median(seconds[name]))
    medians = [statistics.median(seconds[name]) for name in (contender, fastest)]
    ratios = [a / b for a, b in zip(seconds[contender], seconds[fastest], strict=True)]
    return {
        "one": contender,
        "one_ms": 1e3 * medians[0],
        "other": fastest,
        "other_ms": 1e3 * medians[1],
        "among": references,
        "ratio": medians[0] / medians[1],
        "quartiles": _spread(ratios)["quartiles"],
    }


def _spread(values: list[float]) -> dict[str, Any]:
    """Return the median of `values`, and their lower and upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "quartiles": [low, high]}


def compare_tensors(name: str, tensor: Tensor, expected: Tensor, tolerance: float, *, along: int | None = None) -> str:
    """Return a text with the relative difference: the norm of `tensor - expected` divided by that of `expected`.

    With `along`, the mean of `expected` along this axis is subtracted from `expected` before the second norm is taken.
    Use `along` for outputs that share a large offset, because the offset would make relative differences small. Raises
    MismatchError if the relative difference is above `tolerance`, or if the shapes differ. The text begins with `name`.
    """
    if tensor.shape != expected.shape:
        raise MismatchError(f"{name}: the shapes are {tuple(tensor.shape)} and {tuple(expected.shape)}.")
    tensor, expected = tensor.detach().cpu().double(), expected.detach().cpu().double()
    offset = 0 if along is None else expected.mean(along, keepdim=True)
    return _check_distance(name, float((tensor - expected).norm() / (expected - offset).norm()), tolerance)


def compare_numbers(name: str, number: Tensor, expected: Tensor, tolerance: float) -> str:
    """Return a text with the relative difference of two scalars; raises MismatchError if it is above `tolerance`."""
    return _check_distance(name, abs(number.item() / expected.item() - 1), tolerance)


def _check_distance(name: str, distance: float, tolerance: float) -> str:
    if not distance <= tolerance:  # this is also true for NaN
        raise MismatchError(f"{name}: {distance:.2g} apart, but the limit is {tolerance:g}: this is not the same work.")
    return f"{name} {distance:.0e} apart"
