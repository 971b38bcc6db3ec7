"""Image folders in ImageNet's layout, a folder for each class: root/train/<class>/<image>, val and test beside it."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.data.images import ENDINGS, read_image
from common.data.splits import val_of_train
from common.errors import UserError
from common.task import Batch, Split
from common.types import SPLITS, Count, Positive, PositiveFloat
from vit.data.augmentation import Augmentation, Interpolation, draw, finish, plain, shares, view
from vit.data.in_memory import pair
from vit.data.listing import Listing, class_folders, list_images_of


class ImageFolder:
    """A classification data set of image files, each in the folder of its class.

    `root` holds train/, val/ and test/, and each of them one folder for each class; images count however deep they
    lie there, names with a leading dot and files with other endings do not. Classes are the folders of train by name.
    Without root/test (ImageNet publishes no labels of its test set) root/val is `test`. Where there is no val, it is
    cut from train by a fixed seed. A split given by path wins over `root`. The constructor opens no file; a mistake in
    the files is a UserError at the first use of their split.

    A sample of `train` is one image in as many views as `augmentation.repeats` says, each augmented on its own
    (Hoffer et al. 2020, "Augment Your Batch", arXiv:1901.09335). When the augmentation mixes, a partner image out of
    all of train comes with it, in as many views. So a step is the same step however its batch is cut.

    Differs: images are turned upright as their EXIF tag says, where torchvision's ImageFolder shows them as stored.
    """

    channels = 3

    def __init__(
        self,
        *,
        root: str | None,
        train: str | None,
        val: str | None,
        test: str | None,
        val_count: Count,
        batch_size: Positive,
        image_size: Positive | tuple[Positive, Positive],
        crop_ratio: PositiveFloat,
        interpolation: Interpolation,
        mean: tuple[float, float, float],
        std: tuple[PositiveFloat, PositiveFloat, PositiveFloat],
        augmentation: Augmentation,
    ):
        """Describe the data set.

        Args:
            root: folder of the whole layout, or None.
            train: folder of the split to learn from.
            val: folder of the split that chooses the checkpoint.
            test: folder of the split that is reported.
            val_count: images to cut from train for val where there is no other val; 0 = no val.
            batch_size: views in one optimizer step; partners for mixing are not counted.
            image_size: height and width that the model takes, in pixels; one number for both.
            crop_ratio: share of the resized image that its centre crop keeps in evaluation, along its shorter side.
            interpolation: of every resize.
            mean: of red, green and blue in [0, 1], which normalising takes off.
            std: standard deviations of the same, which normalising divides by.
            augmentation: of training images.
        """
        augmentation.check(batch_size)
        if crop_ratio > 1:
            raise UserError(f"data.crop_ratio={crop_ratio}: expected at most 1, the whole image; 0.875 is ImageNet's.")
        self.root = root
        self.train = train
        self.val = val
        self.test = test
        self.val_count = val_count
        self.batch_size = batch_size
        self.image_size = pair(image_size)
        self.crop_ratio = crop_ratio
        self.interpolation = interpolation
        self.mean = mean
        self.std = std
        self.augmentation = augmentation
        self._found: dict[Split, Path] | None = None
        self._classes: list[str] = []
        self._listings: dict[Split, Listing] = {}

    def count(self, split: Split) -> int:
        """Number of images in `split`; 0 when there is no such val or test."""
        return len(self._listing(split).files) if self._has(split) else 0

    def cost(self, split: Split) -> Sequence[int]:
        """An image weighs 1, and in training as much as it has views."""
        return [self.augmentation.repeats if split == "train" else 1] * self.count(split)

    def classes(self) -> list[str]:
        """Names of the classes in the order of their indices.

        They are the folders of train; where train is not there (a machine that only evaluates), those of val and test.
        """
        if not self._classes:
            there = [folder for folder in self._folders().values() if folder.is_dir()]
            if self._folders().get("train") in there or not there:
                there = [self._demand("train")]
            self._classes = sorted({name for folder in there for name in class_folders(folder)})
        return self._classes

    def sample(self, split: Split, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """One image, augmented by `generator`; None means as it is evaluated.

        Returns id (its file within the split), file, label and views, a list of uint8 (3, H, W). With a generator also
        `uniforms` (views, U), the random numbers of each view, and when the augmentation mixes, the same of a partner:
        other_label, other_views and other_uniforms. Raises UserError when an image is broken.
        """
        sample = self._as_seen(split, index, generator)
        if generator is not None and self.augmentation.mixes:
            number = int(torch.randint(self.count(split), (), generator=generator))
            partner = self._as_seen(split, number, generator)
            sample |= {f"other_{key}": partner[key] for key in ("label", "views", "uniforms")}
        return sample

    def where(self, split: Split, index: int) -> str:
        """The file of an image, for messages."""
        listing = self._listing(split)
        return str(listing.folder / os.fsdecode(listing.files[index]))

    def view(self, image: Tensor, file: Path) -> dict[str, Any]:
        """A user's image, uint8 (3, h, w) of any size, as evaluated: a sample with its file as id and the label -1."""
        return {"id": str(file), "file": str(file), "label": -1, "views": [self._plain(image)]}

    def _as_seen(self, split: Split, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        listing = self._listing(split)
        file = listing.folder / os.fsdecode(listing.files[index])
        image = read_image(file)
        name = os.fsdecode(listing.files[index])  # within the split, which makes predictions readable
        sample: dict[str, Any] = {"id": name, "file": str(file), "label": int(listing.labels[index])}
        if generator is None:
            return sample | {"views": [self._plain(image)]}
        uniforms = draw(self.augmentation.repeats, generator)  # (views, U)
        views = [view(image, row, self.augmentation, self.image_size, self.interpolation) for row in uniforms]
        return sample | {"views": views, "uniforms": uniforms.numpy()}

    def _plain(self, image: Tensor) -> Tensor:
        return plain(image, self.image_size, self.crop_ratio, self.interpolation)

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """Samples to a batch of B views, those of one image side by side.

        Returns ids and files, lists of B with an entry for each view, images uint8 (N, 3, H, W) and labels int64 (B,),
        -1 where unknown. N is B. In training there is `uniforms`, an array (N, U), and when the augmentation mixes,
        N is 2B with the partner of image b at B + b, other_labels (B,) are the partners' labels, and shares (B,) says
        how much of each mixed image is its own.
        """
        views = [(sample, view) for sample in samples for view in sample["views"]]
        others = [(sample, view) for sample in samples for view in sample.get("other_views", ())]
        batch: Batch = {
            "ids": [sample["id"] for sample, _ in views],
            "files": [sample["file"] for sample, _ in views],
            "images": torch.stack([view for _, view in views + others]),
            "labels": torch.tensor([sample["label"] for sample, _ in views]),
        }
        if "uniforms" in samples[0]:
            keys = ("uniforms", "other_uniforms")
            # An array, which stays on the CPU: everything that is decided by it is decided there.
            batch["uniforms"] = np.concatenate([sample[key] for key in keys for sample in samples if key in sample])
        if others:
            batch["other_labels"] = torch.tensor([sample["other_label"] for sample, _ in others])
            batch["shares"] = shares(batch["uniforms"], self.augmentation, self.image_size)
        return batch

    def inputs(self, batch: Batch, device: torch.device) -> Tensor:
        """What the model takes: float (B, 3, H, W) on `device`, normalised, and in training erased and mixed."""
        return finish(batch["images"].to(device), batch.get("uniforms"), self.augmentation, self.mean, self.std)

    def thumbnails(self, batch: Batch, count: int) -> Tensor:
        """The first `count` images before normalising, erasing and mixing: uint8 (n, 3, H, W) on the CPU."""
        images: Tensor = batch["images"][: min(count, len(batch["ids"]))]
        return images.cpu()

    def summary(self) -> list[str]:
        """The number of classes, and a line for each split."""
        lines = [f"{len(self.classes())} classes"]
        for split in filter(self._has, SPLITS):
            listing = self._listing(split)
            others = f", {listing.others} other files left out" if listing.others else ""
            lines.append(f"{split}: {len(listing.files)} images of {listing.folder}{others}")
        return lines

    def _folders(self) -> dict[Split, Path]:
        """Where splits lie; val is missing here when it is cut from train."""
        if self._found is None:
            given = {"train": self.train, "val": self.val, "test": self.test}
            named = {split: Path(path) for split in SPLITS if (path := given[split]) is not None}
            layout = self._layout(taken={os.path.realpath(path) for path in named.values()})
            if "val" in layout and self.test is None and "test" not in layout:
                layout["test"] = layout.pop("val")
            self._found = {**layout, **named}
        return self._found

    def _layout(self, taken: set[str]) -> dict[Split, Path]:
        """The folders of splits in root, but for those that were `taken` by path: no image is both val and test."""
        if self.root is None:
            return {}
        if not os.path.isdir(self.root):
            raise UserError(f"The folder data.root={self.root} does not exist; mend its path.")
        folders = {split: Path(self.root, split) for split in SPLITS}
        return {s: folder for s, folder in folders.items() if folder.is_dir() and os.path.realpath(folder) not in taken}

    def _is_cut(self) -> bool:
        """Whether val is a part of train."""
        return "val" not in self._folders() and self.val_count > 0

    def _has(self, split: Split) -> bool:
        return split == "train" or split in self._folders() or (split == "val" and self._is_cut())

    def _demand(self, split: Split) -> Path:
        folder = self._folders().get(split)
        if folder is None and self.root is not None:
            raise UserError(
                f"There is no folder {split} in data.root={self.root}; expected {split}/<class>/<image> there, or the "
                f"folder of these images by data.{split}."
            )
        if folder is None:
            raise UserError(
                f"There are no {split} images: give data.root (a folder with {split}/<class>/<image>), or data.{split}."
            )
        return folder

    def _listing(self, split: Split) -> Listing:
        if split not in self._listings:
            if split == "test" or not self._is_cut():
                self._listings[split] = self._read(split)
            else:
                self._listings |= self._cut(self._read("train"))
        return self._listings[split]

    def _read(self, split: Split) -> Listing:
        folder = self._demand(split)
        names = class_folders(folder)
        classes = self.classes()
        index = {name: i for i, name in enumerate(classes)}
        unknown = [name for name in names if name not in index]
        if unknown:
            raise UserError(
                f"{folder / unknown[0]} is no class: the classes are the folders of {self._demand('train')}, and none "
                "has this name; rename it, remove it, or add the class there."
            )
        listing = list_images_of(folder, names, np.array([index[name] for name in names]))
        counts = np.bincount(listing.labels, minlength=len(classes))
        if split == "train" and not counts.all():
            raise UserError(
                f"The class folder {folder / classes[int(counts.argmin())]} holds no image "
                f"({', '.join(sorted(ENDINGS))}); put its images there, or remove it."
            )
        if not len(listing.files):
            raise UserError(
                f"The class folders of {folder} hold no image ({', '.join(sorted(ENDINGS))}); put the {split} images "
                "there, or remove the folder."
            )
        return listing

    def _cut(self, whole: Listing) -> dict[Split, Listing]:
        """Train and val out of one folder: the same cut for any seed of the run and any order of the file system."""
        own = "a folder of its own (data.val)"
        train, val = val_of_train(len(whole.files), self.val_count, str(whole.folder), own)
        parts: dict[Split, NDArray[np.int64]] = {"train": train, "val": val}
        return {split: replace(whole, files=whole.files[i], labels=whole.labels[i]) for split, i in parts.items()}
