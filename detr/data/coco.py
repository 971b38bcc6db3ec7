"""Detection data in COCO's format (Lin et al. 2014, arXiv:1405.0312), in the official layout or with any paths."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from common.data import fingerprints
from common.data.images import Exif, hides_orientation, range_notes, read_image
from common.data.splits import split_off_val
from common.errors import UserError
from common.task import Batch, Split
from common.types import SPLITS, Count, Positive, Range
from detr.data import annotations
from detr.data.arrays import SplitArrays, build_arrays, decode, find_files
from detr.data.transforms import Augmentation, as_bounding_boxes, augment

MAX_ORIENTATION_FILES = 4000  # of a split, whose EXIF tags are read at the start; takes seconds on a slow drive

NO_OBJECTS: dict[Split, str] = {  # warnings about a split without any target box
    "train": "there is no box to learn from (no annotations, or only crowds and boxes without area), so the model can "
    'learn nothing but "no object"; correct data.train.annotations',
    "val": "there is no object to find (no annotations, or only crowds and boxes without area), so its AP is -1 or 0 "
    "and cannot select a checkpoint; correct data.val.annotations",
    "test": "there is no object to find (no annotations, or only crowds and boxes without area), so its AP is -1 or 0; "
    "correct data.test.annotations",
}


@dataclass(frozen=True, kw_only=True)
class Files:
    """The paths of one split; give both or neither."""

    images: str | None  # folder that holds the files named by "file_name" in the JSON
    annotations: str | None  # COCO instances JSON


@dataclass(kw_only=True, eq=False)
class Coco:
    """A detection data set in COCO's format, with any set of category ids.

    `root` has the official layout: train2017/, val2017/ and annotations/instances_{train,val}2017.json. No labelled
    test set is published, so val2017 serves as `test`, and `val` is split off train2017 with a fixed seed. A split with
    paths of its own does not use `root`. The classes are the categories of the train JSON, sorted by id.

    Crowds and boxes without area are no targets, and targets are clipped to the image; `summary` counts both. The
    ground truth for evaluation keeps every annotation. The constructor opens no file; an invalid file raises UserError
    when its split is first used.

    Args:
        root: folder in the official layout, or None.
        train: the split for training.
        val: the split that selects the checkpoint.
        test: the split for the reported numbers.
        val_count: number of images to split off train as val if `val` has no paths; 0 = no val.
        batch_size: images in one optimizer step.
        augmentation: sizes, flips and crops.
        pad_to: the height and width of a batch are padded to multiples of this, so that a compiled model meets fewer
            shapes and is recompiled less often; padding changes outputs only with model.official_padding.
        cache: keep decoded images in the memory of each worker, for small sets.
        exif: whether images are turned upright by their EXIF tags: "apply", "ignore", or "auto", which turns an image
            only if the JSON has the size of the upright and not of the stored image; see
            `common.data.images.read_image`.
    """

    root: str | None
    train: Files
    val: Files
    test: Files
    val_count: Count
    batch_size: Positive
    augmentation: Augmentation
    pad_to: Annotated[int, Range(low=1, high=4096)]
    cache: bool
    exif: Exif = "auto"  # has a default, since users' yaml files and subclasses may be older than this key

    def __post_init__(self) -> None:
        """Raise UserError for a split with only one of its two keys."""
        for name, files in (("train", self.train), ("val", self.val), ("test", self.test)):
            if (files.images is None) != (files.annotations is None):
                raise UserError(f"data.{name}.images and data.{name}.annotations go together; give both or neither.")
        self._arrays_by_split: dict[str, SplitArrays] = {}
        self._categories: list[dict[str, Any]] = []
        self._ground_truths: dict[str, bytes] = {}
        self._decoded: dict[tuple[str, int], Tensor] = {}

    def count(self, split: Split) -> int:
        """Number of images in `split`; 0 if there is no such split."""
        return len(self._arrays(split).ids) if self._has_split(split) else 0

    def cost(self, split: Split) -> Sequence[int]:
        """The cost of each image, always 1."""
        return [1] * self.count(split)

    def categories(self) -> list[dict[str, Any]]:
        """The classes as {"id", "name"}, in the order of class indices."""
        if not self._categories:
            self.prepare()
            paths = [files[1] for files in map(self._split_files, SPLITS) if files is not None]
            paths = paths or [self._required_files("train")[1]]
            # A machine for evaluation may hold only val2017; without the train JSON, that of another split is read.
            path = next((path for path in paths if path.exists()), paths[0])
            self._categories = annotations.categories(annotations.load(path, labelled=False))
        return self._categories

    def ground_truth(self, split: Split) -> dict[str, Any]:
        """The COCO JSON of this split's images, with crowds and degenerate boxes.

        Each annotation has a usable `area` and `iscrowd`. There is no key "annotations" if the JSON of `test` has none.
        """
        if split not in self._ground_truths:
            ids = self._arrays(split).ids.tolist()
            coco_json = annotations.select(self._load(split), ids)
            coco_json = annotations.complete(coco_json)
            self._ground_truths[split] = json.dumps(coco_json).encode()  # workers would copy a million small objects
        truth: dict[str, Any] = json.loads(self._ground_truths[split])
        return truth

    def sample(self, split: Split, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """One image with its targets, augmented at random by `generator`; with None, only resized as in evaluation.

        Returns id, file, image uint8 (3, h, w), original_size (H, W) of the file, boxes float32 (n, 4) xyxy in pixels
        of the returned image, labels int64 (n,) class indices. Raises UserError when the image cannot be decoded or
        its size differs from that in the JSON.
        """
        arrays, file = self._arrays(split), self._file(split, index)
        height, width = arrays.sizes[index].tolist()
        image = self._decoded.get((split, index))
        if image is None:
            image = read_image(file, (height, width), self.exif)
            if self.cache:
                self._decoded[split, index] = image
        objects = slice(arrays.starts[index], arrays.starts[index + 1])
        boxes, labels = torch.from_numpy(arrays.boxes[objects]), torch.from_numpy(arrays.labels[objects])
        return self._make_sample(int(arrays.ids[index]), file, image, boxes, labels, generator)

    def where(self, split: Split, index: int) -> str:
        """The path of an image, for messages."""
        return str(self._file(split, index))

    def fingerprint(self, split: Split) -> dict[str, str]:
        """Digests of the JSON's content, and of the names and lengths in bytes of the image files."""
        folder, path = self._required_files(split)
        images = fingerprints.digest_files(folder, self._arrays(split).files)
        return {"annotations": fingerprints.digest_file(path), "images": images}

    def view(self, image: Tensor, file: Path) -> dict[str, Any]:
        """Make a sample without targets, with id 0, from a user's image uint8 (3, H, W), resized as in evaluation."""
        return self._make_sample(0, file, image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), None)

    def _make_sample(
        self,
        number: int,
        file: Path,
        image: Tensor,
        boxes: Tensor,
        labels: Tensor,
        generator: torch.Generator | None,
    ) -> dict[str, Any]:
        original_size = tuple(image.shape[1:])
        image, augmented_boxes, labels = augment(
            image, as_bounding_boxes(image, boxes), labels, self.augmentation, generator
        )
        return {
            "id": number,
            "file": str(file),
            "image": image,
            "original_size": original_size,
            "boxes": augmented_boxes.as_subclass(Tensor),
            "labels": labels,
        }

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """Collate samples; images are padded with zeros at the bottom and right to one size, multiples of `pad_to`.

        Returns ids, files, images uint8 (B, 3, H, W), sizes (B, 2) without padding, original_sizes (B, 2), boxes
        (T, 4) and labels (T,) of all images concatenated, counts (the number of boxes of each image), and padded, a
        bool: whether any image has padding.
        """
        sizes = torch.tensor([sample["image"].shape[1:] for sample in samples])  # (B, 2)
        height, width = (-(-length // self.pad_to) * self.pad_to for length in sizes.amax(dim=0).tolist())
        images = torch.empty(
            len(samples), 3, height, width, dtype=torch.uint8, memory_format=torch.channels_last
        ).zero_()
        for image, sample in zip(images, samples, strict=True):
            image[:, : sample["image"].shape[1], : sample["image"].shape[2]] = sample["image"]
        return {
            "ids": [sample["id"] for sample in samples],
            "files": [sample["file"] for sample in samples],
            "images": images,
            "sizes": sizes,
            "padded": bool((sizes != torch.tensor([height, width])).any()),
            "original_sizes": torch.tensor([sample["original_size"] for sample in samples]),
            "boxes": torch.cat([sample["boxes"] for sample in samples]),
            "labels": torch.cat([sample["labels"] for sample in samples]),
            "counts": [len(sample["labels"]) for sample in samples],
        }

    def summary(self) -> list[str]:
        """Lines for the start of a run: the number of classes, and for each split its images, boxes and notes."""
        lines = [f"{len(self.categories())} classes"]
        for split in filter(self._has_split, SPLITS):
            arrays = self._arrays(split)
            boxes = f"{len(arrays.labels)} boxes" if arrays.labelled else "no annotations (there will be no numbers)"
            lines.append(f"{split}: {len(arrays.ids)} images, {boxes} of {self._required_files(split)[1]}")
            about_images = (*self._hidden_orientations(split), *self._ranges(split))
            notes = (*arrays.notes, *self._classes_without_boxes(split), *about_images)
            lines += [f"{split}: {note}" for note in notes]
        return lines

    def advice(self, queries: int) -> list[str]:
        """Warnings about the annotations for a detector with `queries` queries, one sentence each."""
        splits = [split for split in SPLITS if self._has_split(split) and self._arrays(split).labelled]
        return [f"{split}: {doubt}." for split in splits for doubt in self._doubts(split, queries)]

    def _doubts(self, split: Split, queries: int) -> list[str]:
        arrays = self._arrays(split)
        doubts = list(arrays.doubts)
        if not len(arrays.labels):
            doubts.append(NO_OBJECTS[split])
        counts = np.diff(arrays.starts)  # (N,) objects of each image
        if excess := int((counts > queries).sum()):
            worst = int(counts.argmax())
            doubts.append(
                f"{excess} of {len(counts)} images have more objects than the model has queries ({queries}), at most "
                f"{counts[worst]} in {self._file(split, worst)}; the surplus is neither learnt nor detected, so raise "
                "model.queries"
            )
        return doubts

    def _classes_without_boxes(self, split: Split) -> list[str]:
        """For train, a note on the classes without any box; nothing for other splits."""
        used = set(self._arrays(split).labels.tolist())
        unused = [f"{c['name']} (id {c['id']})" for i, c in enumerate(self.categories()) if i not in used]
        if split != "train" or not used or not unused:
            return []
        more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
        return [
            f"{len(unused)} of {len(self.categories())} classes have no box and will not be learnt: "
            f"{', '.join(unused[:5])}{more}"
        ]

    def _ranges(self, split: Split) -> list[str]:
        """A note on grey images with more than 8 bits or floats, from a sample of the split's images."""
        if getattr(self, "drawn", False):
            return []
        return range_notes(self.count(split), partial(self._file, split))

    def _hidden_orientations(self, split: Split) -> list[str]:
        """A note on images of equal size stored and upright: their boxes may belong to either of the two."""
        count = self.count(split)
        if self.exif != "auto" or getattr(self, "drawn", False):
            return []
        looked_at = range(0, count, -(-count // MAX_ORIENTATION_FILES))
        files = [self._file(split, index) for index in looked_at]
        with ThreadPoolExecutor(8) as threads:  # a network drive serves several requests at once
            hidden = [file for file, hides in zip(files, threads.map(hides_orientation, files), strict=True) if hides]
        if not hidden:
            return []
        sampled = "" if len(files) == count else "sampled "
        return [
            f"{len(hidden)} of {len(files)} {sampled}images are turned by EXIF without a change of their size (180 "
            f"degrees, mirrored or square; the first is {hidden[0]}): they are read as stored; if their boxes were "
            "drawn on the upright picture, give data.exif=apply, otherwise data.exif=ignore"
        ]

    def prepare(self) -> None:
        """Called before a file is opened; a subclass may generate the files here."""

    def _split_files(self, split: Split) -> tuple[Path, Path] | None:
        """The folder of images and the JSON of a split, or None."""
        files = {"train": self.train, "val": self.val, "test": self.test}[split]
        if files.images is not None and files.annotations is not None:
            return Path(files.images), Path(files.annotations)
        if split == "val":
            return self._split_files("train") if self.val_count else None
        if self.root is None:
            return None
        official = "train2017" if split == "train" else "val2017"
        return Path(self.root) / official, Path(self.root) / "annotations" / f"instances_{official}.json"

    def _file(self, split: Split, index: int) -> Path:
        name: bytes = self._arrays(split).files[index]
        return self._required_files(split)[0] / decode(name)

    def _has_split(self, split: Split) -> bool:
        return split == "train" or self._split_files(split) is not None

    def _required_files(self, split: Split) -> tuple[Path, Path]:
        files = self._split_files(split)
        if files is None:
            raise UserError(
                f"There are no {split} images: give data.root (a folder in COCO's layout), or data.{split}.images and "
                f"data.{split}.annotations."
            )
        return files

    def _arrays(self, split: Split) -> SplitArrays:
        if split not in self._arrays_by_split:
            self.prepare()
            folder, path = self._required_files(split)
            coco_json = self._load(split)
            if split == "train" and not self._categories:
                self._categories = annotations.categories(coco_json)
            ids = [image["id"] for image in coco_json["images"]]
            splits: dict[str, list[int]] = {split: ids}
            if split != "test" and self.val.images is None and self.val_count:
                splits = self._split_train_val(ids, path)
            for name, split_ids in splits.items():
                selected = annotations.select(coco_json, split_ids)
                self._arrays_by_split[name] = find_files(build_arrays(selected, self.categories(), path), folder)
        return self._arrays_by_split[split]

    def _load(self, split: Split) -> annotations.CocoJson:
        """Read the JSON of `split`. That of `test` may lack annotations, since a server can evaluate the results."""
        return annotations.load(self._required_files(split)[1], labelled=split != "test")

    def _split_train_val(self, ids: list[int], path: Path) -> dict[str, list[int]]:
        """Split one file into train and val, independently of the run's seed and of the file's order."""
        alternative = "files of its own (data.val.images, data.val.annotations)"
        train, val = split_off_val(len(ids), self.val_count, str(path), alternative)
        ids = sorted(ids)
        return {"train": [ids[i] for i in train], "val": [ids[i] for i in val]}
