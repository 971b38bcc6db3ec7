"""A model and a data set of a user's own, in a folder outside the project: one file and one yaml each, and no more."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

Door = Callable[..., str]

MODEL = '''
from torch import Tensor, nn

from common.types import Positive


class Perceptron(nn.Module):
    """All pixels to one hidden layer to the classes."""

    def __init__(self, *, classes: int, channels: int, image_size: tuple[int, int], hidden: Positive):
        super().__init__()
        self.hidden = nn.Linear(channels * image_size[0] * image_size[1], hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.hidden(images.flatten(1)).relu())
'''
MODEL_YAML = """
# @package _global_
defaults:
  - override /data: digits
  - override /optimizer: adamw_vit_small
  - override /schedule: cosine
  - override /trainer: small_vit

model: {_target_: mypackage.model.Perceptron, hidden: 16}

task:
  _target_: vit.task.Classification
  loss: {smoothing: 0.1}
  predict: {top: 5, attention: none, layer: -1, neighbours: 0}

trainer: {steps: 100}
"""

DATA = '''
import torch

from common.types import Positive, PositiveFloat
from vit.augmentation import Augmentation
from vit.in_memory import InMemory


class Stripes(InMemory):
    """Noisy stripes that lie, or stand."""

    names = ("lying", "standing")
    channels = 1

    def __init__(
        self,
        *,
        train_count: Positive,
        val_count: Positive,
        test_count: Positive,
        batch_size: Positive,
        image_size: Positive | tuple[Positive, Positive],
        mean: list[float],
        std: list[PositiveFloat],
        augmentation: Augmentation,
    ):
        super().__init__(batch_size=batch_size, image_size=image_size, mean=mean, std=std, augmentation=augmentation)
        self.counts = {"train": train_count, "val": val_count, "test": test_count}

    def load(self):
        return {split: self._draw(count, seed) for seed, (split, count) in enumerate(self.counts.items())}

    def _draw(self, count, seed):
        random = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 100, (count, 1, 8, 8), generator=random, dtype=torch.uint8)
        labels = torch.arange(count) % 2
        images[labels == 0, :, ::2] += 150
        images[labels == 1, :, :, ::2] += 150
        return images, labels
'''
DATA_YAML = """
defaults: [digits, _self_]  # keys that it does not say

_target_: mypackage.data.Stripes
train_count: 64
val_count: 10
test_count: 20
batch_size: 8
"""

MINE = ["--config-dir", "configs", "model=mine", "data=mine", "trainer.steps=2", "schedule.warmup=1"]
TRUST = "trust=[mypackage]"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files, far from the project."""
    root = tmp_path_factory.mktemp("my project")
    files = {"mypackage/model.py": MODEL, "mypackage/data.py": DATA}
    files |= {"configs/model/mine.yaml": MODEL_YAML, "configs/data/mine.yaml": DATA_YAML}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text.lstrip("\n"), encoding="utf-8")
    Image.new("L", (8, 8), 200).save(root / "bright.png")
    return root


@pytest.fixture(scope="module")
def checkpoint(door: Door, folder: Path) -> str:
    """checkpoint=FILE of two steps of both."""
    said = door("train", *MINE, TRUST, "run_dir=run", cwd=folder)
    assert "model     Perceptron, " in said and "2 classes, images of 8 x 8; train: 64, val: 10, test: 20" in said
    return "checkpoint=run/checkpoints/best.pt"


def test_both_are_trained_and_evaluated_to_the_same_numbers(door: Door, folder: Path, checkpoint: str) -> None:
    said = door("evaluate", checkpoint, TRUST, "details=true", cwd=folder)
    results = json.loads((folder / "run/results.json").read_text())
    found = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    assert found == {name: value for name, value in results.items() if name.startswith("test/")}
    assert "standing" in said


def test_both_predict_for_a_users_image(door: Door, folder: Path, checkpoint: str) -> None:
    said = door("predict", checkpoint, TRUST, "input=bright.png", cwd=folder)
    assert "bright.png: " in said and "lying 0." in said
    answer = json.loads((folder / "predictions/bright.png.classes.json").read_text())
    assert {one["name"] for one in answer["classes"]} == {"lying", "standing"}


def test_without_trust_every_door_refuses_them_in_one_sentence(door: Door, folder: Path, checkpoint: str) -> None:
    """That training trusted them is written in the checkpoint, and counts for nothing."""
    lines = {
        "train": [*MINE, "run_dir=untrusted"],
        "evaluate": [checkpoint],
        "predict": [checkpoint, "input=bright.png"],
    }
    for name, line in lines.items():
        for trust in ([], ["trust=[common]"] if name == "train" else []):
            said = door(name, *line, *trust, cwd=folder, code=2)
            assert said.count("\n") == 1 and "trust=[mypackage]" in said, said
            assert said.startswith("model._target_=mypackage.model.Perceptron: expected a class of detr, vit")
    assert not (folder / "untrusted").exists()


def test_a_model_of_ones_own_learns_the_projects_data(door: Door, folder: Path) -> None:
    line = ["--config-dir", "configs", "model=mine", "model.hidden=7", "trainer.steps=2"]
    said = door("train", *line, TRUST, "run_dir=digits", cwd=folder)
    assert "model     Perceptron, 535 parameters" in said and "10 classes" in said
    said = door("train", *line, "model.hiden=7", TRUST, cwd=folder, code=2)
    assert said == "model.hiden is not a key of this config; did you mean model.hidden?\n"


def test_data_of_ones_own_teach_the_projects_model(door: Door, folder: Path) -> None:
    small = ["model.width=32", "model.layers=1", "trainer.steps=2", "trainer.workers=1", "data.augmentation.mixup=0.5"]
    said = door("train", "--config-dir", "configs", "model=vit", "data=mine", *small, TRUST, "run_dir=vit", cwd=folder)
    assert "model     Classifier, " in said and "2 classes" in said
    said = door(
        "predict", "checkpoint=vit/checkpoints/best.pt", TRUST, "input=bright.png", "attention=maps", cwd=folder
    )
    assert "lying 0." in said and (folder / "predictions/bright.png.attention.png").exists()
