"""Doors in processes that are forked from one which has imported all of it and computed nothing.

A start takes a quarter of a second instead of five, so that a test can kill and continue a run a dozen times. Whoever
has computed with torch must not be forked: its threads do not survive that.
"""

import io
import multiprocessing
import os
import signal
import socket
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PRELOADED = [
    *("train", "evaluate", "faults", "common.train.assembly", "torch._dynamo", "torch.utils.tensorboard"),
    *("torch.distributed.fsdp", "torch.distributed.elastic.multiprocessing.errors"),
    *(
        "detr.tasks.detection",
        "detr.models.detector",
        "detr.data.shapes",
        "vit.tasks.classification",
        "vit.models.classifier",
        "vit.data.digits",
        "vit.data.folder",
    ),
    *(
        "seq2seq.tasks.translation",
        "seq2seq.models.transformer",
        "seq2seq.data.cldr.dataset",
        "seq2seq.data.parallel_text",
        "sklearn.datasets",
    ),
]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)
os.environ["OMP_NUM_THREADS"] = "1"  # before the first process starts


class Child:
    """A door in a process of its own session, so that what it leaves behind can be found."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        door: str = "train",
        fault: Any = None,
        rank: int = 0,
        world: int = 1,
        port: int = 0,
    ):
        """Start `door` in `folder`, where a file gets its words.

        `fault`: a function of faults.py and its arguments, called first.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.words = folder / f"{door}-{rank}.txt"
        environment = {}
        if world > 1:
            environment = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
        texts = {name: str(value) for name, value in environment.items()}
        self.process = CONTEXT.Process(target=live, args=(door, list(arguments), self.words, folder, texts, fault))
        self.process.start()

    def __enter__(self) -> "Child":
        """End it at the latest when the block ends."""
        return self

    def __exit__(self, *_: Any) -> None:
        self.signal(signal.SIGKILL)
        self.process.join()

    def signal(self, number: int) -> None:
        """Send a signal to the door alone."""
        if self.process.is_alive():
            os.kill(self.pid, number)

    @property
    def pid(self) -> int:
        """The door's process."""
        assert self.process.pid is not None
        return self.process.pid

    def output(self) -> str:
        """What it has written so far."""
        return self.words.read_text(encoding="utf-8", errors="replace") if self.words.exists() else ""

    def wait_for(self, words: str, seconds: float = 60) -> None:
        """Wait until it has said `words`."""
        wait(lambda: words in self.output(), seconds, lambda: f"{words!r} in {self.output()[-3000:]}")

    def end(self, seconds: float = 120) -> int:
        """Its exit code, a signal's number below zero, when it has ended and nothing of its session is left."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still there after {seconds} s: {self.output()[-3000:]}"
        wait(lambda: not session(self.pid), 10, lambda: f"an end of {session(self.pid)}, left by {self.pid}")
        return self.process.exitcode


def run(folder: Path, *arguments: str, code: int = 0, **options: Any) -> str:
    """A door from its start to its end; what it said."""
    with Child(folder, *arguments, **options) as child:
        assert child.end() == code, child.output()[-5000:]
        return child.output()


def start_ranks(folder: Path, *arguments: str, world: int, faults: Sequence[Any] = (), **options: Any) -> list[Child]:
    """The same line in `world` processes that find each other; `faults` are those of the ranks, in order."""
    port = free_port()
    faults = [*faults, *[None] * (world - len(faults))]
    return [
        Child(folder, *arguments, rank=rank, world=world, port=port, fault=faults[rank], **options)
        for rank in range(world)
    ]


def live(door: str, arguments: list[str], words: Path, folder: Path, environment: dict[str, str], fault: Any) -> None:
    """What a child does."""

    os.setsid()
    file = os.open(words, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdin = open(os.devnull)
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv = [f"{door}.py"]
    from importlib import import_module

    from common.cli import main as cli

    if fault is not None:
        name, *values = fault
        getattr(import_module("faults"), name)(*values)
    module = import_module(door)
    cli.launch(getattr(module, door), door, getattr(module, "stored_config", None), arguments)


def flipped(data: bytes) -> bytes:
    """A checkpoint with one bit altered in the middle of its largest record, where no padding is."""
    record = max(zipfile.ZipFile(io.BytesIO(data)).infolist(), key=lambda info: info.file_size)
    name, extra = struct.unpack_from("<HH", data, record.header_offset + 26)
    place = record.header_offset + 30 + name + extra + record.file_size // 2
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def session(leader: int) -> list[str]:
    """The processes of a session, by number and name."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = entry.read_text().rpartition(")")
        except OSError:
            continue  # it ended meanwhile
        state, _, _, of = rest.split()[:4]
        if int(of) == leader and state != "Z":
            found.append(f"{name})")
    return found


def wait(until: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    """Look every 20 ms; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, f"waited {seconds} s in vain for {what()}"
        time.sleep(0.02)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def save_for_ever(folder: Path) -> None:
    """Write checkpoints one after the other, going on from the last one's step."""
    import torch

    from common.files.retention import CheckpointFolder

    kept = CheckpointFolder(folder)
    step = max(kept.steps(), default=0)
    while True:
        step += 1
        kept.save(step, {"step": step, "weights": torch.full((300_000,), float(step))})
        kept.mark_best(step)
