"""scripts/verify_resume.py: equal runs pass, and every difference between two runs is reported."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nursery import run

from common.files import checkpoint
from scripts.verify_resume import compare, main, unequal_paths

ROOT = Path(__file__).parents[2]
SMALL = ["model=vit", "model.width=16", "model.layers=1", "model.heads=2", "trainer.log_every=2", "schedule.warmup=1"]
pytestmark = pytest.mark.slow


def verify(*arguments: str) -> tuple[int, str]:
    """Run the script: its exit code, and its stdout and stderr."""
    command = [sys.executable, str(ROOT / "scripts/verify_resume.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_one_command_proves_a_config(tmp_path: Path) -> None:
    code, output = verify(*SMALL, "--steps", "12", "--kills", "4", "--folder", str(tmp_path / "runs"))
    assert code == 0, output
    *kills, verdict = output.strip().splitlines()
    assert len(kills) == 4 and all(line.startswith("killed ") and "; resuming from " in line for line in kills)
    assert verdict.startswith("bit-equal: ") and verdict.endswith("lines of metrics.jsonl, after 4 kills")
    log = (tmp_path / "runs/killed.txt").read_text()
    assert log.count("weights   ") >= 5, "it really started five times"


def test_a_mistake_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "caf\udce9" / "whole").mkdir(parents=True)
    code, output = verify("model=vit", "--folder", f"{tmp_path}/caf\udce9")
    assert code == 2 and "caf\\udce9 holds runs already" in output and "Traceback" not in output, output
    for arguments, sentence in (
        (["model=vit", "run_dir=x"], "run_dir= is set by this script"),
        (["model=vit", "model.widht=3"], "did you mean model.width?"),
        (["model=detr_r50", "--steps", "0", "data.root=x"], "needs a config with trainer.steps"),
    ):
        monkeypatch.setattr(sys, "argv", ["scripts/verify_resume.py", *arguments])
        assert main() == 2  # in this process, which has imported torch
        output = capsys.readouterr().err
        assert sentence in output and output.count("\n") == 1, output


def test_every_kind_of_difference_between_two_runs_is_reported(tmp_path: Path) -> None:
    short = [*SMALL, "trainer.steps=4", "trainer.eval_every=2"]
    first, second = tmp_path / "first", tmp_path / "second"
    run(tmp_path, *short, f"run_dir={first}")
    shutil.copytree(first, second)
    assert not compare(first, second).differences

    file = second / "checkpoints/step_00000002.pt"
    content = checkpoint.load(file)
    content["optimizer"][next(iter(content["optimizer"]))]["exp_avg"].view(-1)[0] += 1e-3
    file.unlink()
    checkpoint.save(file, content)
    lines = (second / "metrics.jsonl").read_text().splitlines()
    (second / "metrics.jsonl").write_text("\n".join([lines[0], lines[1] + " ", *lines[2:]]) + "\n")
    results = json.loads((second / "results.json").read_text())
    (second / "results.json").write_text(json.dumps({**results, "val/top1": 0.123}))
    differences = compare(first, second).differences
    files = [line.partition("/")[0].partition(":")[0] for line in differences]
    assert files == ["step_00000002.pt", "metrics.jsonl", "results.json"]
    assert differences[0].startswith("step_00000002.pt/optimizer/") and "which differ from line 2 on" in differences[1]
    file.unlink()
    assert compare(first, second).differences[0] == f"only one run has {first / 'checkpoints' / file.name}"


def test_bits_are_compared_and_not_values() -> None:
    assert not unequal_paths({"a": torch.tensor([float("nan")])}, {"a": torch.tensor([float("nan")])})
    assert unequal_paths(torch.tensor([0.0]), torch.tensor([-0.0]), "zero") == ["zero"]
    assert unequal_paths({"a": [1, 2]}, {"a": [1, 2.0]}) == ["/a/1"]
    assert unequal_paths({"a": 1}, {"b": 1}, "keys") == ["keys"]
    assert unequal_paths(torch.zeros(2), torch.zeros(2, dtype=torch.float64), "kind") == ["kind"]
