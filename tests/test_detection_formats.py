"""Doors on sixty pictures in every format: one checkpoint has the same AP, and each set trains by data.root."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import annotating
import pytest
from annotating import FORMATS

Inside = Callable[..., str]

# A detector that knows an image by its mean colour alone: it learns within seconds where cells lie on average, and its
# scores differ from image to image, so that AP depends on no order of equal scores.
MODEL = '''
import torch
from torch import Tensor, nn

from common.types import Positive


class Average(nn.Module):
    """One box and one class for each query, whatever the image shows."""

    def __init__(self, *, classes: int, queries: Positive):
        super().__init__()
        side = int(queries**0.5)
        places = (torch.arange(side) + 0.5) / side
        grid = torch.cartesian_prod(places, places)
        self.boxes = nn.Parameter(torch.cat([grid, torch.full_like(grid, 0.15)], 1).logit())
        self.logits = nn.Parameter(torch.zeros(side * side, classes + 1))

    def forward(self, images: Tensor, sizes: Tensor | None) -> list[dict[str, Tensor]]:
        colour = images.mean((1, 2, 3))[:, None, None]
        boxes = self.boxes.sigmoid().expand(len(images), -1, -1)
        return [{"logits": self.logits * (1 + 0.1 * colour), "boxes_cxcywh": boxes}]
'''
TRUST = "trust=[averages]"
TASK = "\ntask:\n"
KEYS = ["data.augmentation.kind=none", "data.augmentation.sizes=[96]", "data.augmentation.eval_size=96"]
KEYS += ["data.batch_size=16", "trainer.workers=0", "trainer.device=cpu", "trainer.precision=fp32"]
TRAINING = ["--config-dir", "configs", "model=average", "model.queries=49", "optimizer.lr=0.02", "schedule.warmup=1"]


@pytest.fixture
def pictures(tmp_path: Path, real_data: Callable[[str], Path]) -> list[annotating.Picture]:
    """The sixty pictures, and a user's project with the model in the working folder of `inside`."""
    for path, text in (("averages/model.py", MODEL), ("configs/model/average.yaml", model_yaml())):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text.lstrip("\n"))
    return annotating.blood_cells(real_data("bccd"))


def model_yaml() -> str:
    """The yaml of the small DETR with the model above."""
    head, _, rest = (Path(__file__).parents[1] / "configs/model/detr.yaml").read_text().partition("\nmodel:\n")
    return f"{head}\nmodel: {{_target_: averages.model.Average, queries: 49}}\n\ntask:\n{rest.partition(TASK)[2]}"


def data_keys(format: str, **keys: Any) -> list[str]:
    """The keys of a door for the folder of a format."""
    _, name, own = FORMATS[format]
    options = {**own, **keys}
    return [f"data={name}", f"data.root={format}", *(f"data.{k}={v}".replace("'", "") for k, v in options.items())]


def numbers(printed: str) -> dict[str, float]:
    """The numbers in the JSON line of evaluate.py."""
    values: dict[str, float] = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    return values


@pytest.mark.slow
def test_one_checkpoint_has_the_same_numbers_in_each_format(
    inside: Inside, tmp_path: Path, pictures: list[annotating.Picture]
):
    for format, (write, _, _) in FORMATS.items():
        write(pictures, tmp_path / format)
    length = ["trainer.steps=150", "trainer.eval_every=150", "run_dir=run"]
    inside("train", *TRAINING, *data_keys("coco"), *KEYS, *length, TRUST)
    evaluation = ["checkpoint=run", *KEYS, TRUST]
    expected = numbers(inside("evaluate", *evaluation, *data_keys("coco")))
    assert expected["test/AP"] > 0.01, "otherwise no difference would show"
    for format in FORMATS:
        assert numbers(inside("evaluate", *evaluation, *data_keys(format))) == pytest.approx(expected, abs=1e-6), format
    shifted = numbers(inside("evaluate", *evaluation, *data_keys("voc_beside", first_pixel=1)))
    assert abs(shifted["test/AP"] - expected["test/AP"]) > 1e-5, "one pixel shows"


@pytest.mark.parametrize("format", FORMATS)
def test_sixty_pictures_train_with_one_root(
    format: str, inside: Inside, tmp_path: Path, pictures: list[annotating.Picture]
):
    """And nothing is cut to nothing."""
    FORMATS[format][0](pictures, tmp_path / format)
    steps = ["trainer.steps=2", "trainer.eval_every=2", "run_dir=run"]
    root = [key for key in data_keys(format) if key.startswith(("data=", "data.root="))]
    printed = inside("train", *TRAINING, *root, *KEYS, *steps, TRUST)
    log = printed + (tmp_path / "run/train.log").read_text()
    for line in ("train: 48 images", "val: 6 images", "test: 6 images", "cut from train by a hash of the file names"):
        assert line in log
    assert "test/AP" in json.loads((tmp_path / "run/results.json").read_text())


@pytest.mark.slow
def test_blood_cells_train_with_one_root(inside: Inside, tmp_path: Path, real_data: Callable[[str], Path]):
    small = ["model.width=32", "model.heads=2", "model.encoder_layers=1", "model.decoder_layers=1", *KEYS]
    root = f"data.root={real_data('bccd')}"
    inside("train", "model=detr", "data=coco", root, *small, "trainer.steps=2", "trainer.eval_every=2", "run_dir=run")
    log = (tmp_path / "run/train.log").read_text()
    assert "train: 205 images" in log and "val: 87 images" in log and "test: 72 images" in log
    assert "the layout of JSON files beside images/" in log
