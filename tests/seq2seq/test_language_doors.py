"""The doors as a user of a language model uses them: one small run on a text file, then what can be done with it."""

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

Door = Callable[..., str]
ROOT = Path(__file__).parents[2]
LINES = [("zero", "one"), ("two", "three"), ("four", "five"), ("six", "seven"), ("eight", "nine")]
SMALL = ["model.width=32", "model.heads=2", "model.layers=2", "model.feedforward=64", "schedule.warmup=1"]
RUN = ["model=gpt", *SMALL, "data.block=32", "data.batch_size=512", "optimizer.lr=1e-2", "trainer.steps=120"]
RUN += ["trainer.eval_every=60", "trainer.log_every=10", "trainer.ema_decay=0.5", "trainer.micro_batch=128"]
pytestmark = pytest.mark.slow


def numbers_of(output: str) -> dict[str, float]:
    """The JSON line of evaluate.py."""
    return json.loads(next(line for line in output.splitlines() if line.startswith("{")))


def results_of(folder: Path) -> dict[str, Any]:
    numbers = json.loads((folder / "results.json").read_text())
    return {name: value for name, value in numbers.items() if name.startswith("test/")}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a path that has a meaning in Hydra's grammar."""
    file = tmp_path_factory.mktemp("my texts (all), of=mine") / "numbers [en].txt"
    random = Random(0)  # in any order, so that no two splits are equal
    lines = [" ".join(random.choice(LINES)) for _ in range(2250)]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def trained(door: Door, tmp_path_factory: pytest.TempPathFactory, text: Path) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs") / "one"
    return folder, door("train", *RUN, f"data.train={text}", f"run_dir={folder}", cwd=folder.parent)


@pytest.fixture
def best(trained: tuple[Path, str]) -> str:
    return f"checkpoint={trained[0]}/checkpoints/best.pt"


def test_a_run_learns_and_states_context_and_amounts(trained: tuple[Path, str], text: Path) -> None:
    folder, output = trained
    for part in ("characters, ", "windows of 32 tokens at a stride of 16", "bytes of UTF-8", str(text), "text_tokens"):
        assert part in output, part
    results = results_of(folder)
    names = ("bits_per_byte", "bits_per_character", "bits_per_token", "perplexity", "loss")
    assert results.keys() == {f"test/{name}" for name in names}
    assert results["test/bits_per_character"] == results["test/bits_per_byte"] < 1.5
    assert json.loads((folder / "results.json").read_text())["goal"] == "val/bits_per_character"
    assert json.loads((folder / "predictions/scores.json").read_text())["stride"] == 16
    files = [*(folder.parent / "data/text_tokens").iterdir()]
    assert len(files) == 3 and all(file.suffix == ".tokens" for file in files)


def test_evaluation_gives_the_numbers_of_training_and_states_the_stride(
    trained: tuple[Path, str], best: str, inside: Door
) -> None:
    output = inside("evaluate", best)
    assert numbers_of(output) == results_of(trained[0])
    assert "stride of 16" in output
    other = numbers_of(inside("evaluate", best, "data.stride=32"))
    assert other["test/bits_per_byte"] > results_of(trained[0])["test/bits_per_byte"], "with less context"


def test_a_resumed_run_has_the_numbers_of_an_uninterrupted_one(
    inside: Door, trained: tuple[Path, str], text: Path, tmp_path: Path
) -> None:
    command = [*RUN, f"data.train={text}", f"run_dir={tmp_path / 'two'}", "trainer.workers=2"]
    shutil.copytree(trained[0], tmp_path / "two")
    (tmp_path / "two/results.json").unlink()
    sorted((tmp_path / "two/checkpoints").glob("step_*.pt"))[-1].unlink()
    inside("train", *command, "resume=auto")
    for name in ("metrics.jsonl", "results.json", "task.json"):
        assert (trained[0] / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_two_processes_train_and_evaluate_to_the_same_numbers(
    door: Door, inside: Door, text: Path, tmp_path: Path
) -> None:
    command = [*RUN, f"data.train={text}", "trainer.steps=4", "trainer.eval_every=4", "trainer.precision=fp32"]
    inside("train", *command, f"run_dir={tmp_path / '1'}")
    door("train", *command, "trainer.device=cpu", f"run_dir={tmp_path / '2'}", processes=2, cwd=tmp_path)
    assert results_of(tmp_path / "1") == pytest.approx(results_of(tmp_path / "2"), rel=1e-3)


def test_a_prompt_is_continued_from_a_text_a_file_and_a_pipe(best: str, inside: Door, tmp_path: Path) -> None:
    keys = [best, "method=greedy", "longest_extra=12"]
    printed = inside("predict", *keys, "input=two th")
    assert printed.startswith("two three\n"), printed
    (tmp_path / "in.txt").write_text("two th\nsix se\n")
    lines = inside("predict", *keys, f"input={tmp_path / 'in.txt'}").splitlines()
    assert len(lines) == 2 and lines[0].startswith(r"two three\n") and lines[1].startswith(r"six seven\n")
    command = [sys.executable, str(ROOT / "predict.py"), *keys, "input=-"]
    piped = subprocess.run(command, input=b"two th\nsix se\n", capture_output=True, cwd=tmp_path)
    assert piped.stdout.decode().splitlines() == lines and not (tmp_path / "predictions").exists()
    samples = inside("predict", best, f"input={tmp_path / 'in.txt'}", "method=sample", "candidates=3", "top_k=2")
    assert [line.split("\t")[0] for line in samples.splitlines()] == ["1"] * 3 + ["2"] * 3
    beams = inside("predict", best, f"input={tmp_path / 'in.txt'}", "method=beam", "beam=3", "candidates=2")
    scores = [float(line.split("\t")[1]) for line in beams.splitlines()[:2]]
    assert scores == sorted(scores, reverse=True)
    assert "shorter prompt" in inside("predict", *keys, f"input={'one ' * 20}", code=1)
    assert "the vocabulary lacks its characters" in inside("predict", *keys, "input=größe", code=1)
    assert "There is no file" in inside("predict", *keys, "input=missing.txt", code=2)


def test_a_terminal_receives_a_continuation_token_by_token(best: str, tmp_path: Path) -> None:
    parent, child = pty.openpty()
    command = [sys.executable, str(ROOT / "predict.py"), best, "input=-", "method=greedy", "longest_extra=20"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    with subprocess.Popen(
        command, stdin=child, stdout=child, stderr=subprocess.PIPE, cwd=tmp_path, env=environment
    ) as process:
        os.close(child)
        reads: list[bytes] = []
        os.write(parent, b"two th\n")
        deadline = time.monotonic() + 120
        try:
            # Ctrl-D before the next prompt would not be read as the end of the input. A read may end within the prompt.
            while not (b"two three" in b"".join(reads) and b"".join(reads).endswith(b"> ")):
                assert time.monotonic() < deadline, reads
                if select.select([parent], [], [], 1)[0]:
                    reads.append(os.read(parent, 1000))
            os.write(parent, b"\x04")
            assert process.wait(60) == 0 and process.stderr is not None
        finally:
            process.kill()
        assert "Traceback" not in process.stderr.read().decode()
    os.close(parent)
    assert b"two three\r\n" in b"".join(reads) and len(reads) > 3, reads


def test_a_run_that_starts_from_a_checkpoint_keeps_its_vocabulary(
    trained: tuple[Path, str], best: str, inside: Door, tmp_path: Path
) -> None:
    (tmp_path / "other.txt").write_text("two ß\n" * 400, encoding="utf-8")
    run = f"run_dir={tmp_path / 'run'}"
    output = inside("train", *RUN, best, f"data.train={tmp_path / 'other.txt'}", "trainer.steps=2", run)
    assert "are outside the vocabulary" in output and "re-initialised" not in output
    assert (tmp_path / "run/task.json").read_bytes() == (trained[0] / "task.json").read_bytes()


def test_an_empty_corpus_and_another_encoding_end_in_one_sentence(inside: Door, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("größe\n".encode("latin-1"))
    for name, message in (("empty", "there is no text"), ("latin", "line 1 is not valid UTF-8")):
        output = inside("train", *RUN, f"data.train={tmp_path / name}.txt", f"run_dir={tmp_path / name}", code=2)
        assert message in output and "Traceback" not in output


def test_one_line_of_100_megabytes_trains(inside: Door, tmp_path: Path) -> None:
    (tmp_path / "line.txt").write_bytes(b"one two three four five " * 4_200_000)
    command = [*RUN, f"data.train={tmp_path / 'line.txt'}", "data.val_share=1e-5", "data.test_share=1e-5"]
    output = inside("train", *command, "trainer.steps=2", f"run_dir={tmp_path / 'run'}")
    assert "100,7" in output and "bits_per_byte" in output
