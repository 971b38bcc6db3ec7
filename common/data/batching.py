"""Batches for training and evaluation: the order of samples, their division into batches, and the share of each rank.

A global batch holds the samples of one optimizer step on all ranks. It depends only on the data, the batch size, the
seed, the epoch and its position in the epoch, and not on the number of workers and ranks. A run that resumes at step n
needs only n to continue with the same batches.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from common.data.loading import Key, Loader
from common.errors import UserError
from common.machine.seeds import mix
from common.task import Batch, Data, Split


def split_by_cost(order: Sequence[int], costs: Sequence[int] | NDArray[np.int64], limit: int) -> list[list[int]]:
    """Split the sample indices `order` into consecutive batches, each of a cost of at most `limit`.

    `costs[i]` is the cost of sample i (`Data.cost`): for an image 1, or its number of augmented views; for a pair of
    sentences, the number of tokens of the longer one. The cost of a batch is its number of samples times the highest
    cost of its samples. A sample whose own cost exceeds the limit becomes a batch by itself.
    """
    costs_in_order = np.asarray(costs)[np.asarray(order, np.int64)]
    return _split_at(list(order), _batch_ends(costs_in_order.tolist(), limit))


class Order:
    """The global batches of every epoch, one for each optimizer step.

    `batch_size` is the maximum cost of a batch (see `split_by_cost`). All epochs have the same number of batches. For
    given costs and a given batch size, the batches of an epoch depend only on the seed and on the epoch's number.

    If all samples have the same cost (images), they are shuffled and split. An incomplete last batch is dropped unless
    it is the only batch; the dropped samples differ between epochs.

    If costs differ (sentences), the samples are shuffled, sorted by cost, and then split. So a batch holds samples of
    similar cost and needs little padding. Finally, the batches are shuffled. No batch is dropped: before the batches
    are shuffled, the last one always holds the most expensive samples. If it were dropped, they would never be used.
    """

    def __init__(self, costs: Sequence[int] | NDArray[np.int64], batch_size: int, seed: int):
        if not len(costs):
            raise UserError("the split train holds no samples; there is nothing to train on.")
        self.costs = np.asarray(costs, np.int64)
        self.batch_size, self.seed = batch_size, seed
        sorted_costs = np.sort(self.costs)
        self._sorted_by_cost = bool(sorted_costs[0] < sorted_costs[-1])
        self._ends = _batch_ends(sorted_costs.tolist(), batch_size)  # the same in all epochs, like sorted_costs
        if not self._sorted_by_cost and len(self._ends) > 1:
            last_count = self._ends[-1] - self._ends[-2]
            if (last_count + 1) * int(sorted_costs[0]) <= batch_size:
                self._ends.pop()

    def epoch(self, number: int) -> list[list[int]]:
        """The global batches of epoch `number` (counted from 0), in the order of the steps."""
        rng = np.random.default_rng(mix(self.seed, "order", number))
        order = rng.permutation(len(self.costs))
        if not self._sorted_by_cost:
            return _split_at(order.tolist(), self._ends)
        order = order[np.argsort(self.costs[order], kind="stable")]  # stable: ties stay in random order
        batches = _split_at(order.tolist(), self._ends)
        return [batches[i] for i in rng.permutation(len(batches)).tolist()]

    def steps(self, epochs: int) -> int:
        """The number of optimizer steps in `epochs` epochs."""
        return epochs * len(self._ends)

    def after(self, step: int) -> Iterator[tuple[int, list[int]]]:
        """Yield (epoch, global batch) of step `step` (counted from 0) and of all later steps, without end."""
        first_epoch, completed = divmod(step, self.steps(1))
        for epoch in itertools.count(first_epoch):
            for batch in self.epoch(epoch)[completed:]:
                yield epoch, batch
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

    loader = Loader(data, "train", seed=order.seed, workers=workers, pin=pin)
    batches = loader(key for _, keys, _ in plan() for key in keys)
    for epoch, keys, real_count in plan():
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
    costs = np.asarray(data.cost(split), np.int64)
    part = np.sort(np.random.default_rng(mix(0, "evaluated part")).permutation(len(costs))[:samples])
    order = part[np.argsort(-costs[part], kind="stable")]
    batches = split_by_cost(order.tolist(), costs, batch_size)[:limit]
    loader = Loader(data, split, seed=None, workers=workers, pin=False)
    yield from loader((0, tuple(batch)) for batch in batches[rank::world])


def _batch_ends(costs: list[int], limit: int) -> list[int]:
    """The end (exclusive) of each batch into which `split_by_cost` splits samples with these costs, in this order."""
    ends: list[int] = []
    start = highest = 0
    for position, cost in enumerate(costs):
        highest = max(highest, cost)
        if position > start and (position - start + 1) * highest > limit:
            ends.append(position)
            start, highest = position, cost
    return [*ends, len(costs)] if costs else []


def _split_at(items: list[int], ends: list[int]) -> list[list[int]]:
    return [items[start:end] for start, end in itertools.pairwise([0, *ends])]
