"""Small image sets that are held as uint8 in the device's memory and augmented there.

The images are copied to the device once, at their first use. A batch holds the indices of its images and the random
numbers of their augmentation instead of pixels, so later training steps neither decode nor copy images.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from common.data import fingerprints
from common.data.costs import equal_costs
from common.data.names import names_line
from common.data.splits import random_parts
from common.errors import UserError
from common.task import Batch, Costs, Split
from common.types import SPLITS
from vit.data import augmentation
from vit.data.augmentation import Augmentation

Images = tuple[Tensor, Tensor]  # images uint8 (n, C, h, w), labels int64 (n,)


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return a size as (height, width); a single number is the side of a square."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class InMemory(ABC):
    """A data set of images of one size with one label each. A subclass defines `names`, `channels` and `load`.

    A sample of train stands for `augmentation.repeats` views (augmented copies) of one image; its cost is this number
    of views. If the augmentation mixes images, the sample also stands for the same number of views of a partner, the
    image to mix with. The partner is drawn from all of train.
    """

    names: Sequence[str]  # names of the classes, by index
    channels: int  # 1 (grey) or 3 (RGB)

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
        self.image_size = height_and_width(image_size)
        self.mean, self.std = mean, std
        self.augmentation = augmentation
        self._splits: dict[Split, Images] | None = None
        self._device_images: dict[tuple[str, torch.device], Tensor] = {}

    @abstractmethod
    def load(self) -> dict[Split, Images]:
        """Load the images and labels of train, val and test; called once. Raises UserError when files are missing."""

    def classes(self) -> list[str]:
        """Return the names of the classes, by index."""
        return list(self.names)

    def count(self, split: Split) -> int:
        """Return the number of images in `split`."""
        return len(self._split(split)[1])

    def cost(self, split: Split) -> Costs:
        """Return the cost of each sample: its number of views in train, and 1 in other splits."""
        return equal_costs(self.augmentation.repeats if split == "train" else 1, self.count(split))

    def sample(self, split: Split, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """Return a dict with `split`, `rows` (a list with the image's index) and `labels` (a list with its label).

        With a generator, the sample also has `uniforms` (views, UNIFORMS_PER_VIEW), the random numbers of each view.
        With a generator and an augmentation that mixes images, the index and the label of a random partner are the
        second items of `rows` and `labels`. `uniforms` then holds the numbers of the image's views first and those of
        the partner's views after them.
        """
        labels = self._split(split)[1]
        sample: dict[str, Any] = {"split": split, "rows": [index], "labels": [int(labels[index])]}
        if generator is None:
            return sample
        if self.augmentation.mixes:
            partner = int(torch.randint(len(labels), (), generator=generator))
            sample = {"split": split, "rows": [index, partner], "labels": [int(labels[i]) for i in (index, partner)]}
        sample["uniforms"] = augmentation.sample_uniforms(self.augmentation.repeats * len(sample["rows"]), generator)
        return sample

    def fingerprint(self, split: Split) -> dict[str, str]:
        """Return two digests: "images", of the images' shape and pixels, and "labels", of the labels."""
        images, labels = self._split(split)
        shape = str(tuple(images.shape)).encode()
        return {
            "images": fingerprints.digest([shape, images.cpu().numpy()]),
            "labels": fingerprints.digest([labels.cpu().numpy().astype("<i8")]),
        }

    def view(self, image: Tensor, file: Path) -> dict[str, Any]:
        """Make a sample from a user's image, uint8 (3, h, w) of any size, resized and cropped as in evaluation.

        The sample has no label. The image becomes grey if the data set has one channel.
        """
        return self._resized_view(image, file, self.image_size)

    def _resized_view(self, image: Tensor, file: Path, size: tuple[int, int]) -> dict[str, Any]:
        if self.channels == 1:
            image = functional.rgb_to_grayscale(image)
        return {"file": str(file), "image": augmentation.evaluation_view(image, size, 1.0, "bilinear")}

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """Collate samples into a batch of B views: `ids`, `split`, `labels` int64 (B,) and `rows` int64 (N,).

        `rows` are the images' indices in the split. In training, the batch also has `uniforms` (N, UNIFORMS_PER_VIEW),
        a NumPy array.

        N is 2B in training if the augmentation mixes images, and otherwise B. If N is 2B, the views of the images come
        first, and those of their partners follow in the same order. The batch then also has `other_labels` (B,), the
        partners' labels, and `shares` (B,), from 0 to 1, the weights of the images' own labels in the targets.

        For a user's images, the batch has `images` uint8 (B, C, H, W) and `files` instead of `rows` and `split`; the
        labels are -1.
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
            shares = augmentation.label_shares(numbers, self.augmentation, self.image_size)
            batch |= {"other_labels": labels[1], "shares": shares}
        return batch

    def inputs(self, batch: Batch, device: torch.device) -> Tensor:
        """Compute the model's input on `device`: fp32 (B, C, H, W), normalised.

        In training, random erasing and mixing are also applied.
        """
        images = batch["images"].to(device) if "images" in batch else self._stored_images(batch, device)
        uniforms = batch.get("uniforms")
        if uniforms is None:
            images = augmentation.evaluation_view(images, self.image_size, 1.0, "bilinear")
        else:
            images = augmentation.views(images, uniforms, self.augmentation, self.image_size)
        return augmentation.model_inputs(images, uniforms, self.augmentation, self.mean, self.std)

    def thumbnails(self, batch: Batch, count: int) -> Tensor:
        """Return the first `count` images of a batch for display, not normalised: uint8 (n, 3, H, W) on the CPU."""
        images = batch["images"] if "images" in batch else self._stored_images(batch, batch["rows"].device)
        images = augmentation.evaluation_view(images[:count].cpu(), self.image_size, 1.0, "bilinear")
        return images.expand(-1, 3, -1, -1)

    def summary(self) -> list[str]:
        """Return two lines: first the numbers of classes and of images, and the image size; then the classes' names."""
        counts = ", ".join(f"{split}: {self.count(split)}" for split in SPLITS)
        return [
            f"{len(self.names)} classes, images of {self.image_size[0]} x {self.image_size[1]}; {counts}",
            names_line(self.names),
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_device_images": {}}  # worker processes need no copies on the device

    def _split(self, split: Split) -> Images:
        if self._splits is None:
            self._splits = self.load()
        return self._splits[split]

    def _stored_images(self, batch: Batch, device: torch.device) -> Tensor:
        key = (batch["split"], device)
        if key not in self._device_images:
            self._device_images[key] = self._split(batch["split"])[0].to(device)
        return self._device_images[key][batch["rows"].to(device)]


def split_images(images: Tensor, labels: Tensor, counts: Sequence[int], what: str) -> list[Images]:
    """Split off random parts of the images; each entry of `counts` is the number of images of one part.

    Returns the images and labels of the remainder first, and then those of each part. The split does not depend on the
    run's seed, and the last part does not depend on the other counts. Raises UserError when no image remains; `what`
    names the config keys of `counts` in the message.
    """
    if sum(counts) >= len(labels):
        raise UserError(f"{what} would leave nothing to train on: the set has {len(labels)} images; give less.")
    rows = map(torch.from_numpy, random_parts((len(labels) - sum(counts), *counts), "parts"))
    return [(images[part], labels[part]) for part in rows]
