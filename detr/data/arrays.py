"""Convert one split of a COCO JSON to arrays: its boxes for training, and the file names of its images."""

import os
import re
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.data.names import composed
from common.errors import UserError
from detr.data.annotations import Annotation, CocoJson, area, find_id, has_usable_area, is_crowd, name_annotation

MAX_NAME = 200  # maximum number of characters of a file name in a message


@dataclass(frozen=True, kw_only=True)
class SplitArrays:
    """One split as arrays, with the images in the order of the JSON.

    `boxes` are the training targets: they are clipped to their image, and crowds and boxes without area are left out.
    Forked workers of the data loader share the memory of arrays with their parent process. Python objects would be
    copied in each worker, because reading an object changes its reference count.
    """

    ids: NDArray[np.int64]  # (N,) image ids
    files: NDArray[np.bytes_]  # (N,) file names in UTF-8, relative to the folder of images
    sizes: NDArray[np.int64]  # (N, 2) height, width
    starts: NDArray[np.int64]  # (N + 1,) boxes[starts[i] : starts[i + 1]] are those of image i
    boxes: NDArray[np.float32]  # (T, 4) xyxy in pixels
    labels: NDArray[np.int64]  # (T,) class index
    positions: NDArray[np.int64]  # (T,) position of each box in the JSON's list "annotations"
    labelled: bool  # whether the JSON has the key "annotations", even with an empty list
    notes: list[str]  # about boxes that were clipped or left out, and fields that were repaired
    doubts: list[str]  # reasons to doubt that the boxes are in COCO's format x, y, width, height


def build_arrays(coco_json: CocoJson, classes: list[dict[str, Any]], path: Path) -> SplitArrays:
    """Convert a validated JSON, which was read from `path`, to arrays.

    `classes` is the result of `annotations.categories` for the train JSON; the position in this list is the class
    index. Raises UserError when the category of an annotation is missing from `classes` or has another name in
    `classes`.
    """
    _check_categories(coco_json, classes, path)
    images, annotations = coco_json["images"], coco_json.get("annotations", [])
    index_of = {image["id"]: i for i, image in enumerate(images)}
    sizes = np.array([[image["height"], image["width"]] for image in images], dtype=np.int64).reshape(-1, 2)
    image_index = np.array([index_of[a["image_id"]] for a in annotations], dtype=np.int64)
    crowd = np.array([is_crowd(a) for a in annotations], dtype=bool)
    label_of = {category["id"]: i for i, category in enumerate(classes)}
    labels = np.array([label_of[a["category_id"]] for a in annotations], dtype=np.int64)
    xywh = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)

    boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)  # (T, 4) xyxy
    limits = np.tile(sizes[image_index][:, ::-1], 2)  # (T, 4) width, height, width, height of the image
    clipped = boxes.clip(0, limits).astype(np.float32)
    empty = (clipped[:, 2:] <= clipped[:, :2]).any(axis=1) | (xywh[:, 2:] <= 0).any(axis=1)
    usable = ~crowd & ~empty
    # COCO's files round coordinates to 0.01 pixels, so a box that exceeds its image by this much is not reported.
    exceeds = usable & (np.abs(clipped - boxes) > 0.011).any(axis=1)
    notes = [
        _describe("left out of the targets", "crowd", annotations, crowd),
        _describe("left out of the targets", "box without area inside its image", annotations, empty & ~crowd),
        _describe("clipped to the image", "box", annotations, exceeds),
        *_describe_repairs(annotations, sizes[image_index]),
    ]
    order = np.flatnonzero(usable)[np.argsort(image_index[usable], kind="stable")]
    return SplitArrays(
        ids=np.array([image["id"] for image in images], dtype=np.int64),
        files=np.array([encode(image["file_name"]) for image in images]),
        sizes=sizes,
        starts=np.concatenate([[0], np.cumsum(np.bincount(image_index[usable], minlength=len(images)))]),
        boxes=clipped[order],
        labels=labels[order],
        positions=order,
        labelled="annotations" in coco_json,
        notes=[note for note in notes if note],
        doubts=_doubt_format(xywh, limits),
    )


def find_files(arrays: SplitArrays, folder: Path) -> SplitArrays:
    """Check that the images exist in `folder`, and return the arrays with the names that the files have there.

    If no file has the name of an image, two changes of the name are tried: "/" instead of backslashes, and the composed
    or decomposed form of Unicode. Raises UserError when `folder` or an image is missing; the message suggests a remedy.
    """
    if not folder.is_dir():
        raise UserError(f"The folder of images {folder} does not exist; correct its path.")
    names = [decode(name) for name in arrays.files]
    # Each folder is listed once, because 100,000 calls of `exists` are slow on a network drive.
    parents = {os.path.dirname(name) for name in names}
    present = {os.path.join(p, f) for p in parents if os.path.isdir(folder / p) for f in os.listdir(folder / p)}
    missing, renamed = [], {}
    for index, name in enumerate(names):
        if name in present or os.path.exists(folder / name):  # `exists` is False for a name that is too long
            continue
        alike = (name.replace("\\", "/"), *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))
        existing = next((other for other in alike if other != name and os.path.exists(folder / other)), None)
        if existing is None:
            missing.append(name)
        else:
            renamed[index] = existing
    if missing:
        first = missing[0] if len(missing[0]) <= MAX_NAME else f"{missing[0][:MAX_NAME]}..."
        raise UserError(
            f"{len(missing)} of {len(names)} images are missing, the first is {folder / first}; "
            f"{_remedy(missing[0], folder)}."
        )
    if not renamed:
        return arrays
    return replace(arrays, files=np.array([encode(renamed.get(i, name)) for i, name in enumerate(names)]))


def decode(name: bytes) -> str:
    """Decode a file name of `SplitArrays.files`."""
    return name.decode("utf-8", "surrogateescape")


def encode(name: str) -> bytes:
    """Encode a file name for `SplitArrays.files`."""
    # When Python reads a file name, bytes that are not UTF-8 become lone surrogates. JSON that Python writes contains
    # these surrogates.
    return name.encode("utf-8", "surrogateescape")


def _remedy(name: str, folder: Path) -> str:
    """Return a remedy for the missing image `name`, as the end of a sentence."""
    base = re.split(r"[\\/]", name)[-1]
    if re.match(r"\w+://", name):
        return f"its file_name is a URL: download the images to {folder} and give their names there"
    if base != name and os.path.exists(folder / base):
        return f"{folder / base} exists: remove the folders from its name in the annotations"
    if os.path.exists(folder.parent / name):
        return f"{folder.parent / name} exists: give {folder.parent} as the folder of images"
    if same := [file for file in os.listdir(folder) if file.lower() == name.lower()]:
        return f"{folder / same[0]} exists: write its capital letters as they are in the annotations"
    return "add them, or remove them from the annotations"


def _check_categories(coco_json: CocoJson, classes: list[dict[str, Any]], path: Path) -> None:
    names = {category["id"]: category["name"] for category in classes}
    used = {annotation["category_id"] for annotation in coco_json.get("annotations", [])}
    for category in coco_json["categories"]:
        id, name = category["id"], category["name"]
        if id in used and (id not in names or composed(names[id]) != composed(name)):
            train_name = repr(names[id]) if id in names else "not listed"
            train_id = find_id(name, classes)
            there = "" if train_id is None else f", where {name!r} has id {train_id}"
            raise UserError(
                f"Category {id} is {name!r} in {path}, but {train_name} in the train annotations{there}; "
                "give all splits the same categories."
            )


def _describe_repairs(annotations: list[Annotation], sizes: NDArray[np.int64]) -> list[str]:
    """Return notes on fields that were repaired; `sizes` (T, 2) holds height and width of each annotation's image."""
    text = np.array([isinstance(a.get("iscrowd"), str) for a in annotations], dtype=bool)
    stated = np.array([has_usable_area(a) or a.get("area") is None for a in annotations], dtype=bool)
    computed = np.zeros(len(annotations), dtype=bool)
    for i in np.flatnonzero(~stated):
        computed[i] = area(annotations[i], *sizes[i].tolist()) != annotations[i]["area"]
    return [
        _describe(
            "area computed from the segmentation or the box", "area that is no positive number", annotations, computed
        ),
        _describe("read as a number", "iscrowd that is text", annotations, text),
    ]


def _doubt_format(xywh: NDArray[np.float64], limits: NDArray[np.int64]) -> list[str]:
    """Return a list with a warning if boxes (T, 4), read as x, y, width, height in pixels, look like another format.

    `limits` (T, 4) holds width, height, width, height of each box's image. The boxes look relative to the image size if
    no coordinate exceeds 1 although all sides of the images are longer than 4 pixels. The boxes look like corners
    (xyxy) if two conditions hold. Read as corners, all boxes have an area and lie in their images. Read as x, y, width,
    height, at least a tenth of the boxes extend beyond their images by more than a pixel. If the boxes look neither
    relative nor like corners, the list is empty.
    """
    if not len(xywh):
        return []
    read_as = "they were read as x, y, width, height in pixels, COCO's format"
    if (np.abs(xywh) <= 1.01).all() and (limits > 4).all():
        return [f"no coordinate of a box exceeds 1, so the boxes look relative to the image size; {read_as}"]
    corners = (xywh[:, 2:] > xywh[:, :2]).all(axis=1) & (xywh >= 0).all(axis=1) & (xywh <= limits + 1).all(axis=1)
    leaves = (xywh[:, :2] + xywh[:, 2:] > limits[:, :2] + 1).any(axis=1)
    if corners.all() and leaves.mean() >= 0.1:
        counts = f"{leaves.sum()} of {len(xywh)} boxes"
        return [f"{counts} leave their image, but as corners x1, y1, x2, y2 all would lie inside; {read_as}"]
    return []


def _describe(action: str, subject: str, annotations: list[Annotation], chosen: NDArray[np.bool_]) -> str:
    """Return a note with the number of annotations for which `chosen` (T,) is True, and the first three of them.

    The note is empty if there are no such annotations.
    """
    positions = np.flatnonzero(chosen).tolist()
    if not positions:
        return ""
    examples = ", ".join(name_annotation(annotations[i], i) for i in positions[:3])
    return f"{action}: {len(positions)} x {subject} (annotation {examples}{', ...' if len(positions) > 3 else ''})"
