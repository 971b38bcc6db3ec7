"""Fashion-MNIST and CIFAR-10 as torchvision reads them: downloaded and verified by it, or found where they lie."""

from collections.abc import Callable
from typing import Any

import torch
from torchvision import datasets

from common import distributed
from common.errors import UserError
from common.task import Split
from common.types import Count, Positive, PositiveFloat
from vit.augmentation import Augmentation
from vit.in_memory import Images, InMemory, cut


class FashionMnist(InMemory):
    """Ten kinds of clothing in grey, 28 x 28 pixels (Xiao et al. 2017, arXiv 1708.07747).

    The published 10,000 test images are `test`; `val` is cut from the 60,000 of train.
    """

    names = datasets.FashionMNIST.classes
    channels = 1

    def __init__(
        self,
        *,
        root: str,
        val_count: Count,
        batch_size: Positive,
        image_size: Positive | tuple[Positive, Positive],
        mean: list[float],
        std: list[PositiveFloat],
        augmentation: Augmentation,
    ):
        super().__init__(batch_size=batch_size, image_size=image_size, mean=mean, std=std, augmentation=augmentation)
        self.root, self.val_count = root, val_count

    def load(self) -> dict[Split, Images]:
        """The three splits; `root` holds FashionMNIST/raw/ with the four files, unpacked or as .gz, or gets them."""
        train, test = _fetched(datasets.FashionMNIST, self.root, "FashionMNIST/raw/*-ubyte.gz")
        return _splits((train.data[:, None], train.targets), (test.data[:, None], test.targets), self.val_count)


class Cifar10(InMemory):
    """Ten kinds of animals and vehicles in colour, 32 x 32 pixels (Krizhevsky 2009).

    The published 10,000 test images are `test`; `val` is cut from the 50,000 of train.
    """

    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    channels = 3

    def __init__(
        self,
        *,
        root: str,
        val_count: Count,
        batch_size: Positive,
        image_size: Positive | tuple[Positive, Positive],
        mean: list[float],
        std: list[PositiveFloat],
        augmentation: Augmentation,
    ):
        super().__init__(batch_size=batch_size, image_size=image_size, mean=mean, std=std, augmentation=augmentation)
        self.root, self.val_count = root, val_count

    def load(self) -> dict[Split, Images]:
        """The three splits; `root` holds cifar-10-batches-py/ or cifar-10-python.tar.gz, or gets it."""
        train, test = _fetched(datasets.CIFAR10, self.root, "cifar-10-python.tar.gz")
        pairs = [(torch.from_numpy(s.data).permute(0, 3, 1, 2), torch.tensor(s.targets)) for s in (train, test)]
        return _splits(pairs[0], pairs[1], self.val_count)


def _fetched(kind: Callable[..., Any], root: str, file: str) -> tuple[Any, Any]:
    """torchvision's data set for train and for test; it checks MD5 sums, and downloads or unpacks what is missing.

    One process does that and the others wait for it.
    """
    if distributed.is_main():
        _opened(kind, root, file, download=True)
    distributed.barrier()
    return _opened(kind, root, file, train=True), _opened(kind, root, file, train=False)


def _opened(kind: Callable[..., Any], root: str, file: str, **keys: bool) -> Any:
    try:
        return kind(root, **keys)
    except Exception as error:  # what is raised differs between file systems, networks and proxies
        reason = " ".join(str(error).split()) or type(error).__name__  # torchvision's may have several lines
        raise UserError(
            f"data.root={root}: the files are not there, or not as published, and could not be downloaded or "
            f"unpacked ({reason}); put {file} there, without broken files beside it."
        ) from error


def _splits(train: Images, test: Images, val_count: int) -> dict[Split, Images]:
    rest, val = cut(*train, (val_count,), "data.val_count")
    return {"train": rest, "val": val, "test": (test[0].contiguous(), test[1])}
