"""The same work done in turn by several contenders, compared first and timed then."""

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


class Disagreement(Exception):
    """Two contenders did not do the same work, so their times mean nothing."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all rows of a run share."""

    device: torch.device
    tiny: bool  # toy sizes, to see that everything runs
    compile: bool  # time torch.compile's versions, too
    images: Path | None  # a folder of the user's JPEGs for the input pipeline; None makes some
    scratch: Path  # a folder for what a row writes
    batch: int | None = None  # images or sentences at once in rows of throughput; None: as many as suit the device

    def at_once(self, cpu: int, cuda: int) -> int:
        """How many images or sentences a row of throughput takes at once."""
        return self.batch or (cuda if self.device.type == "cuda" else cpu)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kind of work.

    contenders: name -> does the work once.
    pairs: (one, other): reported is the time of one over the time of the other; where the other is several names, over
        the time of the one that turns out fastest.
    check: compares what the contenders give, before any time is taken, and says how far apart they are; raises
        Disagreement.
    """

    name: str
    contenders: Mapping[str, Callable[[], object]]
    pairs: Sequence[tuple[str, str | tuple[str, ...]]]
    check: Callable[[], str]
    amounts: Mapping[str, tuple[float, str]] = field(default_factory=dict)  # what a contender gets through: 8, "images"
    flops: Mapping[str, tuple[float, str]] = field(
        default_factory=dict
    )  # its products' operations, and in what precision
    threads: int | None = None  # None: as many as the run has

    def only(self, names: Sequence[str]) -> "Row":
        """Of these contenders alone; the check still compares all."""
        return replace(
            self,
            contenders={name: self.contenders[name] for name in names},
            pairs=[(one, other) for one, other in self.pairs if one in names and other in names],
            amounts={name: self.amounts[name] for name in names if name in self.amounts},
            flops={name: self.flops[name] for name in names if name in self.flops},
        )

    @contextmanager
    def threaded(self) -> Iterator[None]:
        """With as many threads as the row wants."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def measure(row: Row, *, rounds: int, warm_up: int, device: torch.device) -> dict[str, Any]:
    """Check a row, and time each contender once a round, in an order that is drawn anew every round.

    Returns plain types, by contender unless it says otherwise:

    row, agreement, threads: of the row.
    seconds: of every round.
    times: their median and quartiles, in ms.
    ratios: of each pair, the ratio of the medians, the quartiles of the rounds' own ratios, and among whom the other
        is the fastest.
    amounts: how much of what a second.
    rates: operations a second, and as a part of the rate of a large matrix product that took its turns among them.
    """
    with row.threaded():
        agreement = row.check()
        limits = {
            precision: flops.product(precision, device)
            for precision in sorted({kind for _, kind in row.flops.values()})
        }
        works = {**row.contenders, **{f"matrix product {kind}": limit.work for kind, limit in limits.items()}}
        seconds = _take_turns(works, rounds, warm_up, device)
        threads = torch.get_num_threads()
    of_limits = {f"matrix product {kind}": (limit.operations, kind) for kind, limit in limits.items()}
    return {
        "row": row.name,
        "agreement": agreement,
        "threads": threads,
        "seconds": seconds,
        "times": {name: _spread([1e3 * taken for taken in seconds[name]]) for name in works},
        "ratios": [_ratio(seconds, one, other) for one, other in row.pairs],
        "amounts": _amounts(row.amounts, seconds),
        "rates": rates({**row.flops, **of_limits}, seconds),
    }


def with_peaks(measured: dict[str, Any], peaks: Mapping[str, int]) -> dict[str, Any]:
    """A measured row with the contenders' peaks of bytes (peak.py) as far as they are known: peak_mib and ratios."""
    for ratio in measured["ratios"]:
        one, other = (peaks.get(ratio[side]) for side in ("one", "other"))
        ratio["memory"] = one / other if one and other else None
    return {**measured, "peak_mib": {name: peak / 2**20 for name, peak in peaks.items()}}


def rates(counted: Mapping[str, tuple[float, str]], seconds: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Operations a second, and as a part of those of the "matrix product" of the same precision."""
    found = {name: operations / statistics.median(seconds[name]) for name, (operations, _) in counted.items()}
    return {
        name: {"flops_per_s": rate, "of_matrix_rate": rate / found[f"matrix product {counted[name][1]}"]}
        for name, rate in found.items()
    }


def _take_turns(
    works: Mapping[str, Callable[[], object]], rounds: int, warm_up: int, device: torch.device
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(warm_up + rounds):
        for name in random.Random(number).sample(list(works), len(works)):
            taken = _seconds(works[name], device)
            if number >= warm_up:
                seconds[name].append(taken)
    return seconds


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _amounts(amounts: Mapping[str, tuple[float, str]], seconds: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    return {
        name: {"a_second": amount / statistics.median(seconds[name]), "at_once": amount, "unit": unit}
        for name, (amount, unit) in amounts.items()
    }


def _ratio(seconds: dict[str, list[float]], one: str, others: str | tuple[str, ...]) -> dict[str, Any]:
    among = [others] if isinstance(others, str) else [*others]
    other = min(among, key=lambda name: statistics.median(seconds[name]))
    medians = [statistics.median(seconds[name]) for name in (one, other)]
    paired = [a / b for a, b in zip(seconds[one], seconds[other], strict=True)]
    return {
        "one": one,
        "one_ms": 1e3 * medians[0],
        "other": other,
        "other_ms": 1e3 * medians[1],
        "among": among,
        "ratio": medians[0] / medians[1],
        "quartiles": _spread(paired)["quartiles"],
    }


def _spread(values: list[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "quartiles": [low, high]}


def near(what: str, one: Tensor, other: Tensor, tolerance: float, *, along: int | None = None) -> str:
    """Say how far apart two tensors are, relative to the norm of `other`; raises Disagreement above `tolerance`.

    With `along`, relative to how much `other` varies along that axis: a constant that all answers share would hide
    that they differ.
    """
    if one.shape != other.shape:
        raise Disagreement(f"{what}: the shapes are {tuple(one.shape)} and {tuple(other.shape)}.")
    one, other = one.detach().cpu().double(), other.detach().cpu().double()
    common = 0 if along is None else other.mean(along, keepdim=True)
    return _within(what, float((one - other).norm() / (other - common).norm()), tolerance)


def alike(what: str, one: Tensor, other: Tensor, tolerance: float) -> str:
    """The same for two single numbers, relative to `other`."""
    return _within(what, abs(one.item() / other.item() - 1), tolerance)


def _within(what: str, distance: float, tolerance: float) -> str:
    if not distance <= tolerance:  # NaN, too
        raise Disagreement(f"{what}: {distance:.2g} apart, more than {tolerance:g}, so this is not the same work.")
    return f"{what} {distance:.0e} apart"
