"""Costs are small arrays, and batches begin where adding one more sample would exceed the limit."""

import numpy as np
import pytest

from common.data.costs import are_equal, batch_starts, compact, equal_costs


def plain_starts(costs: list[int], limit: int) -> list[int]:
    starts: list[int] = []
    for i in range(len(costs)):
        if not starts or (i + 1 - starts[-1]) * max(costs[starts[-1] : i + 1]) > limit:
            starts.append(i)
    return starts


def test_equal_costs_are_an_array_that_takes_no_memory_for_its_samples() -> None:
    costs = equal_costs(3, 10**9)
    assert len(costs) == 10**9 and int(costs[123]) == 3 and costs.strides == (0,)
    assert are_equal(equal_costs(3, 5)) and are_equal(np.array([])) and not are_equal(np.array([1, 2]))


@pytest.mark.parametrize(
    ("costs", "bytes_each"), [([1, 255], 1), ([0, 256], 2), ([1, 2**16], 4), ([1, 2**32], 8), ([7, 7], 0), ([7], 0)]
)
def test_compact_costs_have_the_same_values_in_the_smallest_type(costs: list[int], bytes_each: int) -> None:
    values = compact(costs)
    assert values.tolist() == costs and len(compact([])) == 0
    assert values.strides == (bytes_each,)


@pytest.mark.parametrize("highest", [1, 2, 5, 40])
@pytest.mark.parametrize("layout", ["as they are", "ascending", "descending"])
def test_batches_begin_where_one_more_sample_would_exceed_the_limit(highest: int, layout: str) -> None:
    rng = np.random.default_rng(highest)
    for count in (0, 1, 2, 3, 50, 200):
        costs = rng.integers(0, highest + 1, count)
        if layout != "as they are":
            costs = np.sort(costs)[:: 1 if layout == "ascending" else -1]
        for limit in (1, 2, 3, 7, 30, 41, 10**6):
            expected = plain_starts(costs.tolist(), limit)
            assert [*batch_starts(costs, limit)] == expected
            assert [*batch_starts(compact(costs.tolist()), limit)] == expected


def test_the_batches_of_equal_costs_take_no_memory() -> None:
    assert batch_starts(equal_costs(3, 10**9), 8) == range(0, 10**9, 2)
