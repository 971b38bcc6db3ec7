"""The same work done in turn by several contenders, compared first and timed then."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


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
    batch: int | None = None  # images in a step of the throughput row; None: as many as suit the device


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
    threads: int | None = None  # None: as many as the run has
    flops: Mapping[str, float] = field(default_factory=dict)  # floating-point operations of a contender's work
    limit: str | None = None  # the contender that shows what the device can do, by its rate of operations


def measure(row: Row, *, rounds: int, warm_up: int, device: torch.device) -> dict[str, Any]:
    """Check a row, and time each contender once a round, in an order that is drawn anew every round.

    Returns plain types: row, agreement, threads, seconds (every round's, by contender) and ratios (of each pair: ratio
    of the medians, the quartiles of the rounds' own ratios, and among whom the other is the fastest) and rates (of each
    contender whose operations are known: those per second, and as a part of the limit's).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(row.threads or before)
    try:
        agreement = row.check()
        seconds: dict[str, list[float]] = {name: [] for name in row.contenders}
        for number in range(warm_up + rounds):
            for name in random.Random(number).sample(list(row.contenders), len(row.contenders)):
                taken = _seconds(row.contenders[name], device)
                if number >= warm_up:
                    seconds[name].append(taken)
        threads = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    return {
        "row": row.name,
        "agreement": agreement,
        "threads": threads,
        "seconds": seconds,
        "ratios": [_ratio(seconds, one, other) for one, other in row.pairs],
        "rates": _rates(row, seconds),
    }


def _rates(row: Row, seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    rates = {name: flops / statistics.median(seconds[name]) for name, flops in row.flops.items()}
    return {name: {"flops_per_s": rate, "of_limit": rate / rates[row.limit or name]} for name, rate in rates.items()}


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


def _ratio(seconds: dict[str, list[float]], one: str, others: str | tuple[str, ...]) -> dict[str, Any]:
    among = [others] if isinstance(others, str) else [*others]
    other = min(among, key=lambda name: statistics.median(seconds[name]))
    medians = [statistics.median(seconds[name]) for name in (one, other)]
    paired = sorted(a / b for a, b in zip(seconds[one], seconds[other], strict=True))
    low, _, high = statistics.quantiles(paired, n=4, method="inclusive") if len(paired) > 1 else paired * 3
    return {
        "one": one,
        "one_ms": 1e3 * medians[0],
        "other": other,
        "other_ms": 1e3 * medians[1],
        "among": among,
        "ratio": medians[0] / medians[1],
        "quartiles": [low, high],
    }


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
