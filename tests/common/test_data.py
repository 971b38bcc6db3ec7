"""Order, cutting and sharing are pure functions of (seed, epoch, position)."""

import numpy as np
import pytest
import torch

from common import data as batching
from common.data import Order, cut, share
from common.errors import UserError


class Numbers:
    """Samples that are their index and a random number."""

    batch_size = 4

    def __init__(self, count: int, costs: list[int] | None = None):
        self.costs = costs or [1] * count

    def count(self, split):
        return len(self.costs)

    def cost(self, split):
        return self.costs

    def sample(self, split, index, generator):
        if index == 99:
            raise UserError("sample 99 is broken.")
        return {"id": index, "value": None if generator is None else float(torch.rand((), generator=generator))}

    def collate(self, samples):
        return {"ids": [s["id"] for s in samples], "values": [s["value"] for s in samples]}


def steps(data, *, start=0, stop, rank=0, world=1, workers=0, micro_batch=None, seed=0):
    order = Order(data.costs, data.batch_size, seed)
    options = {"micro_batch": micro_batch, "rank": rank, "world": world, "workers": workers, "pin": False}
    return [
        (epoch, [(batch["ids"], batch["values"]) for batch in batches])
        for epoch, batches in batching.steps(data, order, start=start, stop=stop, **options)
    ]


def test_every_sample_comes_once_an_epoch_but_for_a_last_batch_that_is_not_full():
    seen = [i for _, batches in steps(Numbers(22), stop=5) for ids, _ in batches for i in ids]
    assert len(seen) == len(set(seen)) == 20


def test_a_set_smaller_than_a_batch_is_one_batch():
    assert sorted(steps(Numbers(3), stop=1)[0][1][0][0]) == [0, 1, 2]


def test_epochs_and_seeds_are_shuffled_differently():
    first, second = (Order([1] * 50, 50, 0).epoch(n)[0] for n in (0, 1))
    assert first != second and sorted(first) == sorted(second)
    assert Order([1] * 50, 50, 1).epoch(0)[0] not in (first, second)


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_augmentation_do_not_depend_on_where_a_run_goes_on_or_on_workers(workers):
    data = Numbers(22)
    whole = steps(data, stop=13)
    assert steps(data, start=7, stop=13, workers=workers) == whole[7:]
    assert whole[0][1][0][1] != whole[5][1][0][1], "a sample is augmented anew in the next epoch"


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_share_each_global_batch_without_overlap(world):
    data = Numbers(22)
    whole = steps(data, stop=6)
    parts = [steps(data, stop=6, rank=rank, world=world, micro_batch=1) for rank in range(world)]
    for number, (epoch, batches) in enumerate(whole):
        dealt = [pair for part in parts for ids, values in part[number][1] for pair in zip(ids, values, strict=True)]
        assert dealt == [*zip(*batches[0], strict=True)]
        assert all(part[number][0] == epoch for part in parts)


def test_batches_weigh_samples_times_the_heaviest():
    costs = [2, 3, 9, 1, 1, 30, 4]
    batches = cut(range(7), costs, 10)
    assert batches == [[0, 1], [2], [3, 4], [5], [6]]


def test_micro_batches_keep_the_order():
    assert cut([5, 3, 1, 0, 2], [1] * 6, 2) == [[5, 3], [1, 0], [2]]
    assert share([7, 8, 9], 1, 2) == [8, 9] and share([7], 0, 2) == []


def test_evaluation_deals_whole_batches_and_every_sample_once():
    data = Numbers(11)
    for world in (1, 2, 3, 7):
        batches = [
            [*batching.evaluation(data, "val", batch_size=2, rank=rank, world=world, workers=0)]
            for rank in range(world)
        ]
        ids = [batch["ids"] for of_rank in batches for batch in of_rank]
        assert sorted(ids) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]
    assert batches[0][0]["values"] == [None, None], "evaluation is not augmented"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_sample_is_one_sentence_from_a_worker_too(workers):
    data = Numbers(100)
    with pytest.raises(UserError, match=r"^sample 99 is broken\.$"):
        [*batching.evaluation(data, "val", batch_size=20, rank=0, world=1, workers=workers)]


class Arrays(Numbers):
    """Batches of all kinds that a data set may make."""

    def collate(self, samples):
        numbers = np.array([s["value"] for s in samples])
        return {"ids": [s["id"] for s in samples], "array": numbers, "tensor": torch.tensor(numbers), "word": "train"}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_comes_as_it_was_made(workers):
    """PyTorch's own collating would make the array a tensor, and pin or move it, though it is meant for the host."""
    data = Arrays(12)
    order = Order(data.costs, data.batch_size, 0)
    options = {"micro_batch": None, "rank": 0, "world": 1, "workers": workers, "pin": False}
    found = [batches[0] for _, batches in batching.steps(data, order, start=0, stop=3, **options)]
    assert [{key: type(value) for key, value in batch.items()} for batch in found] == [
        {"ids": list, "array": np.ndarray, "tensor": torch.Tensor, "word": str}
    ] * 3
    assert all(batch["array"].dtype == np.float64 and len(batch["array"]) == 4 for batch in found)


def test_nothing_to_train_on_is_said():
    with pytest.raises(UserError, match="no samples"):
        Order([], 4, 0)


def test_steps_of_epochs_are_counted_for_equal_and_unequal_weights():
    assert Order([1] * 10, 4, 0).steps(7) == 14
    order = Order([1, 5, 2, 8, 3, 1, 1, 2] * 4, 10, 0)
    assert order.steps(5) == sum(len(order.epoch(n)) for n in range(5))
