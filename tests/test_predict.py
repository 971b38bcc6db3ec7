"""Standard output of predict.py holds the answers only, and a reader that closes the pipe causes no error."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import predict
from common.cli import main as cli

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

import predict
from common.machine import console, device

device.autocast = lambda *_: contextlib.nullcontext()

predict.send_utf8()
console.guard()
predict.predict({"input": sys.argv[1], "output": "x"})
"""


@pytest.fixture
def process(tmp_path: Path) -> list[str]:
    """predict.py's command without a model; its last argument is the number of answers."""
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


def test_all_images_of_a_folder_that_can_be_read_are_answered_and_the_others_listed(
    inside: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "c.jpe"):
        Image.new("RGB", (9, 9)).save(folder / name, "PNG")
    (folder / "b.png").write_text("broken")
    inside("train", "model=vit", "run_dir=run", "trainer.steps=1", "trainer.device=cpu")
    arguments = ["checkpoint=run/checkpoints/best.pt", f"input={folder}", "output=answers"]
    with pytest.raises(SystemExit) as exit_info:
        cli.launch(predict.predict, "predict", predict.stored_config, arguments)
    stdout, stderr = capsys.readouterr()
    assert [line.partition(":")[0] for line in stdout.splitlines()] == ["a.png", "c.jpe"] and exit_info.value.code == 1
    assert "b.png is broken" in stderr.splitlines()[-1]
    assert "b.png is broken" in inside("predict", arguments[0], f"input={folder / 'b.png'}", code=2)
