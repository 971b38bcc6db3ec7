"""Detection data in COCO's format (Lin et al. 2014, arXiv:1405.0312), in a folder of a known layout or at any paths."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from common.data import fingerprints
from common.data.images import Exif, range_notes, read_image
from common.data.names import names_line
from common.data.opening import read_json
from common.errors import UserError
from common.task import Batch, Split
from common.types import SPLITS, Count, Positive, Range, Share
from detr.data import annotations, notes
from detr.data.arrays import SplitArrays, build_arrays, decode, find_files
from detr.data.cuts import cut_train
from detr.data.header_sizes import HeaderSizes
from detr.data.layouts import LAYOUTS, Layout, find_layout
from detr.data.transforms import Augmentation, as_bounding_boxes, augment

COCO_2017_VAL_COUNT = 2000  # images of train2017 that are cut as val, which selects the best checkpoint
VAL_SHARE = 0.1  # share of train's images that is cut as val in any other data set


@dataclass(frozen=True, kw_only=True)
class Files:
    """The paths of one split: both are given, or both are None."""

    images: str | None  # folder that holds the files named by "file_name" in the JSON
    annotations: str | None  # COCO instances JSON


@dataclass(kw_only=True, eq=False)
class Coco:
    """A detection data set in COCO's format, with any set of category ids.

    The files of a split are those at the split's own paths if they are given, and otherwise those in `root`. For COCO
    2017, val2017 serves as `test`, because no labelled test set is published. If val has no files, its images are taken
    from train (see `val_count` and `val_share`). If test has no files, its images are taken from train, provided that
    `test_share` is above 0 and the files of train are in `root`. Which images are taken does not depend on the run's
    seed. The classes are the categories of the train JSON, sorted by id. If the train JSON does not exist, another
    split's JSON is used instead.

    Training targets are the boxes clipped to their image, without crowds and boxes without area; `summary` counts what
    was clipped or left out. The ground truth for evaluation keeps every annotation. The constructor opens no file. An
    invalid file raises UserError when its split is first used.

    Args:
        root: folder in one of the layouts of `detr.data.layouts`; None if the splits have paths of their own.
        train: paths of the split for training.
        val: paths of the split that selects the best checkpoint.
        test: paths of the split for the reported metrics.
        val_count: number of images to cut from train as val, at random, if val has no files. 0 = no val; None =
            `val_share` decides.
        batch_size: images in one optimizer step.
        augmentation: options of resizing, flips and crops.
        pad_to: the height and width of a batch are padded to multiples of this number of pixels. A compiled model then
            sees fewer shapes and is recompiled less often. Padding changes outputs only with model.official_padding.
        cache: whether each worker keeps decoded images in memory, for small data sets.
        exif: whether images are turned upright by their EXIF tags: "apply" (always), "ignore" (never) or "auto". With
            "auto", an image is turned only if the JSON has the size of the upright image and the stored image has
            another size; see `common.data.images.read_image`.
        val_share: share of train's images to cut as val, by a hash of their names, if val has no files and `val_count`
            is None. 0 = no val. If `val_count` and `val_share` are None, val gets 2,000 random images of COCO 2017, or
            a tenth of the images of any other data set.
        test_share: share of train's images to cut as test, by a hash of their names, if test has no files and train is
            in `root`. 0 = no test.
    """

    layouts: ClassVar[str] = LAYOUTS  # of `root`, for messages

    root: str | None
    train: Files
    val: Files
    test: Files
    val_count: Count | None
    batch_size: Positive
    augmentation: Augmentation
    pad_to: Annotated[int, Range(low=1, high=4096)]
    cache: bool
    exif: Exif = "auto"  # this and the next keys have defaults, because users' older config files lack them
    val_share: Share | None = None
    test_share: Share = 0.0

    def __post_init__(self) -> None:
        """Raise UserError for a split that has only one of its two paths."""
        for name, files in (("train", self.train), ("val", self.val), ("test", self.test)):
            if (files.images is None) != (files.annotations is None):
                raise UserError(f"data.{name}.images and data.{name}.annotations go together; give both or neither.")
        self._arrays_by_split: dict[str, SplitArrays] = {}
        self._categories: list[dict[str, Any]] = []
        self._ground_truths: dict[str, bytes] = {}
        self._size_notes: dict[Split, list[str]] = {}  # on sizes that were missing, by the split that has the files
        self._decoded: dict[tuple[str, int], Tensor] = {}

    def count(self, split: Split) -> int:
        """Return the number of images in `split`; 0 if there is no such split."""
        return len(self._arrays(split).ids) if self._has_split(split) else 0

    def cost(self, split: Split) -> Sequence[int]:
        """Return the cost of each image, which is 1."""
        return [1] * self.count(split)

    def categories(self) -> list[dict[str, Any]]:
        """Return the classes as {"id", "name"}, in the order of class indices."""
        if not self._categories:
            self.prepare()
            # A machine for evaluation may hold only val2017. If the train JSON is missing, another split's is read.
            split: Split = next(filter(self._has_labels, SPLITS), "train")
            path = self._required_files(split)[1]
            unread = (1, 1)  # replaces missing sizes, because sizes are not used here
            coco_json = annotations.check(
                self.read_annotations(split), path, labelled=False, read_size=lambda _: unread
            )
            self._categories = annotations.categories(coco_json)
        return self._categories

    def ground_truth(self, split: Split) -> dict[str, Any]:
        """Return the COCO JSON of this split's images, including crowds and degenerate boxes.

        Each annotation has `iscrowd` and `area` as set by `annotations.complete`. For `test`, the key "annotations" is
        missing if the JSON file lacks it.
        """
        if split not in self._ground_truths:
            ids = self._arrays(split).ids.tolist()
            coco_json = annotations.select(self._load(split), ids)
            coco_json = annotations.complete(coco_json)
            # Stored as bytes, because forked workers would copy a million small objects.
            self._ground_truths[split] = json.dumps(coco_json).encode()
        truth: dict[str, Any] = json.loads(self._ground_truths[split])
        return truth

    def sample(self, split: Split, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """Return one image with its targets, augmented at random; if `generator` is None, it is only resized.

        The returned dict has these keys:

        id: the id of the image in the JSON.
        file: the path of the image.
        image: uint8 (3, h, w).
        original_size: height and width (H, W) of the image before augmentation, after any turning by EXIF.
        boxes: float32 (n, 4) xyxy in pixels of `image`.
        labels: int64 (n,) class indices.

        Raises UserError when the image cannot be decoded or its size differs from that in the JSON.
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
        """Return the path of an image, for messages."""
        return str(self._file(split, index))

    def fingerprint(self, split: Split) -> dict[str, str]:
        """Return two digests by name.

        "annotations" is the digest of the annotations. "images" is the digest of the names and lengths in bytes of the
        image files, which are not opened.
        """
        folder = self._required_files(split)[0]
        images = fingerprints.digest_files(folder, self._arrays(split).files)
        return {"annotations": self.digest_annotations(split), "images": images}

    def view(self, image: Tensor, file: Path) -> dict[str, Any]:
        """Make a sample from a user's image uint8 (3, H, W), with id 0 and without targets.

        The image is resized as in evaluation.
        """
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
        """Collate samples; images are padded with zeros at the bottom and right to a common size.

        The common height H and width W are multiples of `pad_to`. The returned dict has these keys:

        ids, files: lists of the images' ids and paths.
        images: uint8 (B, 3, H, W).
        sizes: (B, 2) heights and widths without padding.
        original_sizes: (B, 2) heights and widths before resizing.
        boxes: (T, 4) xyxy in pixels of the resized images; the boxes of all images, concatenated.
        labels: (T,) class indices of the boxes.
        counts: a list of the number of boxes of each image.
        padded: whether any image has padding.
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
        """Return lines for the start of a run: the classes, and the images, boxes and notes of each split."""
        splits = filter(self._has_split, SPLITS)
        names = [category["name"] for category in self.categories()]
        of_splits = [line for s in splits for line in self.split_summary(s) if line not in self._repeated_lines(s)]
        root = [f"data.root={self.root}: the layout of {self._layout.name}"] if self._uses_root() else []
        return [*root, f"{len(names)} classes", names_line(names), *of_splits]

    def _repeated_lines(self, split: Split) -> set[str]:
        """Return the lines on `split` that `summary` omits, because they repeat lines on train.

        These are the notes on the files, if `split` is cut from train. Otherwise there are no such lines.
        """
        return {f"{split}: {note}" for note in self._all_file_notes(split)} if self._is_cut(split) else set()

    def _all_file_notes(self, split: Split) -> list[str]:
        return [*self.file_notes(split), *self._size_notes.get(self._owner(split), [])]

    def split_summary(self, split: Split) -> list[str]:
        """Return the lines of `summary` on one split."""
        arrays = self._arrays(split)
        boxes = f"{len(arrays.labels)} boxes" if arrays.labelled else "no annotations (there will be no numbers)"
        lines = [f"{len(arrays.ids)} images, {boxes} of {self._required_files(split)[1]}", *arrays.notes]
        lines += self._all_file_notes(split)
        lines += [self._describe_cut(split)] if self._is_cut(split) else []
        if split == "train":
            lines += notes.classes_without_boxes(arrays.labels, self.categories())
        file = partial(self._file, split)
        if not getattr(self, "drawn", False):
            lines += notes.hidden_orientations(len(arrays.ids), file) if self.exif == "auto" else []
            lines += range_notes(len(arrays.ids), file)
        return [f"{split}: {line}" for line in lines]

    def advice(self, split: Split) -> list[str]:
        """Return warnings about the annotations of `split`, one sentence each.

        The list is empty if there is no such split, or if its JSON has no key "annotations". Images of val or test that
        are also in train are reported only if train has been read, as it is in training.
        """
        if not self._has_split(split) or not self._arrays(split).labelled:
            return []
        doubts = notes.doubts(split, self._arrays(split))
        train = self._arrays_by_split.get("train")
        if train and split != "train" and self._required_files(split)[0] == self._required_files("train")[0]:
            doubts += notes.images_of_train(self._arrays(split), train)
        return [f"{split}: {doubt}." for doubt in doubts]

    def query_advice(self, split: Split, queries: int) -> list[str]:
        """Return a warning if images of `split` have more objects than a detector has queries; otherwise nothing."""
        if not self._has_split(split):
            return []
        warnings = notes.more_objects_than_queries(self._arrays(split), queries, partial(self._file, split))
        return [f"{split}: {warning}." for warning in warnings]

    def prepare(self) -> None:
        """Do nothing; a subclass may generate its files here. This method is called before any file is opened."""

    def find_layout(self, root: Path) -> Layout:
        """Find the files of the splits in `root`.

        A subclass for another format overrides this method, `read_annotations`, `digest_annotations` and `file_notes`.
        """
        return find_layout(root)

    def read_annotations(self, split: Split) -> Any:
        """Read the COCO JSON of `split` without checking it."""
        return read_json(self._required_files(split)[1])

    def digest_annotations(self, split: Split) -> str:
        """Return the digest of the annotations of `split`."""
        return fingerprints.digest_file(self._required_files(split)[1])

    def file_notes(self, split: Split) -> list[str]:
        """Return lines for the summary: how the files of `split` were read, and what was left out.

        The list is empty in this class. Subclasses for other formats override this method.
        """
        return []

    def _split_files(self, split: Split) -> tuple[Path, Path] | None:
        """Return the folder of images and the JSON of a split; None if there are no files.

        A split that is cut from train has the folder and the JSON of train.
        """
        files = {"train": self.train, "val": self.val, "test": self.test}[split]
        if files.images is not None and files.annotations is not None:
            return Path(files.images), Path(files.annotations)
        if self.root is not None and (paths := self._layout.files.get(split)):
            return paths
        return self._split_files("train") if self._is_cut(split) else None

    @cached_property
    def _layout(self) -> Layout:
        assert self.root is not None
        return self.find_layout(Path(self.root))

    def _uses_root(self) -> bool:
        """Whether train or test is looked up in `root`, because it has no paths of its own."""
        return self.root is not None and (self.train.images is None or self.test.images is None)

    def _is_cut(self, split: Split) -> bool:
        """Whether `split` has no files and is cut from train."""
        if split == "train" or {"val": self.val, "test": self.test}[split].images is not None:
            return False
        if self.root is not None and split in self._layout.files:
            return False
        if split == "val":
            return self._val_count() != 0
        return self.test_share > 0 and self.root is not None and self.train.images is None

    def _val_count(self) -> int | None:
        """Return the number of images to cut from train as val; None if `_val_share` determines this number."""
        if self.val_count is not None:
            return self.val_count
        if self.val_share is not None:
            return None if self.val_share else 0
        official = self.root is not None and self.train.images is None and self._layout.official
        return COCO_2017_VAL_COUNT if official else None

    def _val_share(self) -> float:
        return VAL_SHARE if self.val_share is None else self.val_share

    def _describe_cut(self, split: Split) -> str:
        if split == "val" and (count := self._val_count()) is not None:
            return f"cut from train at random (data.val_count={count})"
        share = self._val_share() if split == "val" else self.test_share
        return f"cut from train by a hash of the file names (data.{split}_share={share})"

    def _file(self, split: Split, index: int) -> Path:
        name: bytes = self._arrays(split).files[index]
        return self._required_files(split)[0] / decode(name)

    def _has_split(self, split: Split) -> bool:
        return split == "train" or self._split_files(split) is not None

    def _has_labels(self, split: Split) -> bool:
        files = self._split_files(split)
        return files is not None and files[1].exists()

    def _owner(self, split: Split) -> Split:
        """Return the split that has the files of `split`: train if `split` is cut from it."""
        return "train" if self._is_cut(split) else split

    def _required_files(self, split: Split) -> tuple[Path, Path]:
        files = self._split_files(split)
        if self.root is not None and files == self._layout.files.get(split) and not self._layout.recognised:
            is_folder = Path(self.root).is_dir()
            if is_folder or files is None:
                raise UserError(
                    f"data.root={self.root} {'has none' if is_folder else 'is no folder with one'} of the layouts "
                    f"{self.layouts}; give such a folder, or data.{split}.images and data.{split}.annotations, or the "
                    "format that the data have (data=coco, voc, yolo or csv)."
                )
        if files is None:
            raise UserError(
                f"There are no {split} images: give data.root (a folder with {self.layouts}), or data.{split}.images "
                f"and data.{split}.annotations."
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
            cut = [name for name in SPLITS if self._is_cut(name)]
            if cut and split in ("train", *cut):
                shares = {"test": self.test_share, "val": self._val_share()}
                shares = {name: share for name, share in shares.items() if name in cut}
                splits = cut_train(coco_json["images"], shares, self._val_count() if "val" in cut else None, path)
            for name, split_ids in splits.items():
                selected = annotations.select(coco_json, split_ids)
                self._arrays_by_split[name] = find_files(build_arrays(selected, self.categories(), path), folder)
        return self._arrays_by_split[split]

    def _load(self, split: Split) -> annotations.CocoJson:
        """Read and check the JSON of `split`.

        The JSON of `test` may lack "annotations", because predictions can be evaluated on a server. But if test is cut
        from train, "annotations" is required.
        """
        folder, path = self._required_files(split)
        sizes = HeaderSizes(annotations=path, folder=folder, exif=self.exif)
        labelled = split != "test" or self._is_cut("test")
        coco_json = annotations.check(self.read_annotations(split), path, labelled=labelled, read_size=sizes.read)
        self._size_notes[self._owner(split)] = sizes.notes()
        return coco_json
