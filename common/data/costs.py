"""The costs of a split's samples as small arrays, and where batches begin that fill a limit on their cost.

The cost of a batch is its number of samples times the highest cost of its samples (`Data.cost`). A sample whose own
cost exceeds the limit is a batch by itself.
"""

from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.task import Costs
from common.types import MAX_INTEGER

Integers = NDArray[np.integer[Any]]


def equal_costs(cost: int, count: int) -> NDArray[np.int64]:
    """The costs of `count` samples of the same cost: a read-only array (count,) that takes 8 bytes of memory."""
    return np.broadcast_to(np.int64(cost), (count,))


def compact(costs: Costs) -> Integers:
    """The costs (n,) in the smallest integer type that holds them; equal costs take no memory."""
    values = np.asarray(costs, np.int64)
    if not len(values):
        return values
    lowest, highest = int(values.min()), int(values.max())
    if lowest == highest:
        return equal_costs(lowest, len(values))
    return values.astype(np.result_type(np.min_scalar_type(lowest), np.min_scalar_type(highest)))


def are_equal(costs: Integers) -> bool:
    """Whether all costs are the same number, or there are none."""
    return not len(costs) or bool(costs.min() == costs.max())


def batch_starts(costs: Integers, limit: int) -> Sequence[int]:
    """Where each batch begins if consecutive samples with these costs (n,) are split greedily.

    A batch ends before the first sample with which its cost would exceed `limit`. The time grows with the number of
    batches and of runs of equal costs, and not with the number of samples. For equal costs, the result is a range.
    """
    if are_equal(costs):
        return range(0, len(costs), _capacity(int(costs[0]), limit)) if len(costs) else range(0)
    starts = array("q", [0])
    highest = 0  # of the last batch
    for first, end, cost in _runs(costs):
        highest = max(highest, cost)
        next_start = max(first, starts[-1] + _capacity(highest, limit))
        if next_start < end:  # later batches of the run have samples of this run only, all but the last as many
            starts.extend(range(next_start, end, _capacity(cost, limit)))
            highest = cost
    return starts


def _capacity(cost: int, limit: int) -> int:
    """The largest number of samples of a batch whose highest cost is `cost`."""
    return max(1, limit // cost) if cost > 0 else MAX_INTEGER


def _runs(costs: Integers) -> Iterator[tuple[int, int, int]]:
    """Yield (first, end, cost) of each longest run of equal costs; `end` is exclusive."""
    changes = np.flatnonzero(costs[1:] != costs[:-1]) + 1
    bounds = np.concatenate(([0], changes, [len(costs)]))
    for first, end in pairwise(bounds):
        yield int(first), int(end), int(costs[first])
