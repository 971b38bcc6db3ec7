"""The table of runs: what differs and nothing else, the numbers, the state, and the best first."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from common.cli.jobs import STATUS_FOLDER
from common.config.compose import configure
from scripts import compare

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(
    folder: str, *overrides: str, results: dict[str, Any] | None = None, val: list[float] | None = None, log: str = ""
) -> None:
    """A run's folder as train.py leaves it; `val` are its evaluations, one every 10 steps."""
    path = Path(folder)
    path.mkdir(parents=True)
    config = configure("train", overrides or ["model=detr", "trainer.steps=50"])
    (path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    if results:
        (path / "results.json").write_text(json.dumps({"goal": "val/AP", "direction": "maximize", **results}))
    lines = [{"step": 10 * n, "val/AP": value, "val/AP50": 1.0} for n, value in enumerate(val or [], 1)]
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (path / "train.log").write_text(log)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> list[list[str]]:
    """The cells of the printed table, the header first."""
    assert compare.main(arguments) == code
    out = capsys.readouterr().out.splitlines()
    widths = [len(dashes) for dashes in out[2].split("  ")]
    starts = [sum(widths[:n]) + 2 * n for n in range(len(widths))]
    return [
        [line[start : start + width].strip() for start, width in zip(starts, widths, strict=True)]
        for line in [out[1], *out[3:]]
    ]


def test_the_table_shows_what_differs_and_the_numbers_with_the_best_first(capsys: pytest.CaptureFixture[str]) -> None:
    run("r/a", "model=detr", "optimizer.lr=1e-5", results={"val/AP": 0.2, "test/AP": 0.5})
    run("r/deep/b", "model=detr", "seed=3", "optimizer.lr=0.5", results={"val/AP": 0.3, "test/AP": 0.25})
    run("r/c", "model=detr", "run_dir=x", "resume=auto", results={"val/AP": 0.1, "test/AP": None})
    assert shown(capsys, "r") == [
        ["run", "state", "seed", "optimizer.lr", "val/AP", "test/AP"],
        ["r/deep/b", "done", "3", "0.5", "0.3000", "0.2500"],
        ["r/a", "done", "0", "1e-05", "0.2000", "0.5000"],
        ["r/c", "done", "0", "0.0005", "0.1000", "-"],
    ]


def test_a_goal_that_is_to_be_small_is_sorted_upwards(capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("a", 3.0), ("b", 1.0), ("c", 2.0)):
        run(name, results={"val/nll": value, "goal": "val/nll", "direction": "minimize"})
    assert [row[0] for row in shown(capsys, "a", "b", "c")[1:]] == ["b", "c", "a"]


def test_runs_under_way_show_their_step_and_the_goals_best_so_far(capsys: pytest.CaptureFixture[str]) -> None:
    run("a", results={"val/AP": 0.3})
    run("b", "model=detr", "trainer.steps=50", val=[0.4, 0.2])
    run("c", "model=detr", "trainer.steps=null", "trainer.epochs=4")
    with open("b/metrics.jsonl", "a") as file:
        file.write('{"step": 30, "tra')  # torn by a kill
    table = shown(capsys, "a", "b", "c", "--columns", "val/AP")
    assert table == [
        ["run", "state", "val/AP"],
        ["b", "at step 20 of 50", "0.4000"],
        ["a", "done", "0.3000"],
        ["c", "at step 0", "-"],
    ]


def test_without_a_finished_run_the_last_evaluation_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    run("a", val=[0.4, 0.2])
    assert shown(capsys, "a") == [
        ["run", "state", "val/AP", "val/AP50"],
        ["a", "at step 20 of 50", "0.2000", "1.0000"],
    ]


def test_what_ended_a_run_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    stamp = "2026-01-01 10:00:00  "
    trace = f"{stamp}Traceback (most recent call last):\n  File x\n"
    run("x/a", log=f"{stamp}step 3: loss 1\n{trace}ZeroDivisionError: oh\n")
    run("x/b", log=f"{trace}common.errors.Stopped: Stopped by SIGTERM after step 3.\n{stamp}step 9: loss 1\n")
    run("x/c", log=f"{trace}common.errors.Stopped: Stopped by SIGTERM after step 3.\n")
    run("x/d")
    Path("x", STATUS_FOLDER).mkdir()
    for name in ("d", "gone"):
        Path("x", STATUS_FOLDER, f"{name}.json").write_text('{"state": "refused", "why": "The file is not there."}')
    assert compare.main(["x"]) == 0
    out = capsys.readouterr().out
    for words in (
        "x/a  at step 0 of 50; failed: ZeroDivisionError: oh\n",
        "x/b  at step 0 of 50\n",
        "x/c  at step 0 of 50; Stopped by SIGTERM after step 3\n",
        "x/d  at step 0 of 50; refused: The file is not there.\n",
    ):
        assert words in out
    assert out.endswith("\nx/gone: The file is not there.\n"), "a run that left no folder is not forgotten"


def test_of_different_models_the_class_alone_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    run("a", "model=detr", results={"val/AP": 0.3})
    run("b", "model=vit", "seed=1", results={"val/top1": 0.9, "goal": "val/top1"})
    run("c", "model=vit", results={"val/top1": 0.95, "goal": "val/top1"})
    head, *rows = shown(capsys, "a", "b", "c")
    assert "seed" in head and [column for column in head if column.startswith("model.")] == ["model._target_"]
    assert [row[0] for row in rows] == ["a", "c", "b"], "runs of one goal stand together"


def test_columns_sorting_and_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    for name, lr, value in (("a", "0.1", 0.2), ("b", "0.02", 0.3)):
        run(name, "model=detr", f"optimizer.lr={lr}", results={"val/AP": value, "test/AP": 1 - value})
    arguments = ["a", "b", "--columns", "test/AP,optimizer.lr", "--csv", "t.csv", "--sort"]
    assert [row[0] for row in shown(capsys, *arguments, "optimizer.lr")] == ["run", "b", "a"]
    assert [row[0] for row in shown(capsys, *arguments, "optimizer.lr", "--reverse")] == ["run", "a", "b"]
    with open("t.csv", newline="") as file:
        assert [*csv.reader(file)][0:2] == [["run", "state", "test/AP", "optimizer.lr"], ["a", "done", "0.8", "0.1"]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: there is no such folder"),
        (["empty"], "empty: neither it nor a folder in it holds a run (a config.yaml)."),
        (["half"], "half/results.json is damaged ("),
        (["text"], "text/config.yaml cannot be read"),
        (["torn"], "torn/metrics.jsonl is damaged ("),
        (["good", "--sort", "val/APP"], "--sort val/APP is no column of these runs; did you mean val/AP?"),
        (["good", "--columns", "sed"], "--columns sed is no column of these runs"),
        (["good", "--csv", "empty"], "--csv empty cannot be written"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkdir("empty")
    for name in ("half", "text", "torn", "good"):
        run(name, results={"val/AP": 1.0})
    Path("half/results.json").write_text('{"val/AP": ')
    Path("text/config.yaml").write_text("model: [")
    Path("torn/metrics.jsonl").write_text('{"step": 1,\n{"step": 2}\n')
    assert compare.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(said) and err.count("\n") == 1


def test_torch_is_not_imported() -> None:
    run("a")
    code = "import sys; from scripts import compare; compare.main(['a']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0
