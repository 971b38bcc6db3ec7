"""What predict.py prints where: answers alone on standard output, and no complaint when nobody reads them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import contextlib, sys, types

task = types.SimpleNamespace(
    read=lambda input: iter(range(int(input))), predict=lambda model, batch: None,
    show=lambda batch, answers, folder: [f"größer 你好 {batch}"],
)
parts = types.SimpleNamespace(weights_line="weights   of step 3", task=task, model=None, device=None,
                              trainer=types.SimpleNamespace(precision="fp32"))
sys.modules["common.train.assembly"] = types.SimpleNamespace(restore=lambda config: parts)
sys.modules["common.machine.device"] = types.SimpleNamespace(autocast=lambda *_: contextlib.nullcontext())

import predict

predict.send_utf8()
predict.predict({"input": sys.argv[1], "output": "x"})
"""


@pytest.fixture
def process(tmp_path: Path) -> list[str]:
    """A command that answers as predict.py does, as often as its last word says, with neither torch nor a model."""
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    return [sys.executable, str(tmp_path / "script.py")]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def test_standard_output_holds_one_line_per_answer_in_utf8_and_nothing_else(process: list[str]) -> None:
    done = subprocess.run([*process, "3"], capture_output=True, env=environment(PYTHONIOENCODING="latin-1"))
    assert done.stdout.decode().splitlines() == [f"größer 你好 {i}" for i in range(3)]
    assert done.stderr.decode().strip() == "weights   of step 3" and done.returncode == 0


def test_a_reader_that_leaves_ends_it_quietly(process: list[str]) -> None:
    with subprocess.Popen(
        [*process, "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as running:
        assert running.stdout and running.stderr
        assert running.stdout.readline().decode() == "größer 你好 0\n"
        running.stdout.close()
        said = running.stderr.read().decode()
    assert said.strip() == "weights   of step 3" and running.returncode == 0
