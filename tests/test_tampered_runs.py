"""A run's folder with files that were edited, exchanged or left by another run: one sentence, or the run goes on."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

LINE = ("model=vit", "run_dir=run", "trainer.steps=4", "trainer.eval_every=2", "trainer.log_every=1", "resume=auto")
LINE += ("trainer.device=cpu", "model.width=16", "model.layers=1", "model.heads=2", "schedule.warmup=1")


@pytest.mark.parametrize("text", ["[1, 2]", "null", "5", "{"])
def test_results_task_or_config_that_hold_something_else_are_one_sentence(
    text: str, inside: Callable[..., str]
) -> None:
    inside("train", *LINE)
    Path("run/results.json").write_text(text)
    assert inside("train", *LINE, code=2).startswith("run/results.json is damaged (")
    Path("run/results.json").unlink()
    Path("run/task.json").write_text(text)
    assert inside("train", *LINE, code=2).startswith("run/task.json is damaged (")
    Path("run/config.yaml").write_text(text)
    assert inside("train", *LINE, code=2).startswith("run/config.yaml ")


def test_a_config_without_a_key_is_one_sentence_with_the_key(inside: Callable[..., str]) -> None:
    inside("train", *LINE)
    Path("run/results.json").unlink()
    config = Path("run/config.yaml")
    text = config.read_text()
    for key in ("precision", "lr", "width"):
        lines = text.splitlines(keepends=True)
        config.write_text("".join(line for line in lines if not line.startswith(f"  {key}:")))
        assert re.search(rf"\w\.{key}\b", inside("train", *LINE, code=2))


def test_damaged_records_cost_their_lines_and_not_the_run(inside: Callable[..., str]) -> None:
    inside("train", *LINE)
    Path("run/results.json").unlink()
    for name in ("metrics.jsonl", "timing.jsonl"):
        file = Path("run") / name
        rows = file.read_text().splitlines(keepends=True)
        file.write_text("".join(["{}\n", "5\n", *rows[1:]]))
    output = inside("train", *LINE)
    for name in ("metrics.jsonl", "timing.jsonl"):
        assert f"run/{name} had no record on lines 1, 2, now removed." in output
        assert f"run/{name} has " in output and "when the checkpoint was written" in output
    assert Path("run/results.json").exists()


def test_a_refused_command_leaves_no_folder(inside: Callable[..., str]) -> None:
    """Each is refused later than the one before: on the command line, by the data, by the optimizer."""
    for mistake in ("model.width=-1", "data=imagefolder", "optimizer.rates={nothing: 1.0}"):
        more = ["data.root=none", "data.image_size=8"] * (mistake == "data=imagefolder")
        inside("train", *LINE, mistake, *more, code=2)
        assert not Path("run").exists(), mistake
        inside(
            "train",
            *[argument for argument in LINE if not argument.startswith(("run_dir", "resume"))],
            mistake,
            *more,
            code=2,
        )
        assert not Path("runs").exists(), mistake


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["checkpoints", "predictions", "train.log", "metrics.jsonl", "task.json", "new"])
def test_a_file_for_a_folder_and_a_pipe_for_a_file_are_one_sentence_before_the_first_step(
    name: str, inside: Callable[..., str]
) -> None:
    Path("run").mkdir()
    os.mkfifo(f"run/{name}")
    assert inside("train", *LINE, code=2).startswith(f"run/{name} is n")
    os.unlink(f"run/{name}")
    if name in ("checkpoints", "predictions"):
        Path("run", name).write_text("")
        assert inside("train", *LINE, code=2).startswith(f"run/{name} is no folder")
