"""Fashion-MNIST and CIFAR-10 as torchvision reads them: downloaded and verified by it, or found where they lie."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torchvision import datasets

from common.errors import UserError
from common.machine import distributed
from common.task import Split
from common.types import Count, Positive, PositiveFloat
from vit.data.augmentation import Augmentation
from vit.data.in_memory import Images, InMemory, cut


class Kind(NamedTuple):
    """A published set, and what is known of it before its files are read."""

    source: Callable[..., Any]
    files: str  # what has to lie in `root`, when there is no network
    channels: int
    names: Sequence[str]


KINDS = {
    # Xiao et al. 2017 (arXiv 1708.07747): clothing, 28 x 28, 60,000 for training
    "fashion_mnist": Kind(datasets.FashionMNIST, "FashionMNIST/raw/*-ubyte.gz", 1, datasets.FashionMNIST.classes),
    # Krizhevsky 2009: animals and vehicles, 32 x 32, 50,000 for training
    "cifar10": Kind(
        datasets.CIFAR10,
        "cifar-10-python.tar.gz",
        3,
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
}


class Downloaded(InMemory):
    """A set in ten classes. The published 10,000 test images are `test`; `val` is cut from the published train.

    `root` holds the published files, packed or unpacked, or gets them.
    """

    def __init__(
        self,
        *,
        name: Literal["fashion_mnist", "cifar10"],
        root: str,
        val_count: Count,
        batch_size: Positive,
        image_size: Positive | tuple[Positive, Positive],
        mean: list[float],
        std: list[PositiveFloat],
        augmentation: Augmentation,
    ):
        self.kind = KINDS[name]
        self.names, self.channels = self.kind.names, self.kind.channels
        super().__init__(batch_size=batch_size, image_size=image_size, mean=mean, std=std, augmentation=augmentation)
        self.root, self.val_count = root, val_count

    def load(self) -> dict[Split, Images]:
        """The three splits; torchvision checks MD5 sums, and downloads or unpacks what is missing.

        One process does that and the others wait for it.
        """
        if distributed.is_main():
            self._opened(download=True)
        distributed.barrier()
        train, val = cut(*_tensors(self._opened(train=True)), (self.val_count,), "data.val_count")
        return {"train": train, "val": val, "test": _tensors(self._opened(train=False))}

    def _opened(self, **keys: bool) -> Any:
        try:
            return self.kind.source(self.root, **keys)
        except Exception as error:  # what is raised differs between file systems, networks and proxies
            reason = " ".join(str(error).split()) or type(error).__name__  # torchvision's may have several lines
            raise UserError(
                f"data.root={self.root}: the files are not there, or not as published, and could not be downloaded or "
                f"unpacked ({reason}); put {self.kind.files} there, without broken files beside it."
            ) from error


def _tensors(found: Any) -> Images:
    images = torch.as_tensor(found.data)  # (n, H, W) or (n, H, W, 3)
    images = images.reshape(*images.shape[:3], -1).permute(0, 3, 1, 2)  # -> (n, C, H, W)
    return images.contiguous(), torch.as_tensor(found.targets)
