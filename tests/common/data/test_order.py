"""The order of samples is that of a plain implementation with lists, and millions of samples take little memory.

Stored runs can be resumed and repeated bit for bit only as long as the order stays as it is here.
"""

import itertools
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from common.data import batching
from common.data.batching import Batches, Order
from common.data.costs import compact, equal_costs
from common.machine.seeds import generator, mix

SEEDS = (0, 12345)
MILLIONS = 10_000_000
MEBIBYTE = 2**20


class Numbers:
    """Samples of their index and a random number."""

    batch_size = 4

    def __init__(self, costs: Any):
        self.costs = costs

    def count(self, split: str) -> int:
        return len(self.costs)

    def cost(self, split: str) -> Any:
        return self.costs

    def sample(self, split: str, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        return {"id": index, "value": None if generator is None else float(torch.rand((), generator=generator))}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {"ids": [s["id"] for s in samples], "values": [s["value"] for s in samples]}


def lengths(count: int, scale: float = 10.0) -> list[int]:
    """A long-tailed distribution, as of the sentences of a text."""
    numbers = np.random.default_rng(count).lognormal(0.0, 0.6, count)
    return [1 + int(scale * number) for number in numbers]


# name -> (cost of each sample, batch size)
CASES: dict[str, tuple[list[int], int]] = {
    "images, the incomplete last batch dropped": ([1] * 22, 4),
    "images in full batches": ([1] * 20, 4),
    "fewer images than a batch": ([1] * 3, 4),
    "one image": ([1], 4),
    "a batch of one image": ([1] * 9, 1),
    "views of images": ([3] * 11, 8),
    "two views of which no second fits": ([4] * 9, 7),
    "each image above the limit": ([9] * 5, 8),
    "samples without cost": ([0] * 5, 2),
    "more images than 16 bits count": ([1] * 70_000, 600),
    "sentences": (lengths(300), 100),
    "many sentences": (lengths(5000), 700),
    "long sentences": (lengths(200, 400.0), 2000),
    "some sentences above the limit": (lengths(120, 30.0), 40),
    "costs above 16 bits": ([70_000 + i % 3 for i in range(50)], 300_000),
    "costs above 32 bits": ([2**33 + i % 2 for i in range(20)], 2**35),
    "two costs": ([1, 2] * 30, 7),
    "one sample differs": ([2] * 10 + [7], 20),
    "one sample without cost": ([0] + [3] * 10, 7),
    "two samples": ([5, 3], 20),
}
cases = pytest.mark.parametrize("case", CASES)


def plain_batches(order: list[int], costs: list[int], limit: int) -> list[list[int]]:
    """A sample joins the last batch if the batch's number of samples times its highest cost stays within the limit."""
    batches: list[list[int]] = []
    highest = 0
    for index in order:
        if batches and (len(batches[-1]) + 1) * max(highest, costs[index]) <= limit:
            batches[-1].append(index)
            highest = max(highest, costs[index])
        else:
            batches.append([index])
            highest = costs[index]
    return batches


def plain_epoch(costs: list[int], limit: int, seed: int, number: int) -> list[list[int]]:
    rng = np.random.default_rng(mix(seed, "order", number))
    order = rng.permutation(len(costs)).tolist()
    if len({*costs}) > 1:
        batches = plain_batches(sorted(order, key=lambda index: costs[index]), costs, limit)
        return [batches[i] for i in rng.permutation(len(batches)).tolist()]
    batches = plain_batches(order, costs, limit)
    if len(batches) > 1 and (len(batches[-1]) + 1) * costs[0] <= limit:
        batches.pop()
    return batches


def plain_steps(
    costs: list[int], limit: int, seed: int, stop: int, micro_batch: int | None, rank: int, world: int, equal: bool
) -> list[tuple[int, list[tuple[list[int], bool]]]]:
    """(epoch, (sample indices, whether it is a dummy) of each micro-batch of the rank) of each step from 0 on."""
    epochs = ((number, batch) for number in itertools.count() for batch in plain_epoch(costs, limit, seed, number))
    steps = []
    for number, batch in itertools.islice(epochs, stop):
        shares = [batch[len(batch) * r // world : len(batch) * (r + 1) // world] for r in range(world)]
        parts = [plain_batches(share, costs, micro_batch or limit) for share in shares]
        missing = max([1, *map(len, parts)] if equal else [1, len(parts[rank])]) - len(parts[rank])
        steps.append((number, [(part, False) for part in parts[rank]] + [(batch[:1], True)] * missing))
    return steps


def plain_evaluation(costs: list[int], limit: int, samples: int | None) -> list[list[int]]:
    order = [*range(len(costs))]
    if samples is not None:
        permutation = np.random.default_rng(mix(0, "evaluated part")).permutation(len(costs)).tolist()
        order = sorted(permutation[:samples])
    return plain_batches(sorted(order, key=lambda index: -costs[index]), costs, limit)


@cases
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", [list, np.array, compact])
def test_epochs_have_the_batches_of_the_plain_implementation(case: str, seed: int, kind: Callable[..., Any]) -> None:
    costs, limit = CASES[case]
    order = Order(kind(costs), limit, seed)
    for number in (0, 1, 7):
        expected = plain_epoch(costs, limit, seed, number)
        assert [*order.epoch(number)] == expected
        assert order.steps(3) == 3 * len(expected)
        assert all(type(index) is int for index in order.epoch(number)[0]), "seeds depend on the type of an index"


@cases
def test_resuming_at_any_step_gives_the_later_steps(case: str) -> None:
    costs, limit = CASES[case]
    order = Order(costs, limit, seed=3)
    per_epoch = order.steps(1)
    stop = 2 * per_epoch + 2
    expected = [(number, batch) for number in range(4) for batch in plain_epoch(costs, limit, 3, number)][:stop]
    for start in {0, 1, per_epoch // 2, per_epoch - 1, per_epoch, per_epoch + 1, stop - 1}:
        assert [*itertools.islice(order.after(start), stop - start)] == expected[start:]


@pytest.mark.parametrize("case", ["images, the incomplete last batch dropped", "views of images", "sentences",
                                  "some sentences above the limit", "two costs"])  # fmt: skip
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("micro_batch", [None, 1, 6, 31])
def test_ranks_have_the_micro_batches_of_the_plain_implementation(
    case: str, equal: bool, micro_batch: int | None
) -> None:
    costs, limit = CASES[case]
    order = Order(costs, limit, seed=1)
    stop = order.steps(1) + 2
    for world in (1, 2, 3, 7):
        for rank in {0, world // 2, world - 1}:
            expected = plain_steps(costs, limit, 1, stop, micro_batch, rank, world, equal)
            for start in (0, stop // 2):
                options = {"start": start, "stop": stop, "micro_batch": micro_batch, "rank": rank, "world": world}
                steps = batching.steps(Numbers(costs), order, workers=0, pin=False, equal=equal, **options)
                assert [described(step) for step in steps] == [seeded(step) for step in expected[start:]]


def described(step: tuple[int, list[dict[str, Any]]]) -> tuple[int, list[Any]]:
    """A step as the ids, random numbers and seeds of each of its batches, and whether the batch is a dummy."""
    number, batches = step
    return number, [(b["ids"], b["values"], b["seeds"], b.get("dummy", False)) for b in batches]


def seeded(step: tuple[int, list[tuple[list[int], bool]]]) -> tuple[int, list[Any]]:
    """The same from a step of the plain implementation: each sample's randomness depends on seed, epoch and index."""
    number, batches = step

    def value(index: int) -> float:
        return float(torch.rand((), generator=generator(1, "sample", number, index)))

    return number, [
        (ids, [value(i) for i in ids], [mix(1, "task", number, i) for i in ids], dummy) for ids, dummy in batches
    ]


@cases
@pytest.mark.parametrize("samples", [None, 2, 10**6])
def test_evaluation_has_the_batches_of_the_plain_implementation(case: str, samples: int | None) -> None:
    costs, limit = CASES[case]
    expected = plain_evaluation(costs, limit, samples)
    for world in (1, 3):
        for rank in range(world):
            for most in (None, 5):
                options = {"batch_size": limit, "rank": rank, "world": world, "limit": most, "samples": samples}
                batches = batching.evaluation(Numbers(costs), "val", workers=0, **options)
                assert [batch["ids"] for batch in batches] == expected[:most][rank::world]


def peak_memory(function: Callable[[], Any]) -> float:
    """The most memory that a call takes at once, in MiB."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1] / MEBIBYTE
    finally:
        tracemalloc.stop()


def read(order: Order, start: int, count: int) -> list[tuple[int, list[int]]]:
    """`count` global batches from step `start` on."""
    return [*itertools.islice(order.after(start), count)]


def test_millions_of_equal_samples_take_four_bytes_each() -> None:
    """38 MiB; as lists of batches, they took more than 400 MiB."""

    def resume() -> None:
        order = Order(equal_costs(1, MILLIONS), 64, seed=0)
        assert order.steps(1) == MILLIONS // 64
        ((epoch, batch),) = read(order, order.steps(1) // 2, 1)
        assert epoch == 0 and len(batch) == 64

    assert 4 * MILLIONS / MEBIBYTE <= peak_memory(resume) < 60


@pytest.mark.slow
def test_millions_of_sentences_take_a_few_bytes_each() -> None:
    """4 for the order, 1 for the cost, and 12 while an epoch is sorted."""
    costs = np.random.default_rng(0).integers(1, 100, MILLIONS)

    def resume() -> None:
        order = Order(costs, 4096, seed=0)
        ((epoch, batch),) = read(order, order.steps(1) // 2, 1)
        assert epoch == 0 and len(batch) * costs[batch].max() <= 4096

    assert peak_memory(resume) < 25 * MILLIONS / MEBIBYTE


def test_a_part_of_millions_of_samples_is_evaluated_in_little_memory() -> None:
    data = Numbers(equal_costs(1, MILLIONS))

    def evaluate() -> None:
        batches = batching.evaluation(data, "val", batch_size=64, rank=0, world=1, workers=0, samples=1000)
        assert sum(len(batch["ids"]) for batch in batches) == 1000

    assert peak_memory(evaluate) < 120


def test_resuming_reads_no_batch_before_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    read_numbers: list[int] = []
    read_batch = Batches.__getitem__

    def record(batches: Batches, number: int) -> list[int]:
        read_numbers.append(number)
        return read_batch(batches, number)

    monkeypatch.setattr(Batches, "__getitem__", record)
    for costs in ([1] * 1000, lengths(1000)):
        order = Order(costs, 40, seed=0)
        middle = order.steps(1) // 2
        read_numbers.clear()
        assert len(read(order, middle, 3)) == 3 and read_numbers == [middle, middle + 1, middle + 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_shuffled_once(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """Not once for the workers, which load ahead, and once for the steps."""
    shuffled: list[int] = []
    shuffle = Order.epoch

    def record(order: Order, number: int) -> Batches:
        shuffled.append(number)
        return shuffle(order, number)

    monkeypatch.setattr(Order, "epoch", record)
    data = Numbers([1] * 40)
    options: dict[str, Any] = {"micro_batch": None, "rank": 0, "world": 1, "workers": workers, "pin": False}
    steps: Iterator[Any] = batching.steps(data, Order(data.costs, 4, 0), start=3, stop=28, **options)
    assert len([*steps]) == 25 and shuffled == [0, 1, 2]
