"""Fashion-MNIST and CIFAR-10, read by torchvision, which verifies their files and downloads missing ones."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torchvision import datasets

from common.errors import UserError
from common.machine import distributed
from common.task import Split
from common.types import Count, Positive, PositiveFloat, Side
from vit.data.augmentation import Augmentation
from vit.data.in_memory import Images, InMemory, split_images


class PublishedSet(NamedTuple):
    """A published data set, and the facts that must be known before its files are read."""

    dataset: Callable[..., Any]  # torchvision's class
    files: str  # which files `root` must hold when there is no network
    any_file: str  # the pattern of all its files, packed or unpacked
    channels: int
    names: Sequence[str]  # of the classes, by index


PUBLISHED_SETS = {
    # Xiao et al. 2017 (arXiv 1708.07747): clothing, 28 x 28, 60,000 for training
    "fashion_mnist": PublishedSet(
        datasets.FashionMNIST, "FashionMNIST/raw/*-ubyte.gz", "FashionMNIST/raw/*", 1, datasets.FashionMNIST.classes
    ),
    # Krizhevsky 2009: animals and vehicles, 32 x 32, 50,000 for training
    "cifar10": PublishedSet(
        datasets.CIFAR10,
        "cifar-10-python.tar.gz",
        "cifar-10-*",
        3,
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
}


class Downloaded(InMemory):
    """A data set of ten classes. The 10,000 published test images are `test`; `val` is split off the training images.

    `root` holds the published files, packed or unpacked; missing files are downloaded into it.
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
    ):
        self.published = PUBLISHED_SETS[name]
        self.names, self.channels = self.published.names, self.published.channels
        super().__init__(batch_size=batch_size, image_size=image_size, mean=mean, std=std, augmentation=augmentation)
        self.root, self.val_count = root, val_count

    def root_has_files(self) -> bool:
        """Whether `root` holds a file of this set, packed or unpacked."""
        return any(Path(self.root).glob(self.published.any_file))

    def load(self) -> dict[Split, Images]:
        """Load the three splits.

        Rank 0 lets torchvision check MD5 sums and download or unpack missing files; the other ranks wait for it. Raises
        UserError when files are missing, damaged or cannot be downloaded.
        """
        if distributed.is_main():
            self._torchvision_dataset(download=True)
        distributed.barrier()
        train, val = split_images(*_tensors(self._torchvision_dataset(train=True)), (self.val_count,), "data.val_count")
        return {"train": train, "val": val, "test": _tensors(self._torchvision_dataset(train=False))}

    def _torchvision_dataset(self, **options: bool) -> Any:
        try:
            return self.published.dataset(self.root, **options)
        except Exception as error:  # the type differs between file systems, networks and proxies
            reason = " ".join(str(error).split()) or type(error).__name__  # torchvision's message may have many lines
            raise UserError(
                f"data.root={self.root}: the files are missing, or not as published, and could not be downloaded or "
                f"unpacked ({reason}); put {self.published.files} there, and remove damaged files."
            ) from error


def _tensors(dataset: Any) -> Images:
    images = torch.as_tensor(dataset.data)  # (n, H, W) or (n, H, W, 3)
    images = images.reshape(*images.shape[:3], -1).permute(0, 3, 1, 2)  # -> (n, C, H, W)
    return images.contiguous(), torch.as_tensor(dataset.targets)
