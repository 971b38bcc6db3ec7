"""Doors in processes forked from one that has imported everything and computed nothing.

A start takes a quarter of a second instead of five, so that a test can kill and resume a run a dozen times. A process
that has computed with torch must not be forked, because its threads do not survive a fork.
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
    """A door in a process with a session of its own, so that processes that it leaves behind can be listed."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        door: str = "train",
        fault: Any = None,
        rank: int = 0,
        world: int = 1,
        port: int = 0,
        logs: Path | None = None,
    ):
        """Start `door` in `folder` with this process's environment, and with its output in a file there.

        `fault`: the name of a function of faults.py and its arguments, called first.
        `logs`: a folder for two files instead, of stdout and stderr.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (logs or folder) / f"{door}-{rank}.txt"
        self.errors = self.file.with_suffix(".err") if logs else self.file
        environment: dict[str, Any] = {**os.environ}
        if world > 1:
            environment |= {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
        variables = {name: str(value) for name, value in environment.items()}
        files = (self.file, self.errors)
        self.process = CONTEXT.Process(target=run_door, args=(door, list(arguments), files, folder, variables, fault))
        self.process.start()

    def __enter__(self) -> "Child":
        """The process is killed at the end of the block, if it is still running."""
        return self

    def __exit__(self, *_: Any) -> None:
        self.signal(signal.SIGKILL)
        self.process.join()

    def signal(self, number: int) -> None:
        """Send a signal only to the door's process."""
        if self.process.is_alive():
            os.kill(self.pid, number)

    @property
    def pid(self) -> int:
        """The door's process id."""
        assert self.process.pid is not None
        return self.process.pid

    def output(self) -> str:
        """Its stdout and stderr so far."""
        files = [file for file in dict.fromkeys((self.file, self.errors)) if file.exists()]
        return "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Wait until its output holds `text`."""
        wait(lambda: text in self.output(), seconds, lambda: f"{text!r} in {self.output()[-3000:]}")

    def end(self, seconds: float = 120) -> int:
        """Wait for its end and that of its session; returns the exit code, or the negative number of a signal."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s: {self.output()[-3000:]}"
        wait(lambda: not session(self.pid), 10, lambda: f"the end of {session(self.pid)}, left by {self.pid}")
        return self.process.exitcode


def run(folder: Path, *arguments: str, code: int = 0, **options: Any) -> str:
    """Run a door to its end, with exit code `code`; returns its output."""
    with Child(folder, *arguments, **options) as child:
        assert child.end() == code, child.output()[-5000:]
        return child.output()


def start_ranks(folder: Path, *arguments: str, world: int, faults: Sequence[Any] = (), **options: Any) -> list[Child]:
    """Start the same command in `world` ranks; `faults` are those of the ranks, in order."""
    port = free_port()
    faults = [*faults, *[None] * (world - len(faults))]
    return [
        Child(folder, *arguments, rank=rank, world=world, port=port, fault=faults[rank], **options)
        for rank in range(world)
    ]


def run_door(
    door: str, arguments: list[str], files: tuple[Path, Path], folder: Path, environment: dict[str, str], fault: Any
) -> None:
    """Run a door in this process, with its stdout and stderr in `files`."""
    os.setsid()
    for descriptor, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdin = open(os.devnull)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [f"{door}.py"]
    from importlib import import_module

    from common.cli import main as cli

    if fault is not None:
        name, *values = fault
        getattr(import_module("faults"), name)(*values)
    module = import_module(door)
    cli.launch(getattr(module, door), door, getattr(module, "stored_config", None), arguments)


def flip_bit(data: bytes) -> bytes:
    """A checkpoint with one bit flipped in the middle of its largest record, where there is no padding."""
    record = max(zipfile.ZipFile(io.BytesIO(data)).infolist(), key=lambda info: info.file_size)
    name_length, extra_length = struct.unpack_from("<HH", data, record.header_offset + 26)
    position = record.header_offset + 30 + name_length + extra_length + record.file_size // 2
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def session(leader: int) -> list[str]:
    """The running processes of a session, as "id (name)"."""
    processes = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = entry.read_text().rpartition(")")
        except OSError:
            continue  # it has ended
        state, _, _, session_id = rest.split()[:4]
        if int(session_id) == leader and state != "Z":
            processes.append(f"{name})")
    return processes


def wait(condition: Callable[[], bool], seconds: float, describe: Callable[[], str]) -> None:
    """Check `condition` every 20 ms until it holds; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain for {describe()}"
        time.sleep(0.02)


def free_port() -> int:
    """A port of this machine that is not in use."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def save_endlessly(folder: Path) -> None:
    """Write checkpoints one after the other, beginning after the last one's step."""
    import torch

    from common.files.retention import CheckpointFolder

    checkpoints = CheckpointFolder(folder)
    step = max(checkpoints.steps(), default=0)
    while True:
        step += 1
        checkpoints.save(step, {"step": step, "weights": torch.full((300_000,), float(step))})
        checkpoints.mark_best(step)
