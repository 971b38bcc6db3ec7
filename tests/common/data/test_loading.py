"""Workers: a fault names its sample, a death too, signals go to the parent alone, and nobody is left behind."""

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

PATIENCE = 4.0  # seconds, less than the 5 between PyTorch's own looks at its workers


class Photos:
    """Samples that are their index and their process; some of them `act`."""

    batch_size = 4
    has_tensors = True

    def __init__(self, count: int = 12, act: dict[int, Callable[[], Any]] | None = None, slow: float = 0):
        self.number, self.act, self.slow = count, act or {}, slow

    def count(self, split: str) -> int:
        return self.number

    def cost(self, split: str) -> list[int]:
        return [1] * self.number

    def where(self, split: str, index: int) -> str:
        return f"photos/{index}.jpg"

    def sample(self, split: str, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        time.sleep(self.slow)
        self.act.get(index, int)()
        return {"id": index, "process": os.getpid()}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        self.act.get(-1, int)()
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


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def until(true: Callable[[], bool]) -> None:
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < PATIENCE, "it takes too long"
        time.sleep(0.02)


# What raises.


@pytest.mark.parametrize("workers", [0, 2])
def test_a_defect_names_its_sample_and_shows_the_workers_own_traceback(workers: int) -> None:
    with pytest.raises(RuntimeError) as caught:
        [*batches(Photos(act={7: fail}), workers)]
    said = str(caught.value)
    assert said.startswith("sample 7 of train (photos/7.jpg) cannot be made in epoch 5: ValueError: bad luck")
    if workers:
        assert "In the worker:\nTraceback" in said and re.search(r"test_loading.py.*in fail\n", said)
    else:
        assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_defect_in_collating_names_the_whole_micro_batch(workers: int) -> None:
    said = r"samples 0, 1, 2 of train \(photos/0.jpg, photos/1.jpg, photos/2.jpg\) cannot be collated in epoch 5: "
    with pytest.raises(RuntimeError, match=f"^{said}ValueError: bad luck"):
        [*batches(Photos(act={-1: fail}), workers)]
    with pytest.raises(RuntimeError, match=r"samples 0, 1, 2, 3, 4, 5, 6, 7 and 4 more of train \(.*7.jpg ...\) canno"):
        [*batches(Photos(act={-1: fail}), workers, size=12)]


def test_a_set_that_cannot_say_where_its_samples_lie_gives_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Photos, "where")
    with pytest.raises(RuntimeError, match=r"^sample 7 of train cannot be made"):
        [*batches(Photos(act={7: fail}), 0)]


def test_evaluation_speaks_of_no_epoch() -> None:
    with pytest.raises(RuntimeError, match=r"^sample 7 of val \(photos/7.jpg\) cannot be made: ValueError"):
        [*Loader(Photos(act={7: fail}), "val", seed=None, workers=0, pin=False)([(0, (7,))])]


@pytest.mark.parametrize("workers", [0, 1])
def test_memory_that_does_not_do_for_a_sample_is_a_sentence(workers: int) -> None:
    for hungry in (lambda: torch.empty(10**15), lambda: bytearray(10**15)):
        with pytest.raises(UserError, match=r"^Memory ran out on sample 4 of train \(photos/4.jpg\).*trainer.workers"):
            [*batches(Photos(act={4: hungry}), workers)]


def test_a_full_shared_memory_is_a_sentence_and_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensor: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(UserError, match=r"no room to hand over samples 0, 1, 2 of train .*/dev/shm"):
        [*batches(Photos(), 1)]


# What is killed.


@pytest.mark.parametrize(
    ("act", "ended", "advice"),
    [
        (die(signal.SIGKILL), "was killed by SIGKILL", "lower trainer.workers"),
        (die(signal.SIGBUS), "was killed by SIGBUS", "enlarge /dev/shm"),
        (die(signal.SIGSEGV), "was killed by SIGSEGV", "trainer.workers=0"),
        (lambda: os._exit(3), "ended with exit code 3", "trainer.workers=0"),
    ],
)
def test_a_worker_that_is_killed_names_its_sample_at_once(act: Callable[[], Any], ended: str, advice: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        [*batches(Photos(act={7: act}, slow=0.05), 2)]
    said = str(caught.value)
    assert said.startswith(f"A worker process {ended} while it was on sample 7 of train (photos/7.jpg), as ")
    assert advice in said and "resume=auto" in said and "\n" not in said
    assert caught.value.__context__ is None and time.monotonic() - start < PATIENCE


def test_a_worker_that_leaves_with_exit_code_0_is_missed_too() -> None:
    """Of this one the system's word is not heeded, since it is how workers end: PyTorch looks after 5 s."""
    with pytest.raises(UserError, match=r"ended with exit code 0 while it was on sample 7 of train"):
        [*batches(Photos(act={7: lambda: os._exit(0)}), 1)]


def test_a_worker_that_is_killed_while_it_collates_says_so() -> None:
    with pytest.raises(UserError, match=r"SIGKILL while it was collating the batch that begins with sample 0 of train"):
        [*batches(Photos(act={-1: die(signal.SIGKILL)}), 1)]


def test_a_death_strikes_where_batches_are_taken_and_nowhere_else() -> None:
    """PyTorch would raise at whatever line is just then, such as one that writes a checkpoint."""
    data = Photos(100)
    data.has_tensors = False  # else the next batch fails for want of who can hand over its memory
    taken = batches(data, 1, size=1)
    worker = next(taken)["processes"][0]
    os.kill(worker, signal.SIGKILL)
    until(lambda: not is_there(worker))
    start = time.monotonic()
    while time.monotonic() - start < 0.1:
        pass  # the system's word comes between two lines, not while nothing is done
    with pytest.raises(UserError, match=r"was killed by SIGKILL"):
        next(taken)
    assert time.monotonic() - start < PATIENCE


def test_other_children_may_come_and_go() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.3); raise SystemExit(3)"])
        assert len([*batches(Photos(slow=0.1), 1)]) == 4 and child.wait() == 3
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_parent_that_turns_away_from_a_batch_is_no_news(capfd: pytest.CaptureFixture[str]) -> None:
    """It does when another worker was killed, and the thread that hands tensors over would print a traceback."""
    context = multiprocessing.get_context("fork")
    (here, there), notes = context.Pipe(), ActivityTable(1)

    def work() -> None:
        notes.start_worker(0)
        there.send(DupFd(1))
        there.poll(PATIENCE)

    worker = context.Process(target=work)
    worker.start()
    handle = here.recv()
    with socket.socket(socket.AF_UNIX) as taker:
        taker.connect(handle._id[0])
        until(lambda: bool(taker.recv(4, socket.MSG_PEEK)))
    os.close(handle.detach())  # it still hands over, so it is done with the one that turned away
    here.send(None)
    worker.join(PATIENCE)
    assert worker.exitcode == 0 and "Traceback" not in capfd.readouterr().err


# Signals, and the end.


def test_signals_that_reach_a_worker_are_the_parents_business() -> None:
    """torchrun sends SIGTERM to the group of each rank, and its workers are in it."""
    taken = batches(Photos(400), 1, size=1)
    worker = next(taken)["processes"][0]
    sender = f"import os; [os.kill({worker}, n) for n in {[*map(int, TO_A_RUN)]}]"
    subprocess.run([sys.executable, "-c", sender], check=True)
    time.sleep(0.1)
    assert [batch["ids"][0] for batch in taken] == [*range(1, 400)]


TO_A_RUN = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@pytest.mark.parametrize("how", ["the end", "no more asked", "an exception", "a defect that is kept"])
def test_workers_are_gone_afterwards(how: str) -> None:
    data = Photos(60, act={59: fail} if how == "a defect that is kept" else {})
    workers, kept = set[int](), None
    taken = batches(data, 2)
    if how == "an exception":
        with pytest.raises(KeyError):
            for batch in taken:
                workers |= {*batch["processes"]}
                if len(workers) == 2:
                    raise KeyError
        del taken, batch
    elif how == "a defect that is kept":
        with pytest.raises(RuntimeError) as kept:
            for batch in taken:
                workers |= {*batch["processes"]}
    else:
        for number, batch in enumerate(taken):
            workers |= {*batch["processes"]}
            if how == "no more asked" and number == 3:
                taken.close()
                break
    assert len(workers) == 2 and not any(is_there(worker) for worker in workers)
    assert kept is None or "bad luck" in str(kept.value)


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="this system's workers look between two batches alone")
def test_busy_and_waiting_workers_end_soon_after_their_parent_is_killed(tmp_path: Path) -> None:
    """PyTorch's own look for their parent every 5 s, and between two batches alone."""

    def note(name: str, seconds: float) -> Callable[[], None]:
        def act() -> None:
            (tmp_path / f"{name}.draft").write_text(str(os.getpid()))
            (tmp_path / f"{name}.draft").rename(tmp_path / name)
            time.sleep(seconds)

        return act

    def parent() -> None:
        data = Photos(20, act={0: note("waiting", 0), 1: note("busy", 20)})
        [*batches(data, 2, size=1)]

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    until(lambda: (tmp_path / "busy").exists() and (tmp_path / "waiting").exists())
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    workers = [int((tmp_path / name).read_text()) for name in ("busy", "waiting")]
    until(lambda: not any(is_there(worker) for worker in workers))


# Sets that are smaller than something.


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_sets_smaller_than_batch_ranks_and_workers_are_dealt_whole(count: int, workers: int) -> None:
    """A batch has 4: of 5 samples one waits for another epoch in training, and comes alone in evaluation."""
    data = Photos(count)
    order = batching.Order(data.cost("train"), data.batch_size, 0)
    for world in (1, 2, 3, 4) if workers < 3 else (1, 4):
        cut: dict[str, Any] = {"world": world, "workers": workers}
        trained: list[list[int]] = [[], [], []]
        evaluated: list[list[int]] = []
        for rank in range(world):
            options: dict[str, Any] = {"start": 0, "stop": 3, "micro_batch": None, "pin": False, **cut}
            steps = [*batching.steps(data, order, rank=rank, **options)]
            assert [epoch for epoch, _ in steps] == [0, 1, 2], "as many steps on every rank"
            for all_of_step, (_, micro_batches) in zip(trained, steps, strict=True):
                all_of_step += [i for batch in micro_batches if "dummy" not in batch for i in batch["ids"]]
            evaluated += [b["ids"] for b in batching.evaluation(data, "val", batch_size=4, rank=rank, **cut)]
        assert trained == [order.epoch(number)[0] for number in range(3)]
        assert {len(step) for step in trained} == {min(count, 4)}
        assert sorted(evaluated) == {1: [[0]], 2: [[0, 1]], 5: [[0, 1, 2, 3], [4]]}[count]
