"""Standard output of predict.py holds the answers only, and a reader that closes the pipe causes no error."""

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import predict
import train
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


STREAM = SCRIPT.replace(
    "parts = types",
    """task.stream = lambda model, batch, write: (
    (write(f"streamed {batch}\\n"), True)[1] if batch != 1 else False
)
parts = types""",
)


@pytest.mark.parametrize("terminal", [True, False])
def test_only_a_terminal_gets_answers_piece_by_piece(process: list[str], tmp_path: Path, terminal: bool) -> None:
    """Of three inputs, the task cannot stream the second."""
    (tmp_path / "script.py").write_text(STREAM, encoding="utf-8")
    parent, child = pty.openpty()
    output = child if terminal else subprocess.PIPE
    with subprocess.Popen([*process, "3"], stdout=output, stderr=subprocess.PIPE, env=environment()) as running:
        os.close(child)
        piped, stderr = running.communicate()
        printed = os.read(parent, 10_000) if terminal else piped
    os.close(parent)
    assert stderr.decode().strip() == "weights   of step 3" and running.returncode == 0
    expected = [f"größer 你好 {i}" for i in range(3)]
    assert printed.decode().splitlines() == (["streamed 0", expected[1], "streamed 2"] if terminal else expected)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    """checkpoint=FILE of a classifier of digits after one step."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.raises(SystemExit):
        arguments = ["model=vit", f"run_dir={folder / 'run'}", "trainer.steps=1", "trainer.device=cpu"]
        cli.launch(train.train, "train", arguments=arguments)
    return f"checkpoint={folder}/run/checkpoints/best.pt"


def test_answers_of_nested_folders_have_the_relative_paths_of_their_images(
    classifier: str, inside: Callable[..., str]
) -> None:
    """The output lies in the input, and what is written there the first time is not read the second time."""
    for name in ("a.png", "x/a.png", "x/y/a.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(name)
    for _ in range(2):
        lines = inside("predict", classifier, "input=.", "attention=rollout").splitlines()
        assert [line.partition(":")[0] for line in lines] == ["a.png", "x/a.png", "x/y/a.png"]
    answers = {str(file.relative_to("predictions")) for file in Path("predictions").rglob("*.json")}
    assert answers == {f"{name}.classes.json" for name in ("a.png", "x/a.png", "x/y/a.png")}
    assert Path("predictions/x/y/a.png.attention.png").exists()
    lines = inside("predict", classifier, "input=x/*/a.png").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["y/a.png"]
    assert "is the folder of the input" in inside("predict", classifier, "input=x/*.png", "output=x", code=2)


def test_a_path_that_is_also_a_pattern_is_named(
    classifier: str, inside: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a[1].png", "a1.png"):
        Image.new("L", (8, 8)).save(name)
    with pytest.raises(SystemExit):
        cli.launch(predict.predict, "predict", predict.stored_config, [classifier, "input=a[1].png"])
    stdout, stderr = capsys.readouterr()
    assert stdout.startswith("a[1].png: ") and "input=a[1].png is the file of this name, and no pattern for" in stderr


def test_all_images_of_a_folder_that_can_be_read_are_answered_and_the_others_listed(
    classifier: str, inside: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "c.jpe"):
        Image.new("RGB", (9, 9)).save(folder / name, "PNG")
    (folder / "b.png").write_text("broken")
    arguments = [classifier, f"input={folder}", "output=answers"]
    with pytest.raises(SystemExit) as exit_info:
        cli.launch(predict.predict, "predict", predict.stored_config, arguments)
    stdout, stderr = capsys.readouterr()
    assert [line.partition(":")[0] for line in stdout.splitlines()] == ["a.png", "c.jpe"] and exit_info.value.code == 1
    assert "b.png is broken" in stderr.splitlines()[-1]
    assert "b.png is broken" in inside("predict", arguments[0], f"input={folder / 'b.png'}", code=2)


def test_a_detectors_attention_is_drawn_for_each_image(
    inside: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["data.train_count=4", "data.val_count=4", "data.test_count=4", "data.batch_size=4", "model.width=16"]
    steps = ["trainer.steps=1", "trainer.device=cpu", "schedule.warmup=0", "trainer.workers=0"]
    inside("train", "model=detr", *sizes, *steps, "run_dir=run", "data.root=shapes")
    Path("photos").mkdir()
    for name, size in (("a.png", (90, 70)), ("b.png", (64, 64))):
        Image.new("RGB", size).save(f"photos/{name}")
    checkpoint = "checkpoint=run/checkpoints/best.pt"
    for _ in range(2):  # the second time, the pictures of the first are not read
        lines = inside("predict", checkpoint, "input=photos", "output=photos/new", "attention=true", "threshold=0")
        assert [line.partition(":")[0] for line in lines.splitlines()] == ["a.png", "b.png"]
    written = {file.name for file in Path("photos/new").glob("*.png")}
    assert written == {f"{name}.{what}.png" for name in ("a.png", "b.png") for what in ("attention", "encoder")}
    inside("predict", checkpoint, "input=photos", "output=plain")
    assert not [*Path("plain").glob("*.png")]
