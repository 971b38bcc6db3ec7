"""The digits of scikit-learn: each in one of three fixed splits."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from common.config import check as config
from common.config import compose
from common.errors import UserError
from vit.data import digits as module
from vit.data.digits import Digits, read_digits


def digits(*overrides: str) -> Digits:
    """The default data set of `model=vit`."""
    section = compose.configure("train", ["model=vit", *overrides])["data"]
    built = config.build(section)
    assert isinstance(built, Digits)
    return built


def rows(data: Digits, split: str) -> list[tuple[int, ...]]:
    """Each image's pixels and label."""
    images, labels = data.load()[split]
    return [(*image.flatten().tolist(), int(label)) for image, label in zip(images, labels, strict=True)]


def test_every_digit_is_in_one_split() -> None:
    """Values 0 to 16 become 0 to 255. No two digits have the same pixels, so these identify them."""
    pixels, labels = load_digits(return_X_y=True)
    expected = [
        (*np.rint(image * 255 / 16).astype(int).tolist(), int(k)) for image, k in zip(pixels, labels, strict=True)
    ]
    data = digits()
    parts = {split: rows(data, split) for split in ("train", "val", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 1197, "val": 200, "test": 400}
    assert sorted(row for part in parts.values() for row in part) == sorted(expected)
    assert len({*expected}) == 1797
    assert [data.count(split) for split in ("train", "val", "test")] == [1197, 200, 400]


@pytest.mark.parametrize("file", [module.FILE, "missing.csv.gz"])
def test_the_digits_are_those_of_scikit_learn_wherever_its_file_is(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILE", file)
    for ours, theirs in zip(read_digits(), load_digits(return_X_y=True), strict=True):
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


def test_images_are_grey_of_eight_by_eight_with_ten_names() -> None:
    data = digits()
    images, labels = data.load()["test"]
    assert images.shape == (400, 1, 8, 8) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert images.min() == 0 and images.max() == 255
    assert data.classes() == list("0123456789") and data.channels == 1 and data.image_size == (8, 8)
    batch = data.collate([data.sample("test", i, None) for i in range(3)])
    assert data.inputs(batch, torch.device("cpu")).shape == (3, 1, 8, 8)


def test_the_splits_are_fixed_and_test_does_not_depend_on_val() -> None:
    torch.manual_seed(0)
    first = digits("seed=0")
    torch.manual_seed(1)
    second, larger = digits("seed=1"), digits("data.val_count=300")
    for split in ("train", "val", "test"):
        assert rows(first, split) == rows(second, split)
    assert rows(larger, "test") == rows(first, "test") and len(rows(larger, "val")) == 300


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_class_has_its_share_of_a_split(split: str) -> None:
    """Of 200 images 20 of each class are expected, with a standard deviation of 4."""
    _, labels = digits().load()[split]
    counts = labels.bincount(minlength=10)
    assert counts.min() > 0.5 * len(labels) / 10 and counts.max() < 1.5 * len(labels) / 10


def test_the_configs_mean_and_deviation_are_those_of_train() -> None:
    data = digits()
    pixels = data.load()["train"][0].double() / 255
    assert data.mean == [pytest.approx(pixels.mean().item(), abs=2e-3)]
    assert data.std == [pytest.approx(pixels.std().item(), abs=2e-3)]


def test_splits_that_leave_no_training_image_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"^data\.val_count and data\.test_count would leave nothing to train on: the set has 1797"
    ):
        digits("data.val_count=1000", "data.test_count=797").count("train")
