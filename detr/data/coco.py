"""Detection data in COCO's format (Lin et al. 2014, arXiv:1405.0312), in a folder of a known layout or at any paths."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from common.data import fingerprints
from common.data.costs import equal_costs
from common.data.images import Exif, range_notes, read_image
from common.data.names import names_line
from common.data.opening import read_json
from common.task import Batch, Costs, Split
from common.types import SPLITS, Positive, Range
from detr.data import annotations, notes
from detr.data.arrays import SplitArrays, build_arrays, decode, find_files
from detr.data.cuts import cut_train
from detr.data.header_sizes import HeaderSizes
from detr.data.samples import collate, make_sample
from detr.data.sources import Files as Files
from detr.data.sources import SplitSources
from detr.data.target_masks import TargetMasks, encode_masks
from detr.data.transforms import Augmentation


@dataclass(kw_only=True, eq=False)
class Coco(SplitSources):
    """A detection data set in COCO's format, with any set of category ids.

    `SplitSources` finds the files of the splits. The classes are the categories of the train JSON, sorted by id. If the
    train JSON does not exist, another split's JSON is used instead.

    Training targets are the boxes clipped to their image, without crowds and boxes without area; `summary` counts what
    was clipped or left out. The ground truth for evaluation keeps every annotation. The constructor opens no file. An
    invalid file raises UserError when its split is first used.

    Args:
        batch_size: images in one optimizer step.
        augmentation: options of resizing, flips and crops.
        pad_to: the height and width of a batch are padded to multiples of this number of pixels. A compiled model then
            sees fewer shapes and is recompiled less often. Padding changes outputs only with model.official_padding.
        cache: whether each worker keeps decoded images in memory, for small data sets.
        exif: whether images are turned upright by their EXIF tags: "apply" (always), "ignore" (never) or "auto". With
            "auto", an image is turned only if the JSON has the size of the upright image and the stored image has
            another size; see `common.data.images.read_image`.
    """

    batch_size: Positive
    augmentation: Augmentation
    pad_to: Annotated[int, Range(low=1, high=4096)]
    cache: bool
    exif: Exif = "auto"  # it has a default, because users' older config files lack it

    def __post_init__(self) -> None:
        """Raise UserError for a split that has only one of its two paths."""
        super().__post_init__()
        self._arrays_by_split: dict[str, SplitArrays] = {}
        self._categories: list[dict[str, Any]] = []
        self._ground_truths: dict[str, bytes] = {}
        self._size_notes: dict[Split, list[str]] = {}  # on sizes that were missing, by the split that has the files
        self._decoded: dict[tuple[str, int], Tensor] = {}
        self._has_masks = False
        self._masks: dict[str, TargetMasks] = {}  # by split; empty without `request_masks`

    def request_masks(self) -> None:
        """Add `masks` to the samples from now on; a task that reads masks calls this in its constructor.

        Invalid masks raise UserError when their split is first used.
        """
        self._has_masks = True
        self._arrays_by_split.clear()  # so that the masks of splits that have been read are read, too

    def count(self, split: Split) -> int:
        """Return the number of images in `split`; 0 if there is no such split."""
        return len(self._arrays(split).ids) if self._has_split(split) else 0

    def cost(self, split: Split) -> Costs:
        """Return the cost of each image, which is 1."""
        return equal_costs(1, self.count(split))

    def categories(self) -> list[dict[str, Any]]:
        """Return the classes as {"id", "name"}, in the order of class indices; with "isthing" if the file has it."""
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
        masks: bool (n, h, w), True in the object of each box; only after `request_masks`.

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
        masks = self._masks[split].read(index) if self._has_masks else None
        return make_sample(int(arrays.ids[index]), file, image, boxes, labels, masks, self.augmentation, generator)

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
        boxes, labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
        return make_sample(0, file, image, boxes, labels, None, self.augmentation, None)

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """Collate samples into a batch with the keys of `detr.data.samples.collate`."""
        return collate(samples, self.pad_to)

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
        lines += self._masks[split].notes if self._has_masks else []
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

    def read_annotations(self, split: Split) -> Any:
        """Read the COCO JSON of `split` without checking it."""
        return read_json(self._required_files(split)[1])

    def target_masks(self, split: Split, coco_json: annotations.CocoJson, arrays: SplitArrays) -> TargetMasks:
        """Return the masks of the targets `arrays`, which were made from `coco_json`, a part of the JSON of `split`.

        Raises UserError if a mask is missing or invalid. Subclasses for other formats override this method.
        """
        return encode_masks(coco_json, arrays, self._required_files(split)[1])

    def digest_annotations(self, split: Split) -> str:
        """Return the digest of the annotations of `split`."""
        return fingerprints.digest_file(self._required_files(split)[1])

    def file_notes(self, split: Split) -> list[str]:
        """Return lines for the summary: how the files of `split` were read, and what was left out.

        The list is empty in this class. Subclasses for other formats override this method.
        """
        return []

    def _file(self, split: Split, index: int) -> Path:
        name: bytes = self._arrays(split).files[index]
        return self._required_files(split)[0] / decode(name)

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
                arrays = find_files(build_arrays(selected, self.categories(), path), folder)
                if self._has_masks:
                    self._masks[name] = self.target_masks(split, selected, arrays)
                self._arrays_by_split[name] = arrays
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
