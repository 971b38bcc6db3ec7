"""Published images reduced to means of blocks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from vit.data.downloads import Downloaded


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    def dataset(self: Downloaded, train: bool = True, download: bool = False) -> Any:
        count = 60 if train else 20
        return SimpleNamespace(data=torch.from_numpy(pixels(count)), targets=torch.arange(count) % 10)

    monkeypatch.setattr(Downloaded, "_torchvision_dataset", dataset)


def built(reduction: int, size: int) -> Downloaded:
    changes = [f"data.reduction={reduction}", f"data.image_size={size}", "data.val_count=10"]
    config = configure("train", ["model=vit", "data=fashion_mnist", *changes])
    data: Downloaded = build(config["data"])
    return data


def test_a_pixel_is_the_rounded_mean_of_its_block(published: None) -> None:
    images, labels = built(2, 14).load()["test"]
    original = pixels(20).astype(np.float64)
    means = original.reshape(20, 14, 2, 14, 2).mean((2, 4))
    assert images.shape == (20, 1, 14, 14) and images.dtype == torch.uint8 and len(labels) == 20
    assert np.array_equal(images[:, 0].numpy(), np.rint(means))
    assert {split: len(part[0]) for split, part in built(2, 14).load().items()} == {"train": 50, "val": 10, "test": 20}


def test_images_are_unchanged_without_a_reduction(published: None) -> None:
    assert np.array_equal(built(1, 28).load()["test"][0][:, 0].numpy(), pixels(20))


def test_a_users_image_is_reduced_in_the_same_way(published: None) -> None:
    data = built(2, 14)
    image = torch.from_numpy(pixels(20)[3]).expand(3, -1, -1)
    sample = data.view(image, Path("image.png"))
    difference = sample["image"].int() - data.load()["test"][0][3].int()
    assert difference.abs().max() <= 2, "grey values of a colour image are rounded down, and halves to even numbers"


def test_a_reduction_that_does_not_divide_the_side_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.reduction=3: expected a divisor of 28"):
        built(3, 9)
