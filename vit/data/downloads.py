"""Fashion-MNIST and CIFAR-10, which torchvision downloads, verifies and reads."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import datasets

from common.errors import UserError
from common.machine import distributed
from common.task import Split
from common.types import Count, Positive, PositiveFloat, Side
from vit.data.augmentation import Augmentation
from vit.data.in_memory import Images, InMemory, split_images


class PublishedSet(NamedTuple):
    """A published data set: torchvision's class for it, the names of its files, its channels and its classes."""

    dataset: Callable[..., Any]  # torchvision's class
    files: str  # for messages: the files to put into `root` when they cannot be downloaded
    any_file: str  # glob pattern, relative to `root`, that matches the set's archives and unpacked files
    channels: int
    side: int  # height and width of the images in pixels
    names: Sequence[str]  # names of the classes, by index


PUBLISHED_SETS = {
    # Xiao et al. 2017 (arXiv 1708.07747): clothing, 28 x 28 pixels, 60,000 training images
    "fashion_mnist": PublishedSet(
        datasets.FashionMNIST, "FashionMNIST/raw/*-ubyte.gz", "FashionMNIST/raw/*", 1, 28, datasets.FashionMNIST.classes
    ),
    # Krizhevsky 2009: animals and vehicles, 32 x 32 pixels, 50,000 training images
    "cifar10": PublishedSet(
        datasets.CIFAR10,
        "cifar-10-python.tar.gz",
        "cifar-10-*",
        3,
        32,
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
}


class Downloaded(InMemory):
    """A published data set of ten classes.

    `test` is the published test set of 10,000 images. `val` consists of `val_count` of the published training images,
    chosen at random. `train` consists of the other training images. The folder `root` holds the published files, packed
    or unpacked. Missing files are downloaded into it.

    With a `reduction` r above 1, the images' sides are divided by r: each pixel is the rounded mean of a block of r x r
    pixels. Raises UserError if the sides of the published images are not multiples of r.
    """

    def __init__(
        self,
        *,
        name: Literal["fashion_mnist", "cifar10"],
        root: str,
        val_count: Count,
        batch_size: Positive,
        image_size: Side | tuple[Side, Side],
        mean: list[float],
        std: list[PositiveFloat],
        augmentation: Augmentation,
        reduction: Positive = 1,  # with a default, since older configs of users lack it
    ):
        self.published = PUBLISHED_SETS[name]
        self.names, self.channels = self.published.names, self.published.channels
        super().__init__(batch_size=batch_size, image_size=image_size, mean=mean, std=std, augmentation=augmentation)
        self.root, self.val_count, self.reduction = root, val_count, reduction
        if self.published.side % reduction:
            raise UserError(
                f"data.reduction={reduction}: expected a divisor of {self.published.side}, the side of the published "
                "images in pixels."
            )

    def root_has_files(self) -> bool:
        """Whether `root` holds any file of this data set, packed or unpacked."""
        return any(Path(self.root).glob(self.published.any_file))

    def load(self) -> dict[Split, Images]:
        """Load the images and labels of train, val and test.

        On rank 0, torchvision first downloads and unpacks missing files, while the other ranks wait. torchvision checks
        the MD5 sums of the archives that it unpacks and of CIFAR-10's unpacked files, and replaces a file with a wrong
        sum. Raises UserError when a file cannot be downloaded, unpacked or read.
        """
        if distributed.is_main():
            self._torchvision_dataset(download=True)
        distributed.barrier()
        train, val = split_images(*_tensors(self._torchvision_dataset(train=True)), (self.val_count,), "data.val_count")
        splits: dict[Split, Images] = {"train": train, "val": val}
        splits["test"] = _tensors(self._torchvision_dataset(train=False))
        return {split: (_block_means(images, self.reduction), labels) for split, (images, labels) in splits.items()}

    def view(self, image: Tensor, file: Path) -> dict[str, Any]:
        """Make a sample from a user's image; see InMemory. The image is reduced like the images of the data set."""
        height, width = self.image_size
        larger = (height * self.reduction, width * self.reduction)
        sample = self._resized_view(image, file, larger)
        return {**sample, "image": _block_means(sample["image"][None], self.reduction)[0]}

    def _torchvision_dataset(self, **options: bool) -> Any:
        try:
            return self.published.dataset(self.root, **options)
        except Exception as error:  # the type depends on the file system, the network and the proxy
            reason = " ".join(str(error).split()) or type(error).__name__  # torchvision's message may have many lines
            raise UserError(
                f"data.root={self.root}: the files are missing, or not as published, and could not be downloaded or "
                f"unpacked ({reason}); put {self.published.files} there, and remove damaged files."
            ) from error


def _block_means(images: Tensor, side: int) -> Tensor:
    """Replace each block of side x side pixels by its rounded mean: uint8 (n, C, H, W) -> (n, C, H/side, W/side)."""
    if side == 1:
        return images
    return torch.cat([F.avg_pool2d(part.float(), side).round().to(torch.uint8) for part in images.split(10_000)])


def _tensors(dataset: Any) -> Images:
    images = torch.as_tensor(dataset.data)  # (n, H, W) or (n, H, W, 3)
    images = images.reshape(*images.shape[:3], -1).permute(0, 3, 1, 2)  # -> (n, C, H, W)
    return images.contiguous(), torch.as_tensor(dataset.targets)
