"""Workers: errors and deaths name their sample, only the parent reacts to signals, and no worker remains."""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import pytest
import torch

from common.data import batching
from common.data.loading import Loader
from common.data.workers import ActivityTable
from common.errors import UserError

TIMEOUT = 4.0  # seconds, less than the 5 between PyTorch's own checks of its workers


class Photos:
    """Samples of their index and their process id; `actions` maps an index to a call made when it is read."""

    batch_size = 4
    has_tensors = True

    def __init__(self, count: int = 12, actions: dict[int, Callable[[], Any]] | None = None, seconds: float = 0):
        self.number, self.actions, self.seconds = count, actions or {}, seconds

    def count(self, split: str) -> int:
        return self.number

    def cost(self, split: str) -> list[int]:
        return [1] * self.number

    def where(self, split: str, index: int) -> str:
        return f"photos/{index}.jpg"

    def sample(self, split: str, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        time.sleep(self.seconds)
        self.actions.get(index, int)()
        return {"id": index, "process": os.getpid()}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        self.actions.get(-1, int)()
        batch = {name: [sample[key] for sample in samples] for name, key in (("ids", "id"), ("processes", "process"))}
        return {**batch, "pixels": torch.zeros(9, 9)} if self.has_tensors else batch


def batches(data: Any, workers: int, size: int = 3) -> Iterator[dict[str, Any]]:
    """All samples of train in order, in epoch 5."""
    keys = [(5, tuple(range(start, min(start + size, data.number)))) for start in range(0, data.number, size)]
    return Loader(data, "train", seed=0, workers=workers, pin=False)(keys)


def fail() -> None:
    raise ValueError("bad luck")


def die(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def wait_until(condition: Callable[[], bool]) -> None:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < TIMEOUT, "timed out"
        time.sleep(0.02)


# Exceptions.


@pytest.mark.parametrize("workers", [0, 2])
def test_a_defect_names_its_sample_and_shows_the_workers_own_traceback(workers: int) -> None:
    with pytest.raises(RuntimeError) as caught:
        [*batches(Photos(actions={7: fail}), workers)]
    message = str(caught.value)
    assert message.startswith("sample 7 of train (photos/7.jpg) cannot be made in epoch 5: ValueError: bad luck")
    if workers:
        assert "In the worker:\nTraceback" in message and re.search(r"test_loading.py.*in fail\n", message)
    else:
        assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_defect_in_collating_names_the_whole_micro_batch(workers: int) -> None:
    message = r"samples 0, 1, 2 of train \(photos/0.jpg, photos/1.jpg, photos/2.jpg\) cannot be collated in epoch 5: "
    with pytest.raises(RuntimeError, match=f"^{message}ValueError: bad luck"):
        [*batches(Photos(actions={-1: fail}), workers)]
    with pytest.raises(RuntimeError, match=r"samples 0, 1, 2, 3, 4, 5, 6, 7 and 4 more of train \(.*7.jpg ...\) canno"):
        [*batches(Photos(actions={-1: fail}), workers, size=12)]


def test_samples_of_a_set_without_where_are_named_by_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Photos, "where")
    with pytest.raises(RuntimeError, match=r"^sample 7 of train cannot be made"):
        [*batches(Photos(actions={7: fail}), 0)]


def test_an_error_in_evaluation_names_no_epoch() -> None:
    with pytest.raises(RuntimeError, match=r"^sample 7 of val \(photos/7.jpg\) cannot be made: ValueError"):
        [*Loader(Photos(actions={7: fail}), "val", seed=None, workers=0, pin=False)([(0, (7,))])]


@pytest.mark.parametrize("workers", [0, 1])
def test_running_out_of_memory_on_a_sample_is_one_sentence(workers: int) -> None:
    for allocate in (lambda: torch.empty(10**15), lambda: bytearray(10**15)):
        with pytest.raises(UserError, match=r"^Memory ran out on sample 4 of train \(photos/4.jpg\).*trainer.workers"):
            [*batches(Photos(actions={4: allocate}), workers)]


def test_full_shared_memory_is_one_sentence_and_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_full(tensor: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", raise_full)
    with pytest.raises(UserError, match=r"no room to hand over samples 0, 1, 2 of train .*/dev/shm"):
        [*batches(Photos(), 1)]


# Killed workers.


@pytest.mark.parametrize(
    ("action", "ended", "advice"),
    [
        (die(signal.SIGKILL), "was killed by SIGKILL", "lower trainer.workers"),
        (die(signal.SIGBUS), "was killed by SIGBUS", "enlarge /dev/shm"),
        (die(signal.SIGSEGV), "was killed by SIGSEGV", "trainer.workers=0"),
        (lambda: os._exit(3), "ended with exit code 3", "trainer.workers=0"),
    ],
)
def test_a_worker_that_is_killed_names_its_sample_at_once(action: Callable[[], Any], ended: str, advice: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        [*batches(Photos(actions={7: action}, seconds=0.05), 2)]
    message = str(caught.value)
    assert message.startswith(f"A worker process {ended} while it was on sample 7 of train (photos/7.jpg), as ")
    assert advice in message and "resume=auto" in message and "\n" not in message
    assert caught.value.__context__ is None and time.monotonic() - start < TIMEOUT


def test_a_worker_that_ends_with_exit_code_0_is_reported_too() -> None:
    """Its SIGCHLD is ignored, because stopped workers end with 0, too; PyTorch's own check takes up to 5 s."""
    with pytest.raises(UserError, match=r"ended with exit code 0 while it was on sample 7 of train"):
        [*batches(Photos(actions={7: lambda: os._exit(0)}), 1)]


def test_a_worker_that_is_killed_while_it_collates_names_the_batch() -> None:
    with pytest.raises(UserError, match=r"SIGKILL while it was collating the batch that begins with sample 0 of train"):
        [*batches(Photos(actions={-1: die(signal.SIGKILL)}), 1)]


def test_a_dead_worker_raises_only_where_batches_are_taken() -> None:
    """PyTorch would raise at an arbitrary line, such as one that writes a checkpoint."""
    data = Photos(100)
    data.has_tensors = False  # else the next batch fails, because the dead worker cannot send its memory
    loaded = batches(data, 1, size=1)
    worker = next(loaded)["processes"][0]
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: not is_alive(worker))
    start = time.monotonic()
    while time.monotonic() - start < 0.1:
        pass  # Python runs signal handlers between two instructions, not while it sleeps
    with pytest.raises(UserError, match=r"was killed by SIGKILL"):
        list(loaded)  # batches that it had made before it was killed may come first
    assert time.monotonic() - start < TIMEOUT


def test_other_child_processes_may_start_and_end() -> None:
    earlier_handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.3); raise SystemExit(3)"])
        assert len([*batches(Photos(seconds=0.1), 1)]) == 4 and child.wait() == 3
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGCHLD, earlier_handler)


def test_a_connection_that_the_parent_closes_prints_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    """It closes it when another worker was killed; the thread that sends tensors would then print a traceback."""
    context = multiprocessing.get_context("fork")
    (parent_end, worker_end), activities = context.Pipe(), ActivityTable(1)

    def work() -> None:
        activities.start_worker(0)
        worker_end.send(DupFd(1))
        worker_end.poll(TIMEOUT)

    worker = context.Process(target=work)
    worker.start()
    handle = parent_end.recv()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(handle._id[0])
        wait_until(lambda: bool(connection.recv(4, socket.MSG_PEEK)))
    os.close(handle.detach())  # the thread still serves, so it has handled the closed connection
    parent_end.send(None)
    worker.join(TIMEOUT)
    assert worker.exitcode == 0 and "Traceback" not in capfd.readouterr().err


# Signals, and how workers end.


def test_a_worker_ignores_the_signals_meant_for_a_run() -> None:
    """torchrun sends SIGTERM to the process group of each rank, which includes its workers."""
    loaded = batches(Photos(400), 1, size=1)
    worker = next(loaded)["processes"][0]
    sender = f"import os; [os.kill({worker}, n) for n in {[*map(int, RUN_SIGNALS)]}]"
    subprocess.run([sys.executable, "-c", sender], check=True)
    time.sleep(0.1)
    assert [batch["ids"][0] for batch in loaded] == [*range(1, 400)]


RUN_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@pytest.mark.parametrize("end", ["the last batch", "close", "an exception", "a stored defect"])
def test_no_worker_remains(end: str) -> None:
    data = Photos(60, actions={59: fail} if end == "a stored defect" else {})
    workers, defect = set[int](), None
    loaded = batches(data, 2)
    if end == "an exception":
        with pytest.raises(KeyError):
            for batch in loaded:
                workers |= {*batch["processes"]}
                if len(workers) == 2:
                    raise KeyError
        del loaded, batch
    elif end == "a stored defect":
        with pytest.raises(RuntimeError) as defect:
            for batch in loaded:
                workers |= {*batch["processes"]}
    else:
        for number, batch in enumerate(loaded):
            workers |= {*batch["processes"]}
            if end == "close" and number == 3:
                loaded.close()
                break
    assert len(workers) == 2 and not any(is_alive(worker) for worker in workers)
    assert defect is None or "bad luck" in str(defect.value)


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="on this system workers check only between two batches")
def test_busy_and_waiting_workers_end_soon_after_their_parent_is_killed(tmp_path: Path) -> None:
    """PyTorch's own workers check for their parent only every 5 s, and only between two batches."""

    def write_process_id(name: str, seconds: float) -> Callable[[], None]:
        def action() -> None:
            (tmp_path / f"{name}.draft").write_text(str(os.getpid()))
            (tmp_path / f"{name}.draft").rename(tmp_path / name)
            time.sleep(seconds)

        return action

    def parent() -> None:
        data = Photos(20, actions={0: write_process_id("waiting", 0), 1: write_process_id("busy", 20)})
        [*batches(data, 2, size=1)]

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    wait_until(lambda: (tmp_path / "busy").exists() and (tmp_path / "waiting").exists())
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    workers = [int((tmp_path / name).read_text()) for name in ("busy", "waiting")]
    wait_until(lambda: not any(is_alive(worker) for worker in workers))


# Small data sets.


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_sets_smaller_than_batch_ranks_and_workers_are_loaded_completely(count: int, workers: int) -> None:
    """A batch has 4: of 5 samples training drops one in each epoch, and evaluation gives it a batch of its own."""
    data = Photos(count)
    order = batching.Order(data.cost("train"), data.batch_size, 0)
    for world in (1, 2, 3, 4) if workers < 3 else (1, 4):
        common: dict[str, Any] = {"world": world, "workers": workers}
        trained: list[list[int]] = [[], [], []]
        evaluated: list[list[int]] = []
        for rank in range(world):
            options: dict[str, Any] = {"start": 0, "stop": 3, "micro_batch": None, "pin": False, **common}
            steps = [*batching.steps(data, order, rank=rank, **options)]
            assert [epoch for epoch, _ in steps] == [0, 1, 2], "as many steps on every rank"
            for step_samples, (_, micro_batches) in zip(trained, steps, strict=True):
                step_samples += [i for batch in micro_batches if "dummy" not in batch for i in batch["ids"]]
            evaluated += [b["ids"] for b in batching.evaluation(data, "val", batch_size=4, rank=rank, **common)]
        assert trained == [order.epoch(number)[0] for number in range(3)]
        assert {len(step) for step in trained} == {min(count, 4)}
        assert sorted(evaluated) == {1: [[0]], 2: [[0, 1]], 5: [[0, 1, 2, 3], [4]]}[count]


class Epochs(Photos):
    """Samples that hold the seed of their epoch."""

    def epoch_sample(self, split: str, index: int, epoch_seed: int) -> dict[str, Any]:
        return {"id": index, "process": epoch_seed}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_seed_of_an_epoch_is_the_same_for_all_its_samples_and_for_no_other_epoch(workers: int) -> None:
    data, keys = Epochs(), [(epoch, (2 * n, 2 * n + 1)) for epoch in (0, 1) for n in range(3)]
    seeds = []
    for seed in (0, 1):
        loaded = [*Loader(data, "train", seed=seed, workers=workers, pin=False)(keys)]
        for part in (loaded[:3], loaded[3:]):
            (epoch_seed,) = {number for batch in part for number in batch["processes"]}
            seeds.append(epoch_seed)
    assert len({*seeds}) == 4


def test_evaluation_takes_samples_without_a_seed_of_an_epoch() -> None:
    (batch,) = Loader(Epochs(), "val", seed=None, workers=0, pin=False)([(0, (3, 4))])
    assert batch["processes"] == [os.getpid()] * 2
