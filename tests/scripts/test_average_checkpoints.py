"""Averaging from the command line: a folder's last checkpoints or named files, the output, and the refusals."""

import json
import re
import shlex

import pytest
import torch

from common.files import checkpoint
from common.files.retention import CheckpointFolder
from scripts.average_checkpoints import main

STEPS = (10, 20, 30, 40)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "a run"
    checkpoints = CheckpointFolder(folder / "checkpoints", keep=4)
    for step in STEPS:
        content = {"step": step, "model": {"w": torch.tensor([float(step)])}, "average": None}
        checkpoints.save(step, {**content, "task": {}, "config": {"model": {"width": 4}}})
        checkpoints.mark_best(step)
    return folder


def value(path):
    return checkpoint.load(path)["model"]["w"].item()


def test_the_last_checkpoints_of_a_runs_folder_are_averaged(run, tmp_path, capsys):
    output = tmp_path / "the mean.pt"
    for folder in (run, run / "checkpoints"):
        assert main([str(folder), "--last", "3", "--output", str(output)]) == 0
        assert value(output) == 30
    out = capsys.readouterr().out
    assert "average of steps 20, 30, 40, raw" in out and "step_00000020.pt" in out and "step_00000010" not in out
    command = out.splitlines()[-1].partition("python evaluate.py ")[2]
    assert shlex.split(command) == [f"checkpoint={output}"]


def test_named_files_are_averaged_and_an_average_may_be_overwritten(run, tmp_path):
    files = [str(run / f"checkpoints/step_{step:08d}.pt") for step in (40, 10)]
    for _ in range(2):
        assert main([*files, "--output", str(tmp_path / "mean.pt")]) == 0
        assert value(tmp_path / "mean.pt") == 25


def test_weights_that_are_not_finite_are_named_in_a_warning(run, tmp_path, capsys):
    arguments = [str(run), "--last", "2", "--output", str(tmp_path / "mean.pt")]
    assert main(arguments) == 0 and "warning" not in capsys.readouterr().out
    file = run / "checkpoints/step_00000030.pt"
    checkpoint.save(file, {**checkpoint.load(file), "model": {"w": torch.tensor([float("nan")])}})
    assert main(arguments) == 0 and "warning   NaN or infinite values are in w:" in capsys.readouterr().out


REFUSED = {
    "too few": (["{run}"], "holds 4 step checkpoints .* but 5 are to be averaged; give --last 4, or train with"),
    "none": (["{run}/.."], "holds 0 step checkpoints .* but 5 are to be averaged; train with trainer.average_last"),
    "one file": (["{run}/checkpoints/best.pt"], "an average needs at least two checkpoints"),
    "missing": (["{run}/checkpoints/best.pt", "{run}/no.pt"], "no.pt does not exist"),
    "folder and file": (["{run}", "{run}/checkpoints/best.pt"], "give one run's folder, or only files"),
    "last of files": (["{run}/checkpoints/best.pt", "--last", "2"], "--last 2 applies to a run's folder"),
    "over the best": (["{run}", "--last=2", "--output={run}/checkpoints/best.pt"], "has the name of a run"),
    "over a step": (["{run}", "--last=2", "--output={run}/checkpoints/step_00000040.pt"], "has the name of a run"),
    "a folder": (["{run}", "--last=2", "--output={run}"], "is a folder; give a file in it"),
    "nowhere": (["{run}", "--last=2", "--output={run}/no/mean.pt"], "mean.pt cannot be written .No such file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_averaged_is_one_sentence_and_exit_code_2(run, capsys, name):
    templates, message = REFUSED[name]
    arguments = [template.format(run=run) for template in templates]
    if not any(argument.startswith("--output") for argument in arguments):
        arguments += ["--output", str(run / "mean.pt")]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert not printed.out and len(printed.err.splitlines()) == 1
    assert re.search(message, printed.err), printed.err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_an_average_of_one_is_refused_by_the_command_line(run, capsys):
    with pytest.raises(SystemExit) as caught:
        main([str(run), "--last", "1", "--output", str(run / "mean.pt")])
    assert caught.value.code == 2 and "--last must be at least 2" in capsys.readouterr().err


@pytest.mark.slow
def test_an_average_is_used_like_any_checkpoint(door, tmp_path):
    """A run that ends with an average; the script's average is equal, is evaluated, and starts another run."""
    small = ["model=vit", "model.width=32", "model.layers=1", "model.heads=2", "data.batch_size=16", "trainer.steps=6"]
    small += ["schedule.warmup=1", "trainer.eval_every=2"]
    run = tmp_path / "run"
    out = door("train", *small, "trainer.average_last=3", f"run_dir={run}")
    assert "average/top1" in out and json.loads((run / "results.json").read_text())["weights"] in out
    output = tmp_path / "mean.pt"
    assert main([str(run), "--last", "3", "--output", str(output)]) == 0
    stored = checkpoint.load(run / "checkpoints/average.pt")
    assert all(torch.equal(value, stored["model"][name]) for name, value in checkpoint.load(output)["model"].items())
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    [expected] = [line for line in logged if "average/top1" in line]
    out = door("evaluate", f"checkpoint={output}", "split=val")
    assert "mean.pt: average of steps 2, 4, 6, averaged (EMA)" in out
    results = json.loads(next(line for line in out.splitlines() if line.startswith("{")))
    assert results == {name.replace("average/", "val/"): value for name, value in expected.items() if name != "step"}
    out = door("train", *small, f"checkpoint={output}", "trainer.steps=1", f"run_dir={tmp_path / 'next'}")
    assert "mean.pt: " in out and "re-initialised" not in out
