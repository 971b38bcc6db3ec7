"""The order of samples and their split into batches are pure functions of (seed, epoch, position)."""

import numpy as np
import pytest
import torch

from common.data import batching
from common.data.batching import Order, rank_samples, split_by_cost
from common.errors import UserError
from common.machine.seeds import mix


class Numbers:
    """Samples of their index and a random number."""

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
        (epoch, [(batch["ids"], batch["values"]) for batch in batches if "dummy" not in batch])
        for epoch, batches in batching.steps(data, order, start=start, stop=stop, **options)
    ]


def test_an_epoch_holds_every_sample_once_except_an_incomplete_last_batch():
    samples = [i for _, batches in steps(Numbers(22), stop=5) for ids, _ in batches for i in ids]
    assert len(samples) == len(set(samples)) == 20


def test_a_set_smaller_than_a_batch_is_one_batch():
    assert sorted(steps(Numbers(3), stop=1)[0][1][0][0]) == [0, 1, 2]


def test_epochs_and_seeds_are_shuffled_differently():
    first, second = (Order([1] * 50, 50, 0).epoch(n)[0] for n in (0, 1))
    assert first != second and sorted(first) == sorted(second)
    assert Order([1] * 50, 50, 1).epoch(0)[0] not in (first, second)


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_augmentation_do_not_depend_on_the_first_step_or_the_workers(workers):
    data = Numbers(22)
    uninterrupted = steps(data, stop=13)
    assert steps(data, start=7, stop=13, workers=workers) == uninterrupted[7:]
    assert uninterrupted[0][1][0][1] != uninterrupted[5][1][0][1], "another augmentation in the next epoch"


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_share_each_global_batch_without_overlap(world):
    data = Numbers(22)
    one_process = steps(data, stop=6)
    ranks = [steps(data, stop=6, rank=rank, world=world, micro_batch=1) for rank in range(world)]
    for number, (epoch, batches) in enumerate(one_process):
        pairs = [pair for rank in ranks for ids, values in rank[number][1] for pair in zip(ids, values, strict=True)]
        assert pairs == [*zip(*batches[0], strict=True)]
        assert all(rank[number][0] == epoch for rank in ranks)


@pytest.mark.parametrize("equal", [False, True])
def test_a_rank_without_samples_has_a_dummy_and_equal_ranks_have_equally_many_batches(equal):
    """Five samples for three ranks are 1, 2 and 2, and for seven ranks two have none; micro-batches hold one."""
    order = Order([1] * 5, 5, seed=0)
    for world, counts in {3: [1, 2, 2], 7: [0, 1, 1, 0, 1, 1, 1]}.items():
        for rank, count in enumerate(counts):
            options = {"micro_batch": 1, "rank": rank, "world": world, "workers": 0, "pin": False, "equal": equal}
            [(_, batches)] = batching.steps(Numbers(5), order, start=0, stop=1, **options)
            assert len(batches) == (max(counts) if equal else max(1, count))
            assert ["dummy" in batch for batch in batches] == [number >= count for number in range(len(batches))]


def test_a_batch_costs_its_sample_count_times_the_highest_cost():
    costs = [2, 3, 9, 1, 1, 30, 4]
    batches = split_by_cost(range(7), costs, 10)
    assert batches == [[0, 1], [2], [3, 4], [5], [6]]


def test_micro_batches_keep_the_order():
    assert split_by_cost([5, 3, 1, 0, 2], [1] * 6, 2) == [[5, 3], [1, 0], [2]]
    assert rank_samples([7, 8, 9], 1, 2) == [8, 9] and rank_samples([7], 0, 2) == []


def test_evaluation_gives_each_batch_to_one_rank_and_every_sample_once():
    data = Numbers(11)
    for world in (1, 2, 3, 7):
        batches = [
            [*batching.evaluation(data, "val", batch_size=2, rank=rank, world=world, workers=0)]
            for rank in range(world)
        ]
        ids = [batch["ids"] for rank_batches in batches for batch in rank_batches]
        assert sorted(ids) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]
    assert batches[0][0]["values"] == [None, None], "evaluation is not augmented"


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_gives_every_sentence_once_and_the_longest_first(world):
    """By hand: two of at most 10 or three of at most 6 fit into 20 tokens; equal lengths stay in order."""
    costs = [3, 10, 5, 30, 5, 9, 6, 2]
    ranks = [
        [
            batch["ids"]
            for batch in batching.evaluation(Numbers(8, costs), "val", batch_size=20, rank=r, world=world, workers=0)
        ]
        for r in range(world)
    ]
    expected = [[3], [1, 5], [6, 2, 4], [0, 7]]
    assert ranks == [expected[r::world] for r in range(world)]
    limited = batching.evaluation(Numbers(8, costs), "val", batch_size=20, rank=0, world=1, workers=0, limit=2)
    assert [batch["ids"] for batch in limited] == expected[:2]


@pytest.mark.parametrize("world", [1, 3])
def test_a_part_of_a_split_is_a_sample_of_it_and_the_same_in_each_evaluation(world):
    options = {"batch_size": 2, "world": world, "workers": 0, "samples": 20}
    ids = [
        i
        for rank in range(world)
        for batch in batching.evaluation(Numbers(1000), "val", rank=rank, **options)
        for i in batch["ids"]
    ]
    alone = batching.evaluation(Numbers(1000), "val", rank=0, **options | {"world": 1})
    assert sorted(ids) == sorted(i for batch in alone for i in batch["ids"])
    assert len({*ids}) == 20 and max(ids) - min(ids) > 500, "not the first ones, which may all be of one class"


def test_an_empty_split_has_no_batches_to_evaluate():
    data = Numbers(1)
    data.costs = []
    assert not [*batching.evaluation(data, "val", batch_size=2, rank=0, world=1, workers=0)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_sample_is_one_sentence_from_a_worker_too(workers):
    data = Numbers(100)
    with pytest.raises(UserError, match=r"^sample 99 is broken\.$"):
        [*batching.evaluation(data, "val", batch_size=20, rank=0, world=1, workers=workers)]


class Arrays(Numbers):
    """Batches with values of every type that a data set may return."""

    def collate(self, samples):
        numbers = np.array([s["value"] for s in samples])
        return {"ids": [s["id"] for s in samples], "array": numbers, "tensor": torch.tensor(numbers), "word": "train"}


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_does_not_change_what_collate_returns(workers):
    """PyTorch's default collating would turn the array into a tensor, and pin or move it; it must stay on the host."""
    data = Arrays(12)
    order = Order(data.costs, data.batch_size, 0)
    options = {"micro_batch": None, "rank": 0, "world": 1, "workers": workers, "pin": False}
    loaded = [batches[0] for _, batches in batching.steps(data, order, start=0, stop=3, **options)]
    assert [{key: type(value) for key, value in batch.items()} for batch in loaded] == [
        {"ids": list, "array": np.ndarray, "tensor": torch.Tensor, "word": str, "seeds": list}
    ] * 3
    assert all(batch["array"].dtype == np.float64 and len(batch["array"]) == 4 for batch in loaded)


def test_an_empty_training_split_is_an_error():
    with pytest.raises(UserError, match="no samples"):
        Order([], 4, 0)


def test_steps_of_epochs_are_counted_for_equal_and_unequal_costs():
    assert Order([1] * 10, 4, 0).steps(7) == 14
    order = Order([1, 5, 2, 8, 3, 1, 1, 2] * 4, 10, 0)
    assert order.steps(5) == sum(len(order.epoch(n)) for n in range(5))


@pytest.mark.parametrize(
    ("count", "cost", "batch_size", "samples_per_batch", "dropped"),
    [(22, 1, 4, 4, 2), (20, 1, 4, 4, 0), (3, 1, 4, 4, 0), (11, 3, 8, 2, 1), (9, 4, 8, 2, 1), (5, 9, 8, 1, 0)],
)
def test_samples_of_equal_cost_are_split_in_the_order_of_the_permutation(
    count, cost, batch_size, samples_per_batch, dropped
):
    """The published runs on images were split by this rule and must remain reproducible to the digit."""
    order = Order([cost] * count, batch_size, 5)
    for epoch in (0, 1, 7):
        permutation = np.random.default_rng(mix(5, "order", epoch)).permutation(count).tolist()
        starts = range(0, count - dropped, samples_per_batch)
        expected = [permutation[start : start + samples_per_batch] for start in starts]
        assert [*order.epoch(epoch)] == expected
        assert next(order.after(epoch * len(expected))) == (epoch, expected[0])


def lengths_of_sentences(count: int = 3000) -> list[int]:
    """A long-tailed distribution, as in text: most of 5 to 40 tokens, some of 200."""
    lengths = np.random.default_rng(0).lognormal(2.8, 0.6, count)
    return np.clip(lengths, 2, 200).astype(int).tolist()


def padded_tokens(batches: list[list[int]], costs: list[int]) -> list[int]:
    return [len(batch) * max(costs[i] for i in batch) for batch in batches]


@pytest.mark.parametrize("kind", [list, np.array])
def test_buckets_hold_every_sentence_once_an_epoch_within_the_limit(kind):
    costs = lengths_of_sentences()
    order = Order(kind(costs), 1000, 0)
    for epoch in range(3):
        batches = order.epoch(epoch)
        assert sorted(i for batch in batches for i in batch) == [*range(len(costs))]
        assert max(padded_tokens(batches, costs)) <= 1000
        assert len(batches) == order.steps(1)


def test_buckets_need_far_less_padding_than_a_plain_shuffle():
    costs = lengths_of_sentences()
    shuffled = np.random.default_rng(1).permutation(len(costs)).tolist()
    of_shuffle, of_buckets = (
        1 - sum(costs) / sum(padded_tokens(batches, costs))
        for batches in (split_by_cost(shuffled, costs, 1000), Order(costs, 1000, 0).epoch(0))
    )
    assert of_shuffle > 0.4 and of_buckets < 0.03


def test_buckets_are_shuffled_and_so_are_sentences_of_one_length():
    costs = lengths_of_sentences()
    epochs = [[*Order(costs, 1000, seed).epoch(epoch)] for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert epochs[0] == epochs[1], "a function of seed and epoch"
    for epoch in epochs[2:]:
        assert {*map(frozenset, epoch)} != {*map(frozenset, epochs[0])}, "batches hold other samples"
        assert [costs[batch[0]] for batch in epoch] != [costs[batch[0]] for batch in epochs[0]], "in another order"
    longest = [max(costs[i] for i in batch) for batch in epochs[0]]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.3, "neither ascending nor descending"


def test_buckets_resume_at_any_step_and_are_shared_by_ranks():
    costs = lengths_of_sentences(90)
    data = Numbers(90, costs)
    data.batch_size = 400
    per_epoch = Order(costs, 400, 0).steps(1)
    uninterrupted = steps(data, stop=2 * per_epoch + 3)
    assert [epoch for epoch, _ in uninterrupted] == [0] * per_epoch + [1] * per_epoch + [2] * 3
    assert steps(data, start=per_epoch + 2, stop=2 * per_epoch + 3) == uninterrupted[per_epoch + 2 :]
    ranks = [steps(data, stop=2 * per_epoch + 3, rank=rank, world=3, micro_batch=100) for rank in range(3)]
    for number, (_, batches) in enumerate(uninterrupted):
        micro_batches = [ids for rank in ranks for ids, _ in rank[number][1]]
        assert [i for ids in micro_batches for i in ids] == batches[0][0]
        assert all(len(ids) == 1 or padded_tokens([ids], costs)[0] <= 100 for ids in micro_batches)


def test_the_longest_sentences_are_kept_though_their_batch_is_incomplete():
    costs = [2] * 10 + [7]
    batches = Order(costs, 20, 0).epoch(0)
    assert sorted(map(sorted, batches)) == [[*range(10)], [10]]
