"""The doors with every model of this package: resuming, evaluation, prediction, export, a sweep, and mistakes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from resuming import cut_back
from teaching import write_teacher

from scripts import export

Door = Callable[..., str]
RUN = ["trainer.steps=4", "trainer.eval_every=2", "trainer.save_every=2", "trainer.log_every=1", "schedule.warmup=1"]
RUN += ["data.batch_size=16", "trainer.micro_batch=6", "trainer.ema_decay=0.9", "trainer.precision=fp32"]
SMALL = ["model.width=16", "model.layers=2", "model.heads=2", "model.feedforward=24"]
RANDOM = ["data.augmentation.mixup=0.8", "data.augmentation.repeats=2", "model.blocks.drop_path=0.2"]
MODELS = {
    "swin": ["model=swin", "model.width=16", "model.window=3", "model.heads=[2,2]", *RANDOM],
    "tnt": ["model=tnt", *SMALL, "model.inner.width=8", "model.inner.feedforward=12", *RANDOM],
    "cnn": ["model=cnn", "model.widths=[8,16,24]", *RANDOM[:2]],
    "batch norms": ["model=cnn", "model.widths=[8,16,24]", "model.norm=batch", *RANDOM[:2]],
    "distilled": ["model=vit", *SMALL, "model.distillation_token=true", *RANDOM],
    "igpt": ["model=igpt", *SMALL],
    "masked igpt": ["model=igpt", *SMALL, "task.loss.objective=masked", "data.augmentation.repeats=2"],
    "joint igpt": ["model=igpt", *SMALL, "task.loss.classification=0.5"],
    "mae": ["model=mae", *SMALL, "data.augmentation.repeats=2", "task.mask.normalise=true"],
}
ENDINGS = {"igpt": "pixels", "mae": "reconstruction"}  # of the files of predictions; the others have "classes"
pytestmark = pytest.mark.slow


def numbers_of(output: str) -> dict[str, float]:
    """The numbers in the JSON line of evaluate.py."""
    return dict(json.loads(next(line for line in output.splitlines() if line.startswith("{"))))


def draw_pictures(folder: Path) -> Path:
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (2, 9, 13, 3), np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_a_run_resumes_to_the_same_bytes_and_its_checkpoint_serves_every_door(
    name: str, inside: Door, tmp_path: Path
) -> None:
    line, whole = [*MODELS[name], *RUN], tmp_path / "whole"
    if name == "distilled":
        line += [f"task.distillation.teacher={write_teacher(tmp_path / 'teacher.pt')}"]
    inside("train", *line, f"run_dir={whole}")
    cut = cut_back(whole, tmp_path / "cut", 2)
    inside("train", *line, f"run_dir={cut}", "resume=auto")
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    (tmp_path / "teacher.pt").unlink(missing_ok=True)

    best = f"checkpoint={whole / 'checkpoints/best.pt'}"
    results = json.loads((whole / "results.json").read_text())
    expected = {key: value for key, value in results.items() if key.startswith("test/")}
    assert numbers_of(inside("evaluate", best, "trainer.micro_batch=7")) == pytest.approx(expected, rel=1e-6)

    pictures, answers = draw_pictures(tmp_path / "pictures"), tmp_path / "answers"
    printed = inside("predict", best, f"input={pictures}", f"output={answers}")
    ending = next((ending for model, ending in ENDINGS.items() if model in name), "classes")
    assert "0.png: " in printed and (answers / f"1.png.{ending}.json").is_file()

    assert export.main([best, "--format", "torch", "--output", str(tmp_path / "exported")]) == 0


def test_a_sweep_trains_every_model(inside: Door, tmp_path: Path) -> None:
    line = ["trainer.steps=1", "trainer.precision=fp32", f"sweep_dir={tmp_path / 'sweep'}", "data.batch_size=8"]
    inside("train", "-m", "model=swin,tnt,cnn,igpt,mae", *line)
    folders = sorted(file.parent.name for file in (tmp_path / "sweep").glob("*/results.json"))
    assert [folder.partition("-")[0] for folder in folders] == ["cnn", "igpt", "mae", "swin", "tnt"]


def test_a_sweep_compares_teachers_and_none(inside: Door, tmp_path: Path) -> None:
    """The config of a teacher is composed while Hydra runs the sweep."""
    files = [write_teacher(tmp_path / f"{seed}.pt", seed=seed) for seed in (0, 1)]
    line = ["model=vit", *SMALL, *RUN[1:], "trainer.steps=1", f"sweep_dir={tmp_path / 'sweep'}"]
    inside("train", "-m", *line, f"task.distillation.teacher=null,{files[0]},{files[1]}")
    logs = [file.read_text() for file in (tmp_path / "sweep").glob("*/metrics.jsonl")]
    assert len(logs) == 3 == len({*logs}) and sum("train/teacher" in log for log in logs) == 2
    assert len([*(tmp_path / "sweep").glob("*/results.json")]) == 3


@pytest.mark.parametrize("door", ["train", "evaluate"])
def test_a_checkpoint_of_another_task_is_not_called_altered(door: str, inside: Door, tmp_path: Path) -> None:
    file = write_teacher(tmp_path / "vit.pt")
    message = inside(door, "model=igpt", f"checkpoint={file}", code=2)
    assert message.startswith(f"{file} was trained for vit.tasks.classification.Classification, and its state does not")
    assert "suit vit.tasks.image_modelling.ImageModelling (task.palette is missing); leave out model= to" in message
