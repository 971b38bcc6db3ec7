"""Fixtures of all tests."""

import os

# Tests run side by side, one process for each core: threads beyond that would spin for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import importlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from common.cli import main as cli

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))  # nursery.py, tokenizing.py and so on, for forked processes, too


@pytest.fixture(scope="session", autouse=True)
def the_end_of_the_tests_is_theirs() -> Iterator[None]:
    """os._exit, by which a door leaves when there are several processes, would end all tests at once, as if passed."""
    leave, owner = os._exit, os.getpid()

    def end(code: int) -> NoReturn:
        if os.getpid() != owner:  # a forked child
            leave(code)
        raise SystemExit(code)

    os._exit = end
    yield
    os._exit = leave


@pytest.fixture(scope="session", autouse=True)
def signals_are_not_ignored() -> None:
    """As they are under nohup, or in a shell's background; a run, and all that tests start, would ignore them too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """The folder of a real data set under $TRIPTYCH_DATA (default `data/`); the test is skipped when it is absent."""

    def find(name: str) -> Path:
        folder = Path(os.environ.get("TRIPTYCH_DATA", "data")) / name
        if not folder.is_dir():
            pytest.skip(f"there is no real data {name} in $TRIPTYCH_DATA (default data/)")
        return folder.resolve()

    return find


@pytest.fixture(scope="session")
def door() -> Callable[..., str]:
    """What a door prints, run as a user runs it: `door("train", "model=detr", ..., code=0, cwd=FOLDER, processes=1)`.

    Its exit code must be `code`, and only a defect may leave a traceback.
    """

    def go(name: str, *arguments: str, code: int = 0, cwd: Path = ROOT, processes: int = 1) -> str:
        several = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
        command = [sys.executable, *several, str(ROOT / f"{name}.py"), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
        said = done.stdout + done.stderr
        assert done.returncode == code, said
        assert "Traceback" not in said, said
        return said

    return go


@pytest.fixture
def inside(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[..., str]]:
    """`door` within this process, which saves the seconds that it takes to import torch; run from an empty folder.

    For an exit code other than 0 it gives the one sentence that was said.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as `door` gives: sums depend on them
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def go(name: str, *arguments: str, code: int = 0) -> str:
        module = importlib.import_module(name)
        with pytest.raises(SystemExit) as left:
            cli.launch(getattr(module, name), name, getattr(module, "stored_config", None), arguments)
        out, err = capsys.readouterr()
        assert left.value.code == code, out + err
        if not code:
            return out
        said = [line for line in err.splitlines() if not line.startswith("weights   ")]  # which predict.py says first
        assert len(said) == 1 and "Traceback" not in out, "one sentence"
        return said[0]

    yield go
    torch.set_num_threads(threads)
