"""The 1,797 handwritten digits that ship inside scikit-learn (Alpaydin and Kaynak 1998, UCI optdigits)."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.task import Split
from common.types import Positive, PositiveFloat, Side
from vit.data.augmentation import Augmentation
from vit.data.in_memory import Images, InMemory, split_images

FILE = "datasets/data/digits.csv.gz"  # in the folder of scikit-learn


class Digits(InMemory):
    """Grey images of 8 x 8 pixels that show the digits 0 to 9. The splits do not depend on the run's seed."""

    names = tuple("0123456789")
    channels = 1

    def __init__(
        self,
        *,
        val_count: Positive,
        test_count: Positive,
        batch_size: Positive,
        image_size: Side | tuple[Side, Side],
        mean: list[float],
        std: list[PositiveFloat],
        augmentation: Augmentation,
    ):
        super().__init__(batch_size=batch_size, image_size=image_size, mean=mean, std=std, augmentation=augmentation)
        self.val_count, self.test_count = val_count, test_count

    def load(self) -> dict[Split, Images]:
        """Load the images and labels of train, val and test. Pixel values are scaled from 0..16 to 0..255."""
        pixels, labels = read_digits()
        images = torch.from_numpy(pixels).mul(255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
        counts = (self.val_count, self.test_count)
        train, val, test = split_images(images, torch.from_numpy(labels), counts, "data.val_count and data.test_count")
        return {"train": train, "val": val, "test": test}


def read_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Read the pixels (1797, 64), from 0 to 16, and the labels (1797,) of scikit-learn's `load_digits`.

    The file is read without importing scikit-learn, which takes a second. `load_digits` is called if scikit-learn does
    not have the file in its usual place.
    """
    package = importlib.util.find_spec("sklearn")
    folders = package.submodule_search_locations if package is not None else None
    file = Path(folders[0], FILE) if folders else None
    if file is None or not file.is_file():
        from sklearn.datasets import load_digits

        loaded: tuple[Any, Any] = load_digits(return_X_y=True)
        return loaded
    table = np.loadtxt(file, delimiter=",", dtype=np.float64)  # (1797, 65), the label last
    return table[:, :-1], table[:, -1].astype(np.int64)
