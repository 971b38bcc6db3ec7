"""Small image sets that live in memory: uint8 on the device, where training images are augmented.

A batch carries row numbers and random numbers, never pixels, so nothing waits for a decoder or a copy.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from common.data.splits import parts
from common.errors import UserError
from common.task import Batch, Split
from common.types import SPLITS
from vit.data import augmentation
from vit.data.augmentation import Augmentation

Images = tuple[Tensor, Tensor]  # uint8 (n, C, h, w), int64 (n,)


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """One side of a square, or (height, width), as (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class InMemory(ABC):
    """Images of one size with labels. A set of this kind states its classes and channels, and how to load its splits.

    A sample of `train` is `augmentation.repeats` views of one image, and weighs as many; with mixing it holds as many
    of a partner that is drawn from all of `train`.
    """

    names: Sequence[str]  # of the classes
    channels: int

    def __init__(
        self,
        *,
        batch_size: int,
        image_size: int | tuple[int, int],
        mean: list[float],
        std: list[float],
        augmentation: Augmentation,
    ):
        augmentation.check(batch_size)
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != self.channels:
                raise UserError(f"data.{name}={values}: expected a list of {self.channels}, a number for each channel.")
        self.batch_size = batch_size
        self.image_size = pair(image_size)
        self.mean, self.std = mean, std
        self.augmentation = augmentation
        self._splits: dict[Split, Images] | None = None
        self._stores: dict[tuple[str, torch.device], Tensor] = {}

    @abstractmethod
    def load(self) -> dict[Split, Images]:
        """Train, val and test; called once. Raises UserError when the files are not there."""

    def classes(self) -> list[str]:
        """The classes' names in order of index."""
        return list(self.names)

    def count(self, split: Split) -> int:
        """Number of images in `split`."""
        return len(self._split(split)[1])

    def cost(self, split: Split) -> Sequence[int]:
        """A training image weighs as many as its views, any other 1."""
        return [self.augmentation.repeats if split == "train" else 1] * self.count(split)

    def sample(self, split: Split, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """Which image, and the random numbers of its views: rows and labels, its own and its partner's."""
        labels = self._split(split)[1]
        found: dict[str, Any] = {"split": split, "rows": [index], "labels": [int(labels[index])]}
        if generator is None:
            return found
        if self.augmentation.mixes:
            partner = int(torch.randint(len(labels), (), generator=generator))
            found = {"split": split, "rows": [index, partner], "labels": [int(labels[i]) for i in (index, partner)]}
        found["uniforms"] = augmentation.draw(self.augmentation.repeats * len(found["rows"]), generator)
        return found

    def view(self, image: Tensor, file: Path) -> dict[str, Any]:
        """A user's image, uint8 (3, H, W) of any size, as a sample without a label, as evaluated."""
        if self.channels == 1:
            image = functional.rgb_to_grayscale(image)
        return {"file": str(file), "image": augmentation.plain(image, self.image_size, 1.0, "bilinear")}

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """Samples to a batch: ids, labels (B,), and rows (N,) of the split, or the images themselves.

        In training all own views come first, then all partners' in the same order, with uniforms (N, UNIFORMS), which
        stay on the host; and with mixing other_labels (B,) and shares (B,) of the own label.
        """
        if "image" in samples[0]:
            files, images = [s["file"] for s in samples], torch.stack([s["image"] for s in samples])
            return {"ids": files, "files": files, "images": images, "labels": torch.full((len(samples),), -1)}
        split = samples[0]["split"]
        if "uniforms" not in samples[0]:
            rows, labels = (torch.tensor([s[key][0] for s in samples]) for key in ("rows", "labels"))
            return {"ids": rows.tolist(), "split": split, "rows": rows, "labels": labels}
        repeats, groups = self.augmentation.repeats, len(samples[0]["rows"])
        rows, labels = (
            torch.tensor([s[key] for s in samples]).T.repeat_interleave(repeats, dim=1)  # (1 or 2, B)
            for key in ("rows", "labels")
        )
        uniforms = torch.stack([s["uniforms"].unflatten(0, (groups, repeats)) for s in samples], dim=1)
        numbers: np.ndarray = uniforms.flatten(0, 2).numpy()  # (groups, n, repeats, U) -> (N, U)
        batch = {
            "ids": rows[0].tolist(),
            "split": split,
            "rows": rows.flatten(),
            "labels": labels[0],
            "uniforms": numbers,
        }
        if groups == 2:
            shares = augmentation.shares(numbers, self.augmentation, self.image_size)
            batch |= {"other_labels": labels[1], "shares": shares}
        return batch

    def inputs(self, batch: Batch, device: torch.device) -> Tensor:
        """What the network sees of a batch, computed on `device`: float (B, C, H, W), normalised, mixed in training."""
        images = batch["images"].to(device) if "images" in batch else self._stored(batch, device)
        uniforms = batch.get("uniforms")
        if uniforms is None:
            images = augmentation.plain(images, self.image_size, 1.0, "bilinear")
        else:
            images = augmentation.views(images, uniforms, self.augmentation, self.image_size)
        return augmentation.finish(images, uniforms, self.augmentation, self.mean, self.std)

    def thumbnails(self, batch: Batch, count: int) -> Tensor:
        """The first `count` images of an evaluation batch for people: uint8 (n, 3, H, W) on the CPU."""
        images = batch["images"] if "images" in batch else self._stored(batch, batch["rows"].device)
        images = augmentation.plain(images[:count].cpu(), self.image_size, 1.0, "bilinear")
        return images.expand(-1, 3, -1, -1)

    def summary(self) -> list[str]:
        """Sizes of the splits."""
        sizes = ", ".join(f"{split}: {self.count(split)}" for split in SPLITS)
        return [f"{len(self.names)} classes, images of {self.image_size[0]} x {self.image_size[1]}; {sizes}"]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stores": {}}  # the device's copies are not for worker processes

    def _split(self, split: Split) -> Images:
        if self._splits is None:
            self._splits = self.load()
        return self._splits[split]

    def _stored(self, batch: Batch, device: torch.device) -> Tensor:
        key = (batch["split"], device)
        if key not in self._stores:
            self._stores[key] = self._split(batch["split"])[0].to(device)
        return self._stores[key][batch["rows"].to(device)]


def cut(images: Tensor, labels: Tensor, counts: Sequence[int], what: str) -> list[Images]:
    """Cut a set into parts of so many images, and the rest first; the same cut for any seed of a run.

    The last part does not depend on how large the others are. Raises UserError when nothing is left.
    """
    if sum(counts) >= len(labels):
        raise UserError(f"{what} would leave nothing to train on of {len(labels)} images; give less.")
    rows = map(torch.from_numpy, parts((len(labels) - sum(counts), *counts), "parts"))
    return [(images[part], labels[part]) for part in rows]
