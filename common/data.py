"""From a data set to optimizer steps and evaluation batches: order, cutting, workers, and where to go on.

Everything is a pure function of (seed, epoch, position): the same batches come for any number of workers and ranks,
and a run that goes on at step n needs nothing but n.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common.errors import UserError
from common.randomness import generator, mix
from common.task import Batch, Data, Split

Key = tuple[int, tuple[int, ...]]  # epoch, and the indices of one micro-batch


def cut(order: Sequence[int], costs: Sequence[int], limit: int) -> list[list[int]]:
    """Cut `order` into batches that weigh at most `limit`: number of samples times the heaviest one.

    A sample that alone weighs more gets a batch of its own.
    """
    batches: list[list[int]] = []
    heaviest = 0
    for index in order:
        heaviest = max(heaviest, costs[index])
        if not batches or (len(batches[-1]) + 1) * heaviest > limit:
            batches.append([])
            heaviest = costs[index]
        batches[-1].append(int(index))
    return batches


class Order:
    """The global batches of every epoch, one for each optimizer step."""

    def __init__(self, costs: Sequence[int], batch_size: int, seed: int):
        if not len(costs):
            raise UserError("the split train holds no samples; there is nothing to train on.")
        self.costs, self.batch_size, self.seed = costs, batch_size, seed

    def epoch(self, number: int) -> list[list[int]]:
        """A fresh permutation, cut into batches; a last one that is not full is left out unless it is the only one."""
        order = np.random.default_rng(mix(self.seed, "order", number)).permutation(len(self.costs))
        batches = cut(order.tolist(), self.costs, self.batch_size)
        last = batches[-1]
        full = (len(last) + 1) * max(self.costs[i] for i in last) > self.batch_size
        return batches if full or len(batches) == 1 else batches[:-1]

    def steps(self, epochs: int) -> int:
        """Number of steps in that many epochs."""
        lengths = {len(self.epoch(number)) for number in range(min(epochs, 3))}
        if len(lengths) == 1:  # samples of equal weight
            return epochs * lengths.pop()
        return sum(len(self.epoch(number)) for number in range(epochs))

    def after(self, step: int) -> Iterator[tuple[int, list[int]]]:
        """(epoch, global batch) of step number `step`, counted from 0, and of all that follow, without end."""
        epoch = 0
        while True:
            batches = self.epoch(epoch)
            for batch in batches[step:]:
                yield epoch, batch
            step = max(0, step - len(batches))
            epoch += 1


def share(batch: list[int], rank: int, world: int) -> list[int]:
    """A rank's contiguous part of a global batch; parts differ by at most one sample and may be empty."""
    return batch[len(batch) * rank // world : len(batch) * (rank + 1) // world]


class Loader:
    """Micro-batches of one split, built here or in worker processes, in the order of the keys it is given."""

    def __init__(self, data: Data, split: Split, *, seed: int | None, workers: int, pin: bool):
        self.micro = _MicroBatches(data, split, seed)
        self.workers, self.pin = workers, pin

    def __call__(self, keys: Iterable[Key]) -> Iterator[Batch]:
        """Raises UserError in this process when a sample could not be read in a worker."""
        loader = DataLoader(
            self.micro,
            batch_size=None,  # a key already is a whole micro-batch
            sampler=_Endless(keys),
            collate_fn=_as_it_is,
            num_workers=self.workers,
            pin_memory=self.pin,
            prefetch_factor=4 if self.workers else None,
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch


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
) -> Iterator[tuple[int, list[Batch]]]:
    """(epoch, this rank's micro-batches) of the steps from `start`, counted from 0, to before `stop`.

    A rank may have none in a step whose global batch has fewer samples than there are ranks.
    """

    def plan() -> Iterator[tuple[int, list[Key]]]:
        for epoch, batch in itertools.islice(order.after(start), max(0, stop - start)):
            mine = share(batch, rank, world)
            yield epoch, [(epoch, tuple(part)) for part in cut(mine, order.costs, micro_batch or order.batch_size)]

    loader = Loader(data, "train", seed=order.seed, workers=workers, pin=pin)
    batches = loader(key for _, keys in plan() for key in keys)
    for epoch, keys in plan():
        yield epoch, [next(batches) for _ in keys]


def evaluation(
    data: Data, split: Split, *, batch_size: int, rank: int, world: int, workers: int, limit: int | None = None
) -> Iterator[Batch]:
    """This rank's batches of a split: cut once, whatever the ranks and workers, and dealt whole, each sample once.

    `limit` stops after that many batches of the whole split.
    """
    batches = cut(range(data.count(split)), data.cost(split), batch_size)[:limit]
    loader = Loader(data, split, seed=None, workers=workers, pin=False)
    yield from loader((0, tuple(batch)) for batch in batches[rank::world])


def _as_it_is(batch: Any) -> Any:
    """Keep what `Data.collate` made; PyTorch would turn arrays that are meant for the host into tensors."""
    return batch


class _MicroBatches(Dataset[Any]):
    """What a worker runs: a key to a collated batch. A user's mistake is handed back, not raised: one sentence."""

    def __init__(self, data: Data, split: Split, seed: int | None):
        self.data, self.split, self.seed = data, split, seed

    def __getitem__(self, key: Key) -> Batch | UserError:
        epoch, indices = key
        try:
            return self.data.collate([self._sample(epoch, index) for index in indices])
        except UserError as error:
            return error

    def _sample(self, epoch: int, index: int) -> dict[str, Any]:
        random = None if self.seed is None else generator(self.seed, "sample", epoch, index)
        return self.data.sample(self.split, index, random)


class _Endless(torch.utils.data.Sampler[Any]):
    """Keys from an iterator, however long."""

    def __init__(self, keys: Iterable[Key]):
        self.keys = keys

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys)
