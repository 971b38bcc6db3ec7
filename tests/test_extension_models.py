"""Three models of users' own, one file and one yaml each (tests/extensions), from a folder outside the project."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

Door = Callable[..., str]
EXTENSIONS = Path(__file__).parent / "extensions"
SHORT = ["trainer.steps=6", "trainer.eval_every=3", "trainer.log_every=1", "schedule.warmup=1", "trainer.device=cpu"]
SHAPES = ["data.root=shapes", "data.train_count=24", "data.val_count=4", "data.test_count=6", "data.batch_size=4"]
LINES = {
    "characters": ["data.file=text.txt"],
    "refined": [*SHAPES, "data.image_size=48"],
    "resnet": ["data.batch_size=16", "data.val_count=40", "data.test_count=50"],
}
NUMBERS = {"characters": "test/bits", "refined": "test/AP", "resnet": "test/top1"}
TRUST = "trust=[own]"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's project: a package, and its configs."""
    root = tmp_path_factory.mktemp("own project")
    (root / "own").mkdir()
    (root / "configs/model").mkdir(parents=True)
    for name in LINES:
        shutil.copy(EXTENSIONS / f"{name}.py", root / "own")
        shutil.copy(EXTENSIONS / f"{name}.yaml", root / "configs/model")
    words = ["the cat sat on the mat", "a dog ran after the cat", "the mat was red", "no dog sat there"]
    text = "\n".join(words[(7 * n + n // 3) % 4] for n in range(400))
    (root / "text.txt").write_text(text + "\n", encoding="utf-8")
    return root


@pytest.fixture(scope="module", params=[*LINES])
def trained(request: pytest.FixtureRequest, door: Door, folder: Path) -> tuple[str, str]:
    """A model's name, and what its training printed."""
    name = request.param
    line = ["--config-dir", "configs", f"model={name}", *LINES[name], *SHORT, TRUST]
    return name, door("train", *line, f"run_dir=runs/{name}", cwd=folder)


def lines_of(folder: Path, run: str) -> list[str]:
    return (folder / run / "metrics.jsonl").read_text().splitlines()


def test_it_trains_and_evaluates_to_the_numbers_of_its_run(trained, door: Door, folder: Path) -> None:
    name, _ = trained
    printed = door("evaluate", f"checkpoint=runs/{name}/checkpoints/best.pt", TRUST, cwd=folder)
    numbers = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    results = json.loads((folder / f"runs/{name}/results.json").read_text())
    assert numbers == {key: value for key, value in results.items() if key.startswith("test/")}
    assert NUMBERS[name] in numbers


def test_a_run_that_is_cut_back_resumes_to_the_same_end(trained, door: Door, folder: Path) -> None:
    """As a kill after the third step's checkpoint leaves it."""
    name, _ = trained
    whole, copy = folder / f"runs/{name}", folder / f"runs/{name}_cut"
    shutil.copytree(whole, copy)
    for path in (copy / "results.json", *copy.glob("checkpoints/step_*6.pt"), copy / "checkpoints/best.pt"):
        path.unlink()
    shutil.copy(copy / "checkpoints/step_00000003.pt", copy / "checkpoints/best.pt")
    line = ["--config-dir", "configs", f"model={name}", *LINES[name], *SHORT, TRUST]
    door("train", *line, f"run_dir=runs/{name}_cut", "resume=auto", cwd=folder)
    assert lines_of(folder, f"runs/{name}_cut") == lines_of(folder, f"runs/{name}")
    last = "checkpoints/step_00000006.pt"
    weights, again = (torch.load(run / last, weights_only=True)["model"] for run in (whole, copy))
    assert weights.keys() == again.keys() and all(torch.equal(weights[key], again[key]) for key in weights)


def test_the_start_says_which_parts_depend_on_the_micro_batch(trained) -> None:
    name, printed = trained
    assert ("BatchNorm" in printed) == (name == "resnet")


def test_the_language_model_continues_a_prompt(door: Door, folder: Path) -> None:
    line = ["--config-dir", "configs", "model=characters", "data.file=text.txt", "trainer.steps=150", TRUST]
    door("train", *line, "model.dropout=0", "optimizer.lr=3e-3", "run_dir=runs/longer", cwd=folder)
    (folder / "prompts.txt").write_text("the ca\na d\n")
    command = ["checkpoint=runs/longer/checkpoints/best.pt", "input=prompts.txt", TRUST]
    printed = door("predict", *command, cwd=folder).splitlines()
    assert [line[:6] for line in printed if line.startswith("the ca")] == ["the ca"]
    assert any(line.startswith("a dog ran") for line in printed), printed
