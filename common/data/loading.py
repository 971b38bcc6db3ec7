"""Build micro-batches in this process or in worker processes. An error names the sample that caused it."""

import signal
import sys
import time
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

Key = tuple[int, tuple[int, ...]]  # identifies a micro-batch: the epoch, and the indices of its samples
MAX_LISTED_SAMPLES = 8  # maximum number in an error message, which also counts the others
MEMORY_ADVICE = "lower trainer.workers, give smaller samples, or more memory"
SHARED_MEMORY_ADVICE = "enlarge /dev/shm (docker run --shm-size), or lower trainer.workers or trainer.micro_batch"
LIKELY_CAUSES = {
    "SIGKILL": f"as happens when memory runs out; {MEMORY_ADVICE}",
    "SIGBUS": f"as happens when shared memory is full; {SHARED_MEMORY_ADVICE}",
}
CRASH_ADVICE = "as happens when a library crashes; look at that sample, and try trainer.workers=0"


class Loader:
    """Builds micro-batches of one split, in this process (0 workers) or in worker processes.

    `seed` seeds augmentation; if it is None, samples are not augmented. `pin` puts the batches into pinned memory.
    """

    def __init__(self, data: Data, split: Split, *, seed: int | None, workers: int, pin: bool):
        self.data, self.split, self.seed = data, split, seed
        self.workers, self.pin = workers, pin

    def __call__(self, keys: Iterable[Key]) -> Iterator[Batch]:
        """Yield the micro-batch of each key, in order. Workers stop after the last key or when the iterator is closed.

        Raises UserError if a sample cannot be read, if memory runs out, or if a worker is killed or crashes. Any other
        error in the data set's code becomes a RuntimeError that names the sample or, after an error in `collate`, the
        samples. If a worker raised the error, the RuntimeError also contains the worker's traceback.
        """
        activities = ActivityTable(self.workers)
        loader = DataLoader(
            _MicroBatches(self.data, self.split, self.seed, activities),
            batch_size=None,  # a key already is a whole micro-batch
            sampler=_KeySampler(keys),
            collate_fn=_identity,
            num_workers=self.workers,
            pin_memory=self.pin,
            prefetch_factor=4 if self.workers else None,
            worker_init_fn=activities.start_worker,
            # By default, Python 3.14 forks workers from a server process. The data set would have to be pickled for it,
            # and the server, not this process, would be the workers' parent.
            multiprocessing_context="fork" if self.workers and sys.platform == "linux" else None,
        )
        pool = WorkerPool(loader, activities)
        try:
            while True:
                try:
                    batch = pool.take()
                except StopIteration:
                    return
                except Exception as error:
                    dead_workers = pool.dead_workers()
                    if not dead_workers and isinstance(error, (ConnectionError, EOFError)):
                        time.sleep(1.0)  # the worker that should send a tensor may be about to exit
                        dead_workers = pool.dead_workers()
                    if not dead_workers:
                        raise
                    batch = UserError(_describe_dead_workers(self.data, self.split, dead_workers))
                # A worker returns its error, which is raised here. If PyTorch's iterator raised the error, the
                # traceback would hold the iterator's frames, which keep the workers alive.
                if isinstance(batch, Exception):
                    raise batch
                yield batch
        finally:
            pool.close()


def _identity(batch: Any) -> Any:
    """Return a batch unchanged. PyTorch's default `collate_fn` would convert NumPy arrays in it to tensors."""
    return batch


class _MicroBatches(Dataset[Any]):
    """Maps a key to a collated batch.

    A worker returns an error instead of raising it, so that the parent process can raise it.
    """

    def __init__(self, data: Data, split: Split, seed: int | None, activities: ActivityTable):
        self.data, self.split, self.seed = data, split, seed
        self.activities = activities

    def __getitem__(self, key: Key) -> Batch | Exception:
        epoch, indices = key
        samples: list[dict[str, Any]] = []
        try:
            for index in indices:
                self.activities.write(Activity.SAMPLE, index)
                samples.append(self._sample(epoch, index))
            self.activities.write(Activity.COLLATING, indices[0])
            batch = self.data.collate(samples)
            if self.seed is not None:  # for a task's random choices, which must not depend on the rest of the batch
                batch["seeds"] = [mix(self.seed, "task", epoch, index) for index in indices]
            if get_worker_info() is not None:
                _move_to_shared_memory(batch)
        except UserError as error:
            return error
        except Exception as error:
            if len(samples) < len(indices):
                return self._describe_failure(error, "made", epoch, [indices[len(samples)]])
            return self._describe_failure(error, "collated", epoch, indices)
        self.activities.write(Activity.IDLE)
        return batch

    def _sample(self, epoch: int, index: int) -> dict[str, Any]:
        if self.seed is None:
            return self.data.sample(self.split, index, None)
        if epoch_sample := getattr(self.data, "epoch_sample", None):
            sample: dict[str, Any] = epoch_sample(self.split, index, mix(self.seed, "epoch", epoch))
            return sample
        return self.data.sample(self.split, index, generator(self.seed, "sample", epoch, index))

    def _describe_failure(self, error: Exception, operation: str, epoch: int, indices: Sequence[int]) -> Exception:
        """Return the exception that the parent process is to raise.

        Outside a worker, a RuntimeError is raised at once instead.
        """
        names = _names(self.data, self.split, indices)
        if "shared memory" in str(error) and "No space left" in str(error):
            return UserError(f"Shared memory is full, with no room to hand over {names}; {SHARED_MEMORY_ADVICE}.")
        if memory.is_out_of_memory(error):
            reason = str(error).partition("\n")[0] or type(error).__name__
            return UserError(f"Memory ran out on {names} ({reason}); {MEMORY_ADVICE}.")
        in_epoch = "" if self.seed is None else f" in epoch {epoch}"
        message = f"{names} cannot be {operation}{in_epoch}: {type(error).__name__}: {error}"
        if get_worker_info() is None:
            raise RuntimeError(message) from error
        return RuntimeError(f"{message}\n\nIn the worker:\n{traceback.format_exc()}")


def _move_to_shared_memory(batch: Batch) -> None:
    """Move a batch's tensors to shared memory; raises RuntimeError if shared memory is full.

    Without this, PyTorch's queue would move them later. If that failed, it would drop the batch without an error.
    """
    tensors: list[Any] = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    for tensor in tensors:
        tensor.share_memory_()


def _names(data: Data, split: Split, indices: Sequence[int]) -> str:
    """Name samples for a message: "sample 17 of train (photos/17.jpg)"."""
    listed = indices[:MAX_LISTED_SAMPLES]
    numbers = ", ".join(map(str, listed))
    more = f" and {len(indices) - len(listed)} more" if len(indices) > len(listed) else ""
    where = getattr(data, "where", None)
    sources = f" ({', '.join(where(split, i) for i in listed)}{more and ' ...'})" if where else ""
    return f"{'sample' if len(indices) == 1 else 'samples'} {numbers}{more} of {split}{sources}"


def _describe_dead_workers(data: Data, split: Split, dead_workers: list[DeadWorker]) -> str:
    """Return a sentence about one of the workers that died.

    A worker that was building or collating samples is preferred, because a sample may be the cause of its death.
    """
    code, activity, index = max(dead_workers, key=lambda worker: (worker.activity != Activity.IDLE, worker.code != 0))
    name = _names(data, split, [index])
    description = {
        Activity.IDLE: f"between two batches of {split}",
        Activity.SAMPLE: f"on {name}",
        Activity.COLLATING: f"collating the batch that begins with {name}",
    }[activity]
    signal_name = signal.Signals(-code).name if code < 0 else ""
    ended = f"was killed by {signal_name}" if signal_name else f"ended with exit code {code}"
    cause = LIKELY_CAUSES.get(signal_name, CRASH_ADVICE)
    return f"A worker process {ended} while it was {description}, {cause}; a training run resumes with resume=auto."


class _KeySampler(torch.utils.data.Sampler[Any]):
    """Yields keys from an iterator of any length."""

    def __init__(self, keys: Iterable[Key]):
        self.keys = keys

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys)
