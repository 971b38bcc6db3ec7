"""scripts/verify_resume.py: it finds runs equal that are, and unequal that are not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nursery import run

from common.files import checkpoint
from scripts.verify_resume import compare, unequal

ROOT = Path(__file__).parents[2]
SMALL = ["model=vit", "model.width=16", "model.layers=1", "model.heads=2", "trainer.log_every=2", "schedule.warmup=1"]
pytestmark = pytest.mark.slow


def verify(*arguments: str) -> tuple[int, str]:
    """The exit code, and all that was said."""
    command = [sys.executable, str(ROOT / "scripts/verify_resume.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_config_is_proved_by_one_command_and_leaves_nothing_behind(tmp_path: Path) -> None:
    code, said = verify(*SMALL, "--steps", "12", "--kills", "4", "--folder", str(tmp_path / "runs"))
    assert code == 0, said
    *kills, verdict = said.strip().splitlines()
    assert len(kills) == 4 and all(line.startswith("killed ") and "goes on from" in line for line in kills)
    assert verdict.startswith("bit-equal: ") and verdict.endswith("lines of metrics.jsonl, after 4 kills")
    words = (tmp_path / "runs/killed.txt").read_text()
    assert words.count("weights   ") >= 5, "it really started five times"


def test_a_mistake_is_one_sentence() -> None:
    for arguments, sentence in (
        (["model=vit", "run_dir=x"], "run_dir= is chosen here"),
        (["model=vit", "model.widht=3"], "did you mean model.width?"),
        (["model=detr_r50", "--steps", "0", "data.root=x"], "needs a config with trainer.steps"),
    ):
        code, said = verify(*arguments)
        assert code == 2 and sentence in said and "Traceback" not in said, said


def test_every_kind_of_difference_between_two_runs_is_found(tmp_path: Path) -> None:
    short = [*SMALL, "trainer.steps=4", "trainer.eval_every=2"]
    run(tmp_path, *short, f"run_dir={tmp_path / 'one'}")
    one, other = tmp_path / "one", tmp_path / "other"
    shutil.copytree(one, other)
    assert not compare(one, other).differences

    file = other / "checkpoints/step_00000002.pt"
    content = checkpoint.load(file)
    content["optimizer"][next(iter(content["optimizer"]))]["exp_avg"].view(-1)[0] += 1e-3
    file.unlink()
    checkpoint.save(file, content)
    lines = (other / "metrics.jsonl").read_text().splitlines()
    (other / "metrics.jsonl").write_text("\n".join([lines[0], lines[1] + " ", *lines[2:]]) + "\n")
    results = json.loads((other / "results.json").read_text())
    (other / "results.json").write_text(json.dumps({**results, "val/top1": 0.123}))
    found = compare(one, other).differences
    places = [line.partition("/")[0].partition(":")[0] for line in found]
    assert places == ["step_00000002.pt", "metrics.jsonl", "results.json"]
    assert found[0].startswith("step_00000002.pt/optimizer/") and "unequal from line 2 on" in found[1]
    file.unlink()
    assert compare(one, other).differences[0] == f"only one run has {one / 'checkpoints' / file.name}"


def test_bits_are_compared_and_not_values() -> None:
    assert not unequal({"a": torch.tensor([float("nan")])}, {"a": torch.tensor([float("nan")])})
    assert unequal(torch.tensor([0.0]), torch.tensor([-0.0]), "zero") == ["zero"]
    assert unequal({"a": [1, 2]}, {"a": [1, 2.0]}) == ["/a/1"]
    assert unequal({"a": 1}, {"b": 1}, "keys") == ["keys"]
    assert unequal(torch.zeros(2), torch.zeros(2, dtype=torch.float64), "kind") == ["kind"]
