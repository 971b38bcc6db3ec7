"""Worker processes: they turn keys into micro-batches, and say which sample a fault came from."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from common.errors import UserError
from common.randomness import generator
from common.task import Batch, Data, Split

Key = tuple[int, tuple[int, ...]]  # epoch, and the indices of one micro-batch


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
