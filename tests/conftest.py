"""Fixtures of all tests."""

import os

# Tests run in parallel, one process for each core: more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import atexit
import gc
import importlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from common.cli import main as cli

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))  # for nursery.py, tokenizing.py and others, also in forked processes


def pytest_collection_finish() -> None:
    """Exclude the collected tests and imported modules, millions of objects, from later garbage collections."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # at the end they are garbage, which libraries otherwise report as leaks


@pytest.fixture(scope="session", autouse=True)
def absl_leaves_the_captured_stderr_open() -> None:
    """Give absl's log handler, which NNCF imports, the real stderr.

    The handler closes its stream when Hydra sets up logging, unless the stream is then `sys.stderr` or the real stderr.
    """
    from absl import logging

    logging.get_absl_handler().python_handler.stream = sys.__stderr__


@pytest.fixture(scope="session", autouse=True)
def os_exit_raises() -> Iterator[None]:
    """Replace os._exit, which a door calls when there are several processes: it would end all tests, as if passed."""
    real, owner = os._exit, os.getpid()

    def exit_process(code: int) -> NoReturn:
        if os.getpid() != owner:  # a forked child
            real(code)
        raise SystemExit(code)

    os._exit = exit_process
    yield
    os._exit = real


@pytest.fixture(scope="session", autouse=True)
def signals_are_not_ignored() -> None:
    """Restore handlers that nohup, or a shell's background, has set to ignore, for tests and their child processes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def without_privileges(tmp_path: Path) -> Callable[[], AbstractContextManager[None]]:
    """A function that returns a context in which root, too, may read and write only where permissions allow it."""
    tmp_path.chmod(0o777)  # pytest creates it for its owner alone

    @contextmanager
    def dropped() -> Iterator[None]:
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(user)

    return dropped


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """A function to the folder of a real data set in $TRIPTYCH_DATA (default `data/`); skips the test without it."""

    def find(name: str) -> Path:
        folder = Path(os.environ.get("TRIPTYCH_DATA", "data")) / name
        if not folder.is_dir():
            pytest.skip(f"there is no real data {name} in $TRIPTYCH_DATA (default data/)")
        return folder.resolve()

    return find


@pytest.fixture(scope="session")
def door(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A function that runs a door in a process of its own and returns its stdout and stderr.

    `door("train", "model=detr", ..., code=0, cwd=FOLDER, processes=1)` asserts the exit code, and no traceback. The
    processes are forked from one that has imported torch (nursery.py), which saves seconds.
    """
    from nursery import start_ranks

    def run(name: str, *arguments: str, code: int = 0, cwd: Path = ROOT, processes: int = 1) -> str:
        logs = tmp_path_factory.mktemp("door")
        with ExitStack() as stack:
            ranks = start_ranks(cwd, *arguments, door=name, world=processes, logs=logs)
            for rank in ranks:
                stack.enter_context(rank)
            codes = [rank.end(600) for rank in ranks]
        output = "".join(rank.output() for rank in ranks)
        assert codes == [code] * processes, output
        assert "Traceback" not in output, output
        return output

    return run


@pytest.fixture(scope="session")
def command() -> Callable[..., str]:
    """`door` as a user calls it: by starting Python, and with torchrun if there are several processes."""

    def run(name: str, *arguments: str, code: int = 0, cwd: Path = ROOT, processes: int = 1) -> str:
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
        command = [sys.executable, *torchrun, str(ROOT / f"{name}.py"), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
        output = process.stdout + process.stderr
        assert process.returncode == code, output
        assert "Traceback" not in output, output
        return output

    return run


@pytest.fixture
def inside(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[..., str]]:
    """`door` within this process, from an empty folder, which saves the seconds of importing torch.

    It returns stdout, or the one sentence on stderr if the exit code is not 0.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in `door`: sums depend on it
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def run(name: str, *arguments: str, code: int = 0) -> str:
        module = importlib.import_module(name)
        with pytest.raises(SystemExit) as exit_info:
            cli.launch(getattr(module, name), name, getattr(module, "stored_config", None), arguments)
        stdout, stderr = capsys.readouterr()
        assert exit_info.value.code == code, stdout + stderr
        if not code:
            return stdout
        # predict.py prints its line on the weights to stderr.
        messages = [line for line in stderr.splitlines() if not line.startswith("weights   ")]
        assert len(messages) == 1 and "Traceback" not in stdout, "one sentence"
        return messages[0]

    yield run
    torch.set_num_threads(threads)
