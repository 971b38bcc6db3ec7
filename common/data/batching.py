"""Batches for training and evaluation: the order of samples, their division into batches, and the share of each rank.

A global batch holds the samples of one optimizer step on all ranks. It depends only on the data, the batch size, the
seed, the epoch and its position in the epoch, and not on the number of workers and ranks. A run that resumes at step n
needs only n to continue with the same batches.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from common.data.costs import Integers, are_equal, batch_starts, compact
from common.data.loading import Key, Loader
from common.errors import UserError
from common.machine.seeds import mix
from common.task import Batch, Costs, Data, Split


def split_by_cost(order: Sequence[int] | Integers, costs: Costs, limit: int) -> list[list[int]]:
    """Split the sample indices `order` into consecutive batches, each of a cost of at most `limit`.

    `costs[i]` is the cost of sample i (`Data.cost`): for an image 1, or its number of augmented views; for a pair of
    sentences, the number of tokens of the longer one. The cost of a batch is its number of samples times the highest
    cost of its samples. A sample whose own cost exceeds the limit becomes a batch by itself.
    """
    samples = np.asarray(order, np.int64)
    return [*Batches(samples, batch_starts(np.asarray(costs)[samples], limit), len(samples))]


class Batches:
    """A sequence of batches of sample indices, each of which becomes a list when it is read.

    Batch i holds `samples` (n,) from position `starts[i]` to the next start or, if it is the last one, to `stop`.
    `positions` is the order of the batches, and None stands for that of `starts`.
    """

    def __init__(
        self, samples: Integers, starts: Sequence[int], stop: int, positions: Integers | Sequence[int] | None = None
    ):
        self._samples, self._starts, self._stop = samples, starts, stop
        self._positions = range(len(starts)) if positions is None else positions

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, number: int) -> list[int]:
        position = int(self._positions[number])
        last = position + 1 == len(self._starts)
        end = self._stop if last else self._starts[position + 1]
        batch: list[int] = self._samples[self._starts[position] : end].tolist()
        return batch

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.__getitem__, range(len(self)))


class Order:
    """The global batches of every epoch, one for each optimizer step.

    `batch_size` is the maximum cost of a batch (see `split_by_cost`). All epochs have the same number of batches. For
    given costs and a given batch size, the batches of an epoch depend only on the seed and on the epoch's number.

    If all samples have the same cost (images), they are shuffled and split. An incomplete last batch is dropped unless
    it is the only batch; the dropped samples differ between epochs.

    If costs differ (sentences), the samples are shuffled, sorted by cost, and then split. So a batch holds samples of
    similar cost and needs little padding. Finally, the batches are shuffled. No batch is dropped: before the batches
    are shuffled, the last one always holds the most expensive samples. If it were dropped, they would never be used.

    An epoch of n samples takes 4 n bytes of memory (8 n from 2**31 samples on), and an order of samples of different
    costs a few bytes per sample in addition.
    """

    def __init__(self, costs: Costs, batch_size: int, seed: int):
        if not len(costs):
            raise UserError("the split train holds no samples; there is nothing to train on.")
        self.costs = compact(costs)
        self.batch_size, self.seed = batch_size, seed
        self._sorted_by_cost = not are_equal(self.costs)
        # The starts are the same in all epochs, like the sorted costs.
        self._starts = batch_starts(np.sort(self.costs) if self._sorted_by_cost else self.costs, batch_size)
        self._stop = len(self.costs)
        if not self._sorted_by_cost and len(self._starts) > 1:
            last_count = self._stop - self._starts[-1]
            if (last_count + 1) * int(self.costs[0]) <= batch_size:
                self._starts, self._stop = self._starts[:-1], self._starts[-1]

    def epoch(self, number: int) -> Batches:
        """The global batches of epoch `number` (counted from 0), in the order of the steps."""
        rng = np.random.default_rng(mix(self.seed, "order", number))
        order = _indices(len(self.costs))
        rng.shuffle(order)  # the order of rng.permutation(n), which would be int64
        if not self._sorted_by_cost:
            return Batches(order, self._starts, self._stop)
        order = order[np.argsort(self.costs[order], kind="stable")]  # stable: ties stay in random order
        return Batches(order, self._starts, self._stop, rng.permutation(len(self._starts)))

    def steps(self, epochs: int) -> int:
        """The number of optimizer steps in `epochs` epochs."""
        return epochs * len(self._starts)

    def after(self, step: int) -> Iterator[tuple[int, list[int]]]:
        """Yield (epoch, global batch) of step `step` (counted from 0) and of all later steps, without end."""
        first_epoch, completed = divmod(step, self.steps(1))
        for epoch in itertools.count(first_epoch):
            batches = self.epoch(epoch)
            for number in range(completed, len(batches)):
                yield epoch, batches[number]
            completed = 0


def rank_samples(batch: list[int], rank: int, world: int) -> list[int]:
    """The samples of a global batch that belong to `rank`; they are contiguous in the batch.

    `world` is the number of ranks. The numbers of samples of two ranks differ by at most one. A rank may have no
    samples.
    """
    return batch[len(batch) * rank // world : len(batch) * (rank + 1) // world]


def steps(
    data: Data,
    order: Order,
    *,
    start: int,
    stop: int,
    micro_batch: int | None,
    rank: int,
    world: int,
    workers: int,
    pin: bool,
    equal: bool = False,
) -> Iterator[tuple[int, list[Batch]]]:
    """Yield (epoch, this rank's micro-batches) of each step from `start` (counted from 0) to `stop` - 1.

    `micro_batch` is the maximum cost of a micro-batch; None stands for the batch size of `order`. `world` is the number
    of ranks. `workers` is the number of processes that load data for this rank; with 0, this process loads them. `pin`
    puts the batches into pinned memory.

    If a global batch has fewer samples than there are ranks, a rank without samples gets a dummy batch: the first
    sample of the global batch, marked by the key "dummy". With `equal`, further dummy batches are added until all ranks
    have the same number of micro-batches.
    """

    def plan() -> Iterator[tuple[int, list[Key], int]]:
        """Yield (epoch, keys of this rank's micro-batches, number of micro-batches before the dummies) for each step.

        The keys of the dummy batches come last.
        """
        for epoch, batch in itertools.islice(order.after(start), max(0, stop - start)):
            ranks = range(world) if equal else [rank]
            per_rank = [
                split_by_cost(rank_samples(batch, number, world), order.costs, micro_batch or order.batch_size)
                for number in ranks
            ]
            micro_batches = per_rank[rank if equal else 0]
            count = max(map(len, per_rank)) if equal else 1
            dummies = [batch[:1]] * (count - len(micro_batches))
            yield epoch, [(epoch, tuple(indices)) for indices in (*micro_batches, *dummies)], len(micro_batches)

    # Workers load ahead, so two iterators read one plan; it stores what only one of them has read.
    for_loader, for_steps = itertools.tee(plan())
    loader = Loader(data, "train", seed=order.seed, workers=workers, pin=pin)
    batches = loader(key for _, keys, _ in for_loader for key in keys)
    for epoch, keys, real_count in for_steps:
        micro_batches = [next(batches) for _ in keys]
        yield epoch, micro_batches[:real_count] + [{**dummy, "dummy": True} for dummy in micro_batches[real_count:]]


def evaluation(
    data: Data,
    split: Split,
    *,
    batch_size: int,
    rank: int,
    world: int,
    workers: int,
    limit: int | None = None,
    samples: int | None = None,
) -> Iterator[Batch]:
    """Yield this rank's batches of a split. Batch i belongs to rank i % `world`.

    The batches do not depend on `world`, the number of ranks. Samples are sorted by decreasing cost, and samples of
    equal cost by index. So batches need little padding, and if memory is too small for the most expensive samples, the
    error comes at the start.

    `batch_size` is the maximum cost of a batch. `workers` is as in `steps`. `limit` is the maximum number of batches of
    all ranks together; None sets no limit. `samples` is the number of samples of the split that are used; None stands
    for all. They are chosen at random, but every call chooses the same ones.
    """
    costs = compact(data.cost(split))
    order = _indices(len(costs))
    if samples is not None:
        order = np.sort(np.random.default_rng(mix(0, "evaluated part")).permutation(order)[:samples])
    if are_equal(costs):
        costs = costs[: len(order)]
    else:
        order = order[np.argsort(costs.max() - costs[order], kind="stable")]
        costs = costs[order]
    batches = Batches(order, batch_starts(costs, batch_size), len(order))
    loader = Loader(data, split, seed=None, workers=workers, pin=False)
    yield from loader((0, tuple(batches[number])) for number in range(len(batches))[:limit][rank::world])


def _indices(count: int) -> Integers:
    """The indices of `count` samples in ascending order, (count,), in 4 bytes each if these suffice."""
    return np.arange(count, dtype=np.int32 if count <= 2**31 else np.int64)
