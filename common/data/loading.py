"""Keys to micro-batches, here or in worker processes; a fault names the sample it came from."""

import signal
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from common.data.workers import Activity, ActivityTable, DeadWorker, WorkerPool
from common.errors import UserError
from common.machine import memory
from common.machine.seeds import generator, mix
from common.task import Batch, Data, Split

Key = tuple[int, tuple[int, ...]]  # epoch, and the indices of one micro-batch
MAX_LISTED_SAMPLES = 8  # samples; of more than that there is the number
MEMORY_ADVICE = "lower trainer.workers, give smaller samples, or more memory"
SHARED_MEMORY_ADVICE = "enlarge /dev/shm (docker run --shm-size), or lower trainer.workers or trainer.micro_batch"
REASONS = {
    "SIGKILL": f"as a system does that is short of memory; {MEMORY_ADVICE}",
    "SIGBUS": f"as happens when shared memory is full; {SHARED_MEMORY_ADVICE}",
}
CRASH_ADVICE = "as happens when a library crashes; look at that sample, and try trainer.workers=0"


class Loader:
    """Micro-batches of one split, built here or in worker processes, in the order of the keys it is given."""

    def __init__(self, data: Data, split: Split, *, seed: int | None, workers: int, pin: bool):
        self.data, self.split, self.seed = data, split, seed
        self.workers, self.pin = workers, pin

    def __call__(self, keys: Iterable[Key]) -> Iterator[Batch]:
        """Micro-batches as they are asked for; the workers end with the last, or when nobody asks on.

        Raises UserError in this process when a sample cannot be read, when memory does not do, and when a worker is
        killed. A defect of the data set is a RuntimeError that names the sample, with the worker's own traceback.
        """
        notes = ActivityTable(self.workers)
        loader = DataLoader(
            _MicroBatches(self.data, self.split, self.seed, notes),
            batch_size=None,  # a key already is a whole micro-batch
            sampler=_KeySampler(keys),
            collate_fn=_identity,
            num_workers=self.workers,
            pin_memory=self.pin,
            prefetch_factor=4 if self.workers else None,
            worker_init_fn=notes.begin,
            # Python 3.14 has a server fork by default, which would have to unpickle the data set and be the parent.
            multiprocessing_context="fork" if self.workers and sys.platform == "linux" else None,
        )
        crew = WorkerPool(loader, notes)
        try:
            while True:
                try:
                    batch = crew.take()
                except StopIteration:
                    return
                except Exception:
                    deaths = crew.deaths()
                    if not deaths:
                        raise
                    batch = UserError(_describe_dead_workers(self.data, self.split, deaths))
                if isinstance(batch, Exception):  # raised out here, where no frame of PyTorch's keeps the workers
                    raise batch
                yield batch
        finally:
            crew.end()


def _identity(batch: Any) -> Any:
    """Keep what `Data.collate` made; PyTorch would turn arrays that are meant for the host into tensors."""
    return batch


class _MicroBatches(Dataset[Any]):
    """What a worker runs: a key to a collated batch. What goes wrong there is handed back: as it is to be read."""

    def __init__(self, data: Data, split: Split, seed: int | None, notes: ActivityTable):
        self.data, self.split, self.seed = data, split, seed
        self.notes = notes

    def __getitem__(self, key: Key) -> Batch | Exception:
        epoch, indices = key
        samples: list[dict[str, Any]] = []
        try:
            for index in indices:
                self.notes.write(Activity.SAMPLE, index)
                samples.append(self._sample(epoch, index))
            self.notes.write(Activity.COLLATING, indices[0])
            batch = self.data.collate(samples)
            if self.seed is not None:  # for what a task draws for each sample, whatever else is in its batch
                batch["seeds"] = [mix(self.seed, "task", epoch, index) for index in indices]
            if get_worker_info() is not None:
                _move_to_shared_memory(batch)
        except UserError as error:
            return error
        except Exception as error:
            of_one = len(samples) < len(indices)
            return self._describe_failure(error, epoch, [indices[len(samples)]] if of_one else indices, of_one)
        self.notes.write(Activity.NOTHING)
        return batch

    def _sample(self, epoch: int, index: int) -> dict[str, Any]:
        random = None if self.seed is None else generator(self.seed, "sample", epoch, index)
        return self.data.sample(self.split, index, random)

    def _describe_failure(self, error: Exception, epoch: int, indices: Sequence[int], of_one: bool) -> Exception:
        """The exception that this process's parent is to raise; raised here where there is no parent."""
        names = _names(self.data, self.split, indices)
        if "shared memory" in str(error) and "No space left" in str(error):
            return UserError(f"Shared memory is full, with no room to hand over {names}; {SHARED_MEMORY_ADVICE}.")
        if memory.is_out_of_memory(error):
            reason = str(error).partition("\n")[0] or type(error).__name__
            return UserError(f"Memory ran out on {names} ({reason}); {MEMORY_ADVICE}.")
        done = "made" if of_one else "collated"
        when = "" if self.seed is None else f" in epoch {epoch}"
        said = f"{names} cannot be {done}{when}: {type(error).__name__}: {error}"
        if get_worker_info() is None:
            raise RuntimeError(said) from error
        return RuntimeError(f"{said}\n\nIn the worker:\n{traceback.format_exc()}")


def _move_to_shared_memory(batch: Batch) -> None:
    """Move tensors into shared memory here: where that is full, the queue's thread would lose the batch in silence."""
    tensors: list[Any] = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    for tensor in tensors:
        tensor.share_memory_()


def _names(data: Data, split: Split, indices: Sequence[int]) -> str:
    """What people call samples: "sample 17 of train (photos/17.jpg)"."""
    numbers = ", ".join(str(i) for i in indices[:MAX_LISTED_SAMPLES])
    more = f" and {len(indices) - MAX_LISTED_SAMPLES} more" if len(indices) > MAX_LISTED_SAMPLES else ""
    where = getattr(data, "where", None)
    places = f" ({', '.join(where(split, i) for i in indices[:MAX_LISTED_SAMPLES])}{more and ' ...'})" if where else ""
    return f"{'sample' if len(indices) == 1 else 'samples'} {numbers}{more} of {split}{places}"


def _describe_dead_workers(data: Data, split: Split, deaths: list[DeadWorker]) -> str:
    """One sentence on workers that were killed; the first that had a sample in its hands speaks for the others."""
    code, at, index = max(deaths, key=lambda death: (death.at != Activity.NOTHING, death.code != 0))
    name = _names(data, split, [index])
    doing = {
        Activity.NOTHING: f"between two batches of {split}",
        Activity.SAMPLE: f"on {name}",
        Activity.COLLATING: f"collating the batch that begins with {name}",
    }
    killer = signal.Signals(-code).name if code < 0 else ""
    ended = f"was killed by {killer}" if killer else f"ended with exit code {code}"
    return (
        f"A worker process {ended} while it was {doing[at]}, {REASONS.get(killer, CRASH_ADVICE)}; a training run "
        "resumes with resume=auto."
    )


class _KeySampler(torch.utils.data.Sampler[Any]):
    """Keys from an iterator, however long."""

    def __init__(self, keys: Iterable[Key]):
        self.keys = keys

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys)
