"""Fixtures of all tests."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


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
