"""The table of runs: only differing keys, the metrics, the state, and the best run first."""

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
def in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")  # pytest-xdist sets another width in its processes


def run(
    folder: str, *overrides: str, results: dict[str, Any] | None = None, val: list[float] | None = None, log: str = ""
) -> None:
    """Write a run's folder as train.py leaves it; `val` are the goal's values, one every 10 steps."""
    path = Path(folder)
    path.mkdir(parents=True)
    config = configure("train", overrides or ["model=detr", "trainer.steps=50"])
    (path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    if results:
        (path / "results.json").write_text(json.dumps({"goal": "val/AP", "direction": "maximize", **results}))
    lines = [{"step": 10 * n, "val/AP": value, "val/AP50": 1.0} for n, value in enumerate(val or [], 1)]
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (path / "train.log").write_text(log)


def printed_cells(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> list[list[str]]:
    """The cells of the first printed table, the header first."""
    assert compare.main(arguments) == code
    return cells(capsys.readouterr().out.split("\n\n")[0])


def cells(table: str) -> list[list[str]]:
    """The cells of a table without its title."""
    lines = table.splitlines()
    widths = [len(dashes) for dashes in lines[2].split("  ")]
    starts = [sum(widths[:n]) + 2 * n for n in range(len(widths))]
    return [
        [line[start : start + width].strip() for start, width in zip(starts, widths, strict=True)]
        for line in [lines[1], *lines[3:]]
    ]


def test_the_table_shows_differing_keys_and_metrics_with_the_best_run_first(capsys: pytest.CaptureFixture[str]) -> None:
    run("r/a", "model=detr", "optimizer.lr=1e-5", results={"val/AP": 0.2, "test/AP": 0.5})
    run("r/deep/b", "model=detr", "seed=3", "optimizer.lr=0.5", results={"val/AP": 0.3, "test/AP": 0.25})
    run("r/c", "model=detr", "run_dir=x", "resume=auto", results={"val/AP": 0.1, "test/AP": None})
    assert printed_cells(capsys, "r") == [
        ["run", "state", "seed", "optimizer.lr", "val/AP", "test/AP"],
        ["r/deep/b", "done", "3", "0.5", "0.3000", "0.2500"],
        ["r/a", "done", "0", "1e-05", "0.2000", "0.5000"],
        ["r/c", "done", "0", "0.0005", "0.1000", "-"],
    ]


def test_a_goal_that_is_minimised_is_sorted_in_ascending_order(capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("a", 3.0), ("b", 1.0), ("c", 2.0)):
        run(name, results={"val/nll": value, "goal": "val/nll", "direction": "minimize"})
    assert [row[0] for row in printed_cells(capsys, "a", "b", "c")[1:]] == ["b", "c", "a"]


def test_unfinished_runs_show_their_step_and_the_goals_best_value_so_far(capsys: pytest.CaptureFixture[str]) -> None:
    run("a", results={"val/AP": 0.3})
    run("b", "model=detr", "trainer.steps=50", val=[0.4, 0.2])
    run("c", "model=detr", "trainer.steps=null", "trainer.epochs=4")
    with open("b/metrics.jsonl", "a") as file:
        file.write('{"step": 30, "tra')  # cut by a kill
    table = printed_cells(capsys, "a", "b", "c", "--columns", "val/AP")
    assert table == [
        ["run", "state", "val/AP"],
        ["b", "at step 20 of 50", "0.4000"],
        ["a", "done", "0.3000"],
        ["c", "at step 0", "-"],
    ]


def test_without_a_finished_run_the_last_evaluation_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    run("a", val=[0.4, 0.2])
    assert printed_cells(capsys, "a") == [
        ["run", "state", "val/AP", "val/AP50"],
        ["a", "at step 20 of 50", "0.2000", "1.0000"],
    ]


def test_the_state_says_why_a_run_ended(capsys: pytest.CaptureFixture[str]) -> None:
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
    for line in (
        "x/a  at step 0 of 50; failed: ZeroDivisionError: oh\n",
        "x/b  at step 0 of 50\n",
        "x/c  at step 0 of 50; Stopped by SIGTERM after step 3\n",
        "x/d  at step 0 of 50; refused: The file is not there.\n",
    ):
        assert line in out
    assert out.endswith("\nx/gone: The file is not there.\n"), "a run without a folder is listed, too"


def test_of_different_data_sets_only_the_class_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    run("a", "model=vit", "data=imagefolder", "data.root=x", results={"val/AP": 0.3})
    run("b", "model=vit", "optimizer.lr=0.1", results={"val/AP": 0.9})
    head, *rows = printed_cells(capsys, "a", "b")
    assert "optimizer.lr" in head and [column for column in head if column.startswith("data.")] == ["data._target_"]
    assert [row[0] for row in rows] == ["b", "a"]


def test_each_task_has_a_table_with_its_own_columns(capsys: pytest.CaptureFixture[str]) -> None:
    run("a", "model=detr", "model.dropout=0.3", results={"val/AP": 0.3})
    run("b", "model=detr", "model.dropout=0.4", results={"val/AP": 0.4})
    run("c", "model=vit", results={"val/top1": 0.95, "goal": "val/top1"})
    assert compare.main(["a", "b", "c", "--csv", "t.csv"]) == 0
    first, second = capsys.readouterr().out.split("\n\n")
    assert first.startswith("2 runs of detr.tasks.detection.Detection\n")
    assert cells(first)[0] == ["run", "state", "model.dropout", "val/AP"]
    assert second.startswith("1 run of vit.tasks.classification.Classification\n")
    assert cells(second) == [["run", "state", "val/top1"], ["c", "done", "0.9500"]]
    assert compare.main(["a", "b", "c", "--columns", "val/top1,model.dropout", "--sort", "val/AP"]) == 0
    first, second = capsys.readouterr().out.split("\n\n")
    assert [cells(part)[0][2:] for part in (first, second)] == [["model.dropout"], ["val/top1"]]
    with open("t.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [row["task._target_"].partition(".")[0] for row in rows] == ["detr", "detr", "vit"]
    assert [row["val/top1"] for row in rows] == ["", "", "0.95"]


def test_runs_that_differ_by_their_seed_have_a_mean_and_a_sample_deviation(capsys: pytest.CaptureFixture[str]) -> None:
    """0.1, 0.2 and 0.6: mean 0.3, squared deviations 0.04 + 0.01 + 0.09 = 0.14, divided by 2: 0.07, root 0.2646."""
    for seed, value in ((0, 0.1), (1, 0.2), (2, 0.6)):
        overrides = ["model=detr", f"seed={seed}", "optimizer.lr=0.1", f"trainer.workers={seed}"]
        run(f"slow/{seed}", *overrides, results={"val/AP": value, "test/AP": None if seed else 0.5, "weights": "raw"})
    for seed, value in ((0, 0.25), (1, 0.15), (3, float("nan"))):
        run(f"fast/{seed}", "model=detr", f"seed={seed}", results={"val/AP": value, "test/AP": -value})
    run("fast/4", "model=detr", "seed=4", "optimizer.lr=0.3", val=[0.9])
    run("fast/5", "model=detr", "seed=5", val=[0.9])
    run("single", "model=detr", "optimizer.lr=0.2", results={"val/AP": 0.1})
    assert compare.main(["."]) == 0
    runs, means = capsys.readouterr().out.split("\n\n")
    assert len(cells(runs)) == 10 and means.startswith("mean ± standard deviation over seeds\n")
    assert cells(means) == [
        ["n", "seeds", "optimizer.lr", "val/AP", "test/AP"],
        ["3", "0,1,2", "0.1", "0.3000 ± 0.2646", "0.5000 (1 of 3)"],
        ["3 of 4", "0,1,3,5", "0.0005", "0.2000 ± 0.0707 (2 of 3)", "-0.2000 ± 0.0707 (2 of 3)"],
        ["1", "0", "0.2", "0.1000", "-"],
        ["0 of 1", "4", "0.3", "-", "-"],
    ]


def test_repeated_runs_of_a_seed_count_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Seed 0 has 0.2 (the mean of 0.1 and 0.3) and seed 1 has 0.4: mean 0.3, deviation sqrt(0.02) = 0.1414."""
    for name, seed, value in (("a", 0, 0.1), ("b", 0, 0.3), ("c", 1, 0.4)):
        run(name, "model=detr", f"seed={seed}", results={"val/AP": value})
    assert compare.main(["."]) == 0
    assert cells(capsys.readouterr().out.split("\n\n")[1]) == [
        ["n", "seeds", "val/AP"],
        ["2", "0 (2 runs),1", "0.3000 ± 0.1414"],
    ]


def test_runs_with_different_seeds_and_configs_have_no_mean(capsys: pytest.CaptureFixture[str]) -> None:
    run("a", "model=detr", "seed=0", "optimizer.lr=0.1", results={"val/AP": 0.1})
    run("b", "model=detr", "seed=1", "optimizer.lr=0.2", results={"val/AP": 0.1})
    assert compare.main(["a", "b"]) == 0
    assert "mean" not in capsys.readouterr().out


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_no_line_is_wider_than_the_terminal(columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    deep = f"{'a folder with a long name ' * 4}/deep"
    for seed in (0, 1):
        overrides = ["model=detr", f"seed={seed}", "model.backbone.name=resnet50", f"data.root={'long' * 30}"]
        numbers = {f"test/AP of class {number}": number / 7 for number in range(30)}
        run(f"{deep}/{seed}", *overrides, results={"val/AP": 0.5, **numbers})
    run(f"{deep}/c", log=f"2026-01-01 10:00:00  Traceback (most recent call last):\nKeyError: {'oh ' * 60}\n")
    Path(deep, STATUS_FOLDER).mkdir()
    Path(deep, STATUS_FOLDER, "gone.json").write_text(json.dumps({"state": "refused", "why": "It is not there. " * 9}))
    monkeypatch.setenv("COLUMNS", str(columns))
    assert compare.main(["."]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    numbers_of_class_29 = [line for line in out.splitlines() if "4.1429" in line]  # 29 / 7
    if columns >= 40:
        assert len(numbers_of_class_29) == 3, "each run's, and the mean"


def test_where_the_output_is_no_terminal_lines_have_120_characters(tmp_path: Path) -> None:
    run("a", results={"val/AP": 0.5, **{f"test/AP{number}": 0.5 for number in range(50)}})
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, str(ROOT / "scripts/compare.py"), "a"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert 100 < max(map(len, out.splitlines())) <= 120


def test_columns_and_order_are_options_and_a_file_holds_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    for name, lr, value in (("a", "0.1", 0.2), ("b", "0.02", 0.3)):
        run(name, "model=detr", f"optimizer.lr={lr}", results={"val/AP": value, "test/AP": 1 - value})
    arguments = ["a", "b", "--columns", "test/AP,optimizer.lr", "--csv", "t.csv", "--sort"]
    assert [row[0] for row in printed_cells(capsys, *arguments, "optimizer.lr")] == ["run", "b", "a"]
    assert [row[0] for row in printed_cells(capsys, *arguments, "optimizer.lr", "--reverse")] == ["run", "a", "b"]
    with open("t.csv", newline="") as file:
        assert [*csv.reader(file)][0:2] == [["run", "state", "test/AP", "optimizer.lr"], ["a", "done", "0.8", "0.1"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: there is no such folder"),
        (["empty"], "empty: neither it nor a folder in it holds a run (a config.yaml)."),
        (["half"], "half/results.json is damaged ("),
        (["text"], "text/config.yaml cannot be read"),
        (["torn"], "torn/metrics.jsonl is damaged ("),
        (["good", "--sort", "val/APP"], "--sort val/APP is not a column of these runs; did you mean val/AP?"),
        (["good", "--columns", "sed"], "--columns sed is not a column of these runs"),
        (["good", "--csv", "empty"], "--csv empty cannot be written"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkdir("empty")
    for name in ("half", "text", "torn", "good"):
        run(name, results={"val/AP": 1.0})
    Path("half/results.json").write_text('{"val/AP": ')
    Path("text/config.yaml").write_text("model: [")
    Path("torn/metrics.jsonl").write_text('{"step": 1,\n{"step": 2}\n')
    assert compare.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(message) and err.count("\n") == 1


def test_torch_is_not_imported() -> None:
    run("a")
    code = "import sys; from scripts import compare; compare.main(['a']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0
