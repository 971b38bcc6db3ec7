"""The 1,797 handwritten digits that ship inside scikit-learn (Alpaydin and Kaynak 1998, UCI optdigits)."""

import torch
from sklearn.datasets import load_digits

from common.task import Split
from common.types import Positive, PositiveFloat, Side
from vit.data.augmentation import Augmentation
from vit.data.in_memory import Images, InMemory, split_images


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
        pixels, labels = load_digits(return_X_y=True)  # (1797, 64), values from 0 to 16
        images = torch.from_numpy(pixels).mul(255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
        counts = (self.val_count, self.test_count)
        train, val, test = split_images(images, torch.from_numpy(labels), counts, "data.val_count and data.test_count")
        return {"train": train, "val": val, "test": test}
