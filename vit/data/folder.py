"""A data set of images with one folder for each class: root/<split>/<class>/<image>, or root/<class>/<image>."""

import os
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from common.data import fingerprints
from common.data.costs import equal_costs
from common.data.images import IMAGE_SUFFIXES, Exif, range_notes, read_image
from common.data.names import composed, names_line
from common.errors import UserError
from common.task import Batch, Costs, Split
from common.types import SPLITS, Count, Positive, PositiveFloat, Range, Share, Side
from vit.data.augmentation import (
    Augmentation,
    Interpolation,
    evaluation_view,
    label_shares,
    model_inputs,
    sample_uniforms,
    view,
)
from vit.data.classes import ClassOrder, check_distinct, order_notes, sort_classes
from vit.data.cuts import Cuts
from vit.data.folder_advice import absent_classes, class_counts, depth_advice, refuse_split_names
from vit.data.in_memory import height_and_width
from vit.data.layouts import SplitFolders, find_folders, missing_folder
from vit.data.listing import Listing, class_folders, list_class_images


class ImageFolder:
    """A classification data set of image files, each in the folder of its class.

    The folder `root` holds train/, val/ and test/, and each of these holds one folder for each class. Alternatively,
    `root` holds the class folders directly and is itself the folder of train. `vit.data.layouts` lists other names of
    the split folders and explains how ambiguous folders are read. A class folder holds images at any depth. Hidden
    files and folders, and files without an image's extension, are ignored. The classes are the class folders of train,
    sorted by name.

    A folder given by `train`, `val` or `test` takes precedence over `root`. If there is no folder for test, root/val is
    used as test, because ImageNet publishes no labels of its test set. If there is then no folder for val, val is cut
    from train (`vit.data.cuts`). If `test` is not given and `root` has neither a test nor a val folder, the share
    `test_share` of each class of train is cut as test, provided that train is read from `root`.

    The constructor opens no file. Mistakes in the folders of a split raise UserError when the split is first used. A
    broken image raises UserError when it is read.

    A sample of train is `augmentation.repeats` views of one image. Each view is an augmented copy with its own random
    choices (Hoffer et al. 2020, "Augment Your Batch", arXiv:1901.09335). If the augmentation mixes images, the sample
    also holds the same number of views of a partner, the image to mix with. The partner is drawn from all of train and
    not from the batch, so that a step does not depend on how it is split into micro-batches.

    Differs: images are rotated and mirrored as their EXIF tag says, unless `exif` is "ignore". torchvision's
    ImageFolder reads them as stored.
    """

    channels = 3

    def __init__(
        self,
        *,
        root: str | None,
        train: str | None,
        val: str | None,
        test: str | None,
        val_count: Count | None,
        batch_size: Positive,
        image_size: Side | tuple[Side, Side],
        crop_ratio: Annotated[float, Range(low=0.01, high=100.0)],
        interpolation: Interpolation,
        mean: tuple[float, float, float],
        std: tuple[PositiveFloat, PositiveFloat, PositiveFloat],
        augmentation: Augmentation,
        exif: Exif = "auto",  # keys from here on have defaults, since older configs of users lack them
        class_order: ClassOrder = "string",
        val_share: Share | None = None,
        test_share: Share = 0.0,
        cache: bool = False,
    ):
        """Store the options; no file is opened.

        Args:
            root: folder that holds the folders of all splits or of all classes; None = only the folders `train`, `val`
                and `test` are read.
            train: folder of the training split; None = found in `root`.
            val: folder of the split that selects the checkpoint; None = found in `root`, or cut from train.
            test: folder of the split on which the final metrics are reported; None = found in `root`, or cut from
                train.
            val_count: number of images to cut from train as val, chosen at random, if no folder is used as val; 0 = no
                val, None = `val_share` decides.
            batch_size: number of views in one optimizer step, over all ranks; views of partners are not counted.
            image_size: height and width of the model's input in pixels; one number for a square.
            crop_ratio: in evaluation, an image is resized to cover `image_size` / `crop_ratio`, and a centre crop of
                `image_size` is taken; from 0.01 to 1.
            interpolation: method of every resize, "bilinear" or "bicubic".
            mean: means of red, green and blue in [0, 1], for normalisation.
            std: standard deviations of red, green and blue in [0, 1], for normalisation.
            augmentation: augmentation of training images.
            exif: whether images are turned upright by their EXIF tags: "apply" and "auto" turn them, "ignore" does not.
            class_order: order of the classes' names: "string" (1, 10, 2, as in torchvision) or "natural" (1, 2, 10).
            val_share: share of each class of train to cut as val, by a hash of the file names, if no folder is used as
                val and `val_count` is None; 0 = no val, None = 0.1, or 10,000 images chosen at random if train has at
                least 100,000 images.
            test_share: share of each class of train to cut as test, by a hash of the file names, if train is read from
                `root` and no folder is used as test; 0 = no test.
            cache: whether each worker keeps images in memory, resized to `image_size`, so that it decodes each file
                only once.

        Raises UserError when `crop_ratio` is above 1, when `augmentation.repeats` is above `batch_size`, or when
        `cache` is set and the augmentation crops from images of full size (crop=resized).
        """
        augmentation.check(batch_size)
        if cache and augmentation.crop == "resized":
            raise UserError(
                "data.cache=true keeps images at data.image_size, but data.augmentation.crop=resized crops from images "
                "of full size; give data.augmentation.crop=padded or none, or data.cache=false."
            )
        if crop_ratio > 1:
            raise UserError(f"data.crop_ratio={crop_ratio}: expected at most 1, the whole image; 0.875 is ImageNet's.")
        self.root = root
        self.train = train
        self.val = val
        self.test = test
        self.val_count, self.val_share, self.test_share = val_count, val_share, test_share
        self.batch_size = batch_size
        self.image_size = height_and_width(image_size)
        self.crop_ratio = crop_ratio
        self.interpolation = interpolation
        self.mean = mean
        self.std = std
        self.augmentation = augmentation
        self.exif = exif
        self.class_order = class_order
        self._classes: list[str] = []
        self._learnt: list[str] = []
        self.cache = cache
        self._listings: dict[Split, Listing] = {}
        self._cached: dict[tuple[Split, int, float], Tensor] = {}
        self._cuts = Cuts(val_count=val_count, val_share=val_share, test_share=test_share)
        self._cut_notes: dict[Split, str] = {}

    def count(self, split: Split) -> int:
        """Return the number of images in `split`; 0 for a val or test split that does not exist."""
        return len(self._listing(split).files) if self._has(split) else 0

    def cost(self, split: Split) -> Costs:
        """Return the cost of each sample: its number of views in train, and 1 in other splits."""
        return equal_costs(self.augmentation.repeats if split == "train" else 1, self.count(split))

    def classes(self) -> list[str]:
        """Return the names of the classes, by index.

        They are the names of the class folders of train. If train is missing, as on a machine that only evaluates, they
        are the names of the class folders of val and test. Val and test may lack some classes of the trained model.
        Therefore, if all of their names are among those passed to `set_learnt_classes`, the names passed there are
        returned.
        """
        if not self._classes:
            folders = [folder for folder in self._folders.values() if folder.is_dir()]
            if self._folders.get("train") in folders or not folders:
                folders = [self._required_folder("train")]
            by_text = {composed(name): name for folder in reversed(folders) for name in class_folders(folder)}
            self._classes = sort_classes(by_text.values(), self.class_order)
            if self._folders.get("train") in folders:
                check_distinct(class_folders(folders[0]), str(folders[0]))
                refuse_split_names(self._classes, folders[0])
            elif by_text.keys() <= {composed(name) for name in self._learnt}:
                self._classes = self._learnt  # val and test may lack folders of some classes
        return self._classes

    def set_learnt_classes(self, names: Sequence[str]) -> None:
        """Set the classes of a trained model.

        `classes` returns them if the folder of train is missing and the folders of val and test have no other classes.
        """
        self._learnt, self._classes, self._listings = list(names), [], {}

    def sample(self, split: Split, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """Read one image, and augment it at random with `generator`; with None, resize and crop it as in evaluation.

        Returns `id` (the file's path relative to the split's folder), `file` (its full path), `label` (the class index)
        and `views`, a list of uint8 (3, H, W). With a generator, the sample also has `uniforms` (views,
        UNIFORMS_PER_VIEW), the random numbers of each view. If the augmentation mixes images, it then also has the
        label, views and random numbers of a partner: `other_label`, `other_views`, `other_uniforms`. Raises UserError
        for a missing or broken image.
        """
        sample = self._own_views(split, index, generator)
        if generator is not None and self.augmentation.mixes:
            number = int(torch.randint(self.count(split), (), generator=generator))
            partner = self._own_views(split, number, generator)
            sample |= {f"other_{key}": partner[key] for key in ("label", "views", "uniforms")}
        return sample

    def where(self, split: Split, index: int) -> str:
        """Return the path of an image's file, for messages."""
        return str(self._file(split, index))

    def _file(self, split: Split, index: int) -> Path:
        listing = self._listing(split)
        return listing.folder / os.fsdecode(listing.files[index])

    def fingerprint(self, split: Split) -> dict[str, str]:
        """Return one digest, "images".

        It is computed from the images' paths relative to the split's folder and from the lengths of the files in bytes.
        """
        listing = self._listing(split)
        return {"images": fingerprints.digest_files(listing.folder, listing.files)}

    def view(self, image: Tensor, file: Path) -> dict[str, Any]:
        """Make a sample from a user's image, uint8 (3, h, w) of any size, resized and cropped as in evaluation.

        `file` becomes the sample's id. The label is -1, since the true class is unknown.
        """
        views = [evaluation_view(image, self.image_size, self.crop_ratio, self.interpolation)]
        return {"id": str(file), "file": str(file), "label": -1, "views": views}

    def _own_views(self, split: Split, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        listing = self._listing(split)
        name = os.fsdecode(listing.files[index])  # relative to the split's folder; a full path would be hard to read
        file = self._file(split, index)
        sample: dict[str, Any] = {"id": name, "file": str(file), "label": int(listing.labels[index])}
        if generator is None:
            return sample | {"views": [self._resized(split, index, self.crop_ratio)]}
        crops = self.augmentation.crop == "resized"
        image = read_image(file, exif=self.exif) if crops else self._resized(split, index, 1.0)
        uniforms = sample_uniforms(self.augmentation.repeats, generator)  # (views, U)
        views = [view(image, row, self.augmentation, self.image_size, self.interpolation) for row in uniforms]
        return sample | {"views": views, "uniforms": uniforms.numpy()}

    def _resized(self, split: Split, index: int, crop_ratio: float) -> Tensor:
        """Read an image, resize and crop it as in evaluation, and keep it in memory if `cache` is set."""
        key = (split, index, crop_ratio)
        if key in self._cached:
            return self._cached[key]
        image = read_image(self._file(split, index), exif=self.exif)
        image = evaluation_view(image, self.image_size, crop_ratio, self.interpolation)
        if self.cache:
            # Without the copy, the cropped image would be a view that keeps the whole resized image in memory.
            self._cached[key] = image.clone(memory_format=torch.contiguous_format)
        return image

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """Collate samples into a batch of B views, in which the views of one image are adjacent.

        Returns `ids` and `files`, lists of length B, `images` uint8 (N, 3, H, W) and `labels` int64 (B,), -1 for a
        user's image. In training, the batch also has `uniforms` (N, UNIFORMS_PER_VIEW), a NumPy array.

        N is 2B in training if the augmentation mixes images, and otherwise B. If N is 2B, image B + b is the partner of
        image b. The batch then also has `other_labels` (B,), the partners' labels, and `shares` (B,), from 0 to 1, the
        weights of the images' own labels in the targets.
        """
        views = [(sample, view) for sample in samples for view in sample["views"]]
        partners = [(sample, view) for sample in samples for view in sample.get("other_views", ())]
        batch: Batch = {
            "ids": [sample["id"] for sample, _ in views],
            "files": [sample["file"] for sample, _ in views],
            "images": torch.stack([view for _, view in views + partners]),
            "labels": torch.tensor([sample["label"] for sample, _ in views]),
        }
        if "uniforms" in samples[0]:
            keys = ("uniforms", "other_uniforms")
            # A NumPy array, since a tensor would be moved to the device; the numbers are used on the host.
            batch["uniforms"] = np.concatenate([sample[key] for key in keys for sample in samples if key in sample])
        if partners:
            batch["other_labels"] = torch.tensor([sample["other_label"] for sample, _ in partners])
            batch["shares"] = label_shares(batch["uniforms"], self.augmentation, self.image_size)
        return batch

    def inputs(self, batch: Batch, device: torch.device) -> Tensor:
        """Compute the model's input on `device`: fp32 (B, 3, H, W), normalised.

        In training, random erasing and mixing are also applied.
        """
        return model_inputs(batch["images"].to(device), batch.get("uniforms"), self.augmentation, self.mean, self.std)

    def thumbnails(self, batch: Batch, count: int) -> Tensor:
        """Return the first `count` images of a batch for display, not normalised: uint8 (n, 3, H, W) on the CPU."""
        images: Tensor = batch["images"][: min(count, len(batch["ids"]))]
        return images.cpu()

    def summary(self) -> list[str]:
        """Return lines on how `root` was read, on the number and names of classes, and on the images of each split."""
        lines = [*self._layout.notes, f"{len(self.classes())} classes", names_line(self.classes())]
        if not all(name.isdecimal() for name in self.classes()):  # if all are numbers, `advice` warns
            lines += order_notes(self.classes())
        return [*lines, *(line for split in filter(self._has, SPLITS) for line in self.split_summary(split))]

    def split_summary(self, split: Split) -> list[str]:
        """Return the lines of `summary` that are about one split."""
        listing = self._listing(split)
        ignored = f", {listing.other_files} other files ignored" if listing.other_files else ""
        cut = f", cut from train {self._cut_notes[split]}" if split in self._cut_notes else ""
        counts = np.bincount(listing.labels, minlength=len(self.classes())).tolist()
        lines = [f"{len(listing.files)} images of {listing.folder}{cut}{ignored}", class_counts(self.classes(), counts)]
        lines += absent_classes(self.classes(), counts)
        lines += range_notes(len(listing.files), partial(self._file, split))
        return [f"{split}: {line}" for line in lines]

    def class_notes(self) -> list[str]:
        """Return the classes' names by index, and a note if sorting by the numbers in them would give another order."""
        return [names_line(self.classes()), *order_notes(self.classes())]

    def advice(self, split: Split) -> list[str]:
        """Return warnings about the folders of `split`.

        For train, there are also warnings if class folders seem to be one level too high or too low, and if all class
        names are numbers but are not sorted by value.
        """
        warnings = self._layout.warnings.get(split, [])
        if split != "train":
            return warnings
        order = order_notes(self.classes()) if all(name.isdecimal() for name in self.classes()) else []
        return [*warnings, *depth_advice(self.classes(), self._listing("train")), *order]

    @cached_property
    def _layout(self) -> SplitFolders:
        arguments: dict[Split, str | None] = {"train": self.train, "val": self.val, "test": self.test}
        by_path = {split: Path(path) for split, path in arguments.items() if path is not None}
        return find_folders(self.root, by_path)

    @property
    def _folders(self) -> dict[Split, Path]:
        """The folder of each split, by split. Splits without a folder are absent."""
        return self._layout.folders

    def _is_cut(self, split: Split) -> bool:
        """Whether `split` is cut from train."""
        if split == "train" or split in self._folders:
            return False
        if split == "val":
            return self._cuts.has_val
        return self.test_share > 0 and self.root is not None and self.train is None

    def _has(self, split: Split) -> bool:
        return split == "train" or split in self._folders or self._is_cut(split)

    def _required_folder(self, split: Split) -> Path:
        """Return the folder of a split; raises UserError if it has none."""
        folder = self._folders.get(split)
        if folder is None and self.root is not None:
            raise UserError(missing_folder(self.root, split, self._layout.unread))
        if folder is None:
            raise UserError(
                f"There are no {split} images: give data.root (a folder with {split}/<class>/<image>), or data.{split}."
            )
        return folder

    def _listing(self, split: Split) -> Listing:
        if split not in self._listings:
            cut = [name for name in SPLITS if self._is_cut(name)]
            if cut and split in ("train", *cut):
                listings, self._cut_notes = self._cuts.cut(self._read("train"), cut)
                self._listings |= listings
            else:
                self._listings[split] = self._read(split)
        return self._listings[split]

    def _read(self, split: Split) -> Listing:
        folder = self._required_folder(split)
        names = class_folders(folder)
        classes = self.classes()
        index = {composed(name): i for i, name in enumerate(classes)}
        unknown = [name for name in names if composed(name) not in index]
        if unknown:
            raise UserError(
                f"{folder / unknown[0]} is no class: the classes are the folders of {self._required_folder('train')}, "
                "and none has this name; rename or remove it, or add the class to train."
            )
        listing = list_class_images(folder, names, np.array([index[composed(name)] for name in names]))
        counts = np.bincount(listing.labels, minlength=len(classes))
        if split == "train" and not counts.all():
            raise UserError(
                f"The class folder {folder / classes[int(counts.argmin())]} holds no image "
                f"({', '.join(sorted(IMAGE_SUFFIXES))}); put its images there, or remove it."
            )
        if not len(listing.files):
            raise UserError(
                f"The class folders of {folder} hold no image ({', '.join(sorted(IMAGE_SUFFIXES))}); put the {split} "
                "images there, or remove the folder."
            )
        return listing
