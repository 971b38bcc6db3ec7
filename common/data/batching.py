"""From a data set to optimizer steps and evaluation batches: order, cutting, workers, and where to go on.

Everything is a pure function of (seed, epoch, position): the same batches come for any number of workers and ranks,
and a run that goes on at step n needs nothing but n.
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
    """Cut `order` into batches that weigh at most `limit`: number of samples times the heaviest one.

    A sample that alone weighs more gets a batch of its own.
    """
    weights = np.asarray(costs)[np.asarray(order, np.int64)]
    return _parts(list(order), _ends(weights.tolist(), limit))


class Order:
    """The global batches of every epoch, one for each optimizer step.

    Samples of equal weight (images) are shuffled and cut; a last batch that is not full is left out unless it is the
    only one: the next epoch leaves others out. Samples of unequal weight (sentences) are shuffled, sorted by weight and
    then cut, so that a batch holds samples of like weight and little padding, and the batches are shuffled in turn.
    None of those is left out: the last of the cut holds the heaviest samples of all, which would never be learnt.
    Either way all epochs have the same number of batches, and each is a function of (seed, its number).
    """

    def __init__(self, costs: Sequence[int] | NDArray[np.int64], batch_size: int, seed: int):
        if not len(costs):
            raise UserError("the split train holds no samples; there is nothing to train on.")
        self.costs = np.asarray(costs, np.int64)
        self.batch_size, self.seed = batch_size, seed
        weights = np.sort(self.costs)
        self._buckets = bool(weights[0] < weights[-1])
        self._ends = _ends(weights.tolist(), batch_size)  # the same in every epoch, whichever sample is where
        if not self._buckets and len(self._ends) > 1:
            last = self._ends[-1] - self._ends[-2]
            if (last + 1) * int(weights[0]) <= batch_size:
                self._ends.pop()

    def epoch(self, number: int) -> list[list[int]]:
        """The batches of epoch `number`, counted from 0, in their order."""
        random = np.random.default_rng(mix(self.seed, "order", number))
        order = random.permutation(len(self.costs))
        if not self._buckets:
            return _parts(order.tolist(), self._ends)
        order = order[np.argsort(self.costs[order], kind="stable")]  # stable: equals stay in random order
        batches = _parts(order.tolist(), self._ends)
        return [batches[i] for i in random.permutation(len(batches)).tolist()]

    def steps(self, epochs: int) -> int:
        """Number of steps in that many epochs."""
        return epochs * len(self._ends)

    def after(self, step: int) -> Iterator[tuple[int, list[int]]]:
        """(epoch, global batch) of step number `step`, counted from 0, and of all that follow, without end."""
        first, done = divmod(step, self.steps(1))
        for epoch in itertools.count(first):
            for batch in self.epoch(epoch)[done:]:
                yield epoch, batch
            done = 0


def rank_samples(batch: list[int], rank: int, world: int) -> list[int]:
    """A rank's contiguous part of a global batch; parts differ by at most one sample and may be empty."""
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
    """(epoch, this rank's micro-batches) of the steps from `start`, counted from 0, to before `stop`.

    A rank without samples, in a step whose global batch has fewer samples than there are ranks, gets one of the step's
    again, in a batch that says "dummy". With `equal` all ranks have equally many batches, by more of these.
    """

    def plan() -> Iterator[tuple[int, list[Key], int]]:
        for epoch, batch in itertools.islice(order.after(start), max(0, stop - start)):
            shares = [rank_samples(batch, one, world) for one in (range(world) if equal else [rank])]
            parts = [split_by_cost(mine, order.costs, micro_batch or order.batch_size) for mine in shares]
            mine = parts[rank if equal else 0]
            count = max(map(len, parts)) if equal else 1
            dummies = [batch[:1]] * (count - len(mine))
            yield epoch, [(epoch, tuple(part)) for part in (*mine, *dummies)], len(mine)

    loader = Loader(data, "train", seed=order.seed, workers=workers, pin=pin)
    batches = loader(key for _, keys, _ in plan() for key in keys)
    for epoch, keys, real in plan():
        micro_batches = [next(batches) for _ in keys]
        yield epoch, micro_batches[:real] + [{**dummy, "dummy": True} for dummy in micro_batches[real:]]


def evaluation(
    data: Data, split: Split, *, batch_size: int, rank: int, world: int, workers: int, limit: int | None = None
) -> Iterator[Batch]:
    """This rank's batches of a split: cut once, whatever the ranks and workers, and dealt whole, each sample once.

    The heaviest samples come first, and equals in their own order: batches have little padding, and one that is too
    large for the memory shows at once. `limit` stops after that many batches of the whole split.
    """
    costs = np.asarray(data.cost(split), np.int64)
    order = np.argsort(-costs, kind="stable")
    batches = split_by_cost(order.tolist(), costs, batch_size)[:limit]
    loader = Loader(data, split, seed=None, workers=workers, pin=False)
    yield from loader((0, tuple(batch)) for batch in batches[rank::world])


def _ends(weights: list[int], limit: int) -> list[int]:
    """Where each batch ends (its last sample's position + 1) when samples of these weights are cut in this order."""
    ends: list[int] = []
    start = heaviest = 0
    for position, weight in enumerate(weights):
        heaviest = max(heaviest, weight)
        if position > start and (position - start + 1) * heaviest > limit:
            ends.append(position)
            start, heaviest = position, weight
    return [*ends, len(weights)] if weights else []


def _parts(items: list[int], ends: list[int]) -> list[list[int]]:
    return [items[start:end] for start, end in itertools.pairwise([0, *ends])]
