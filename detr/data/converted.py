"""The base class of detection data sets in other formats than COCO's. Annotations are converted to COCO's JSON."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from common.data import fingerprints
from common.data.images import IMAGE_SUFFIXES, UNSUPPORTED_SUFFIXES
from common.data.names import composed
from common.errors import UserError
from common.types import SPLITS, Split
from detr.data.annotations import CocoJson
from detr.data.coco import Coco

SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {  # names of a split's folder, file or YAML key
    "train": ("train",),
    "val": ("valid", "val", "validation"),
    "test": ("test",),
}


class Box(NamedTuple):
    """One annotated object of an image."""

    image: int  # position in `Labels.images`
    name: str  # the name of its class
    xywh: Sequence[float]  # left, top, width, height in pixels
    origin: str  # where it is annotated, for messages, such as "a.xml, object 2" or "line 7"
    is_crowd: bool = False  # a crowd is no training target, and evaluation ignores detections that match it


@dataclass(kw_only=True)
class Labels:
    """The images and boxes of one split as its files state them, before they are converted to COCO's JSON."""

    images: list[tuple[str, Any, Any]] = field(default_factory=list)  # file name; height, width in pixels, 0 if unknown
    boxes: list[Box] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # for the summary: how the files were read, and what was left out
    is_labelled: bool = True  # False: a test split without annotations


@dataclass(kw_only=True, eq=False)
class Converted(Coco, ABC):
    """A detection data set in another format than COCO's.

    A subclass finds the files in `root` and reads the annotations as `Labels`. This class converts the labels to COCO's
    JSON, in memory. Everything else is inherited from `Coco`. Category ids count from 1, in the order of the classes.

    Args:
        classes: the names of the classes in the order of their ids; None = the names in the annotation files.
    """

    classes: list[str] | None

    def __post_init__(self) -> None:
        """Raise UserError if a split has only one of its two paths, or if `classes` is empty or repeats a name."""
        super().__post_init__()
        if self.classes is not None:
            check_classes(self.classes, "data.classes")
        # Each split's JSON and notes. The JSON is stored as bytes, because forked workers would copy many small
        # objects.
        self._converted: dict[Split, tuple[bytes, list[str]]] = {}

    def request_masks(self) -> None:
        """Raise UserError, because these formats have boxes only."""
        raise UserError(
            "The task reads masks, and the annotations of data=voc, data=yolo and data=csv are boxes; give data=coco, "
            "data=coco_panoptic or data=shapes."
        )

    @abstractmethod
    def convert(self, split: Split) -> dict[Split, tuple[Labels, Sequence[str]]]:
        """Read the annotations of `split`, and optionally of other splits.

        Returns, for each split that was read, its labels and the names of all classes in the order of their ids.
        """

    def read_annotations(self, split: Split) -> Any:
        """Return the annotations of `split`, converted to COCO's JSON but not validated."""
        return json.loads(self._convert_once(split)[0])

    def digest_annotations(self, split: Split) -> str:
        """Return the digest of the converted annotations of `split`."""
        return fingerprints.digest([self._convert_once(split)[0]])

    def file_notes(self, split: Split) -> list[str]:
        """Return notes for the start summary: how the files of `split` were read, and what was left out."""
        return self._convert_once(split)[1]

    def _convert_once(self, split: Split) -> tuple[bytes, list[str]]:
        owner = self._owner(split)
        if owner not in self._converted:
            for name, (labels, classes) in self.convert(owner).items():
                self._converted[name] = json.dumps(to_coco(labels, classes)).encode(), labels.notes
        return self._converted[owner]

    def splits_with_files(self) -> list[Split]:
        """Return the splits that have annotation files of their own and are not cut from train."""
        return [split for split in SPLITS if self._has_labels(split) and not self._is_cut(split)]


def to_coco(labels: Labels, classes: Sequence[str]) -> CocoJson:
    """Convert labels to COCO's JSON; the key "annotations" is left out if `labels.is_labelled` is False.

    Raises UserError if the class of a box is not in `classes`.
    """
    ids = {name: id for id, name in enumerate(classes, 1)}
    coco_json: CocoJson = {
        "images": [
            {"id": id, "file_name": name, "height": height, "width": width}
            for id, (name, height, width) in enumerate(labels.images, 1)
        ],
        "categories": [{"id": id, "name": name} for name, id in ids.items()],
    }
    if not labels.is_labelled:
        return coco_json
    if unknown := next((box for box in labels.boxes if box.name not in ids), None):
        raise UserError(
            f"{unknown.origin} has the class {unknown.name!r}, which is none of {', '.join(map(repr, ids))}; add it to "
            "data.classes, or correct it."
        )
    coco_json["annotations"] = [
        {
            "id": box.origin,
            "image_id": box.image + 1,
            "category_id": ids[box.name],
            "bbox": box.xywh,
            "iscrowd": int(box.is_crowd),
        }
        for box in labels.boxes
    ]
    return coco_json


def check_classes(names: Sequence[str], source: str) -> None:
    """Raise UserError if `names` is empty or repeats a name.

    `source` is the file or key that states the names, for the message.
    """
    if not names:
        raise UserError(f"{source} names no class; a detector needs at least one.")
    if repeated := next((name for name in names if list(names).count(name) > 1), None):
        raise UserError(f"{source} names the class {repeated!r} twice; names of classes must differ.")


def class_names(parts: Sequence[Labels], classes: list[str] | None) -> list[str]:
    """Return the names of the classes: `classes` or, if it is None, the class names of all boxes in `parts`, sorted.

    Raises UserError if `classes` is None and there is no box.
    """
    if classes is not None:
        return [composed(name) for name in classes]
    names = sorted({box.name for labels in parts for box in labels.boxes})
    if not names:
        raise UserError("There is no box in any split, so there are no classes; give data.classes=[NAME, ...].")
    return names


def find_splits(root: Path, pattern: str) -> dict[Split, Path]:
    """Find the folder or file of each split in `root`; splits that have none are left out.

    `pattern` is a path relative to `root`, such as "{}/images", in which {} stands for a name in `SPLIT_FOLDERS`.
    Raises UserError if two paths exist for one split.
    """
    existing: dict[Split, Path] = {}
    for split, names in SPLIT_FOLDERS.items():
        paths = [path for name in names if (path := root / pattern.format(name)).exists()]
        if len(paths) > 1:
            raise UserError(f"{paths[0]} and {paths[1]} could both be the split {split}; rename or remove one of them.")
        if paths:
            existing[split] = paths[0]
    return existing


def image_names(folder: Path, is_recursive: bool = False) -> Iterator[str]:
    """Yield the paths of the images in `folder`, relative to it; if `is_recursive`, also of those in its subfolders.

    Images are recognised by their suffixes, which include those of unsupported formats. The names in a folder are
    sorted.
    """
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(folders) if is_recursive else []
        for name in sorted(files):
            if not name.startswith("._") and Path(name).suffix.lower() in IMAGE_SUFFIXES | UNSUPPORTED_SUFFIXES:
                yield os.path.relpath(os.path.join(parent, name), folder)


def xywh(corners: Sequence[float], first_pixel: int) -> tuple[float, float, float, float]:
    """Convert corners xmin, ymin, xmax, ymax to left, top, width, height, all in pixels.

    If `first_pixel` is 1, the corners are the first and the last pixel of the object, counted from 1, as in Pascal VOC.
    If it is 0, they are positions between pixels, counted from 0, as in COCO.
    """
    # Pixel n, counted from 1, lies between the positions n - 1 and n.
    left, top = corners[0] - first_pixel, corners[1] - first_pixel
    return left, top, corners[2] - left, corners[3] - top


def describe_corners(first_pixel: int) -> str:
    """Return, as part of a note, the meaning of a box's corners for the given `first_pixel`; see `xywh`."""
    return "first and last pixels, counted from 1" if first_pixel else "positions between pixels, counted from 0"


def count_note(action: str, subject: str, examples: Sequence[object]) -> list[str]:
    """Return a list with one note: the number of `examples`, and the first one. Without examples, the list is empty."""
    return [f"{action}: {len(examples)} x {subject} (the first is {examples[0]})"] if examples else []
