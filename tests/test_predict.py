"""Standard output of predict.py holds the answers only, and a reader that closes the pipe causes no error."""

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
    """predict.py's command without torch or a model; its last argument is the number of answers."""
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    return [sys.executable, str(tmp_path / "script.py")]


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **variables}


def test_standard_output_holds_one_line_per_answer_in_utf8_and_nothing_else(process: list[str]) -> None:
    completed = subprocess.run([*process, "3"], capture_output=True, env=environment(PYTHONIOENCODING="latin-1"))
    assert completed.stdout.decode().splitlines() == [f"größer 你好 {i}" for i in range(3)]
    assert completed.stderr.decode().strip() == "weights   of step 3" and completed.returncode == 0


def test_a_reader_that_closes_the_pipe_ends_the_process_without_an_error(process: list[str]) -> None:
    with subprocess.Popen(
        [*process, "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as running:
        assert running.stdout and running.stderr
        assert running.stdout.readline().decode() == "größer 你好 0\n"
        running.stdout.close()
        stderr = running.stderr.read().decode()
    assert stderr.strip() == "weights   of step 3" and running.returncode == 0
