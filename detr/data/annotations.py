"""COCO's instances JSON (cocodataset.org, "Data format"): read, validated, and converted to arrays.

An invalid file raises a UserError that names the file, the id at fault and the remedy.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError

CocoJson = dict[str, Any]  # images, annotations and categories


@dataclass(frozen=True, kw_only=True)
class SplitArrays:
    """One split as arrays, images in the file's order; boxes are the training targets, clipped and without crowds.

    Forked workers share arrays. Python objects they would copy, since reading one writes its reference count.
    """

    ids: NDArray[np.int64]  # (N,) image ids
    files: NDArray[np.bytes_]  # (N,) UTF-8, relative to the folder of images
    sizes: NDArray[np.int64]  # (N, 2) height, width
    starts: NDArray[np.int64]  # (N + 1,) boxes[starts[i] : starts[i + 1]] belong to image i
    boxes: NDArray[np.float32]  # (T, 4) xyxy in pixels
    labels: NDArray[np.int64]  # (T,) class index
    notes: list[str]  # which boxes were clipped or left out


def load(path: Path) -> CocoJson:
    """Read and validate a COCO JSON file; raises UserError."""
    try:
        coco_json = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"The annotations {path} cannot be read ({error.strerror}); correct their path.") from None
    except ValueError as error:  # not JSON, or not text
        raise UserError(f"{path} is not JSON ({error}); give a file in COCO's format.") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(coco_json, dict) or not isinstance(coco_json.get(key), list):
            raise UserError(f'{path} has no list of "{key}", so it is not COCO instances JSON; give such a file.')
        _check_ids(coco_json[key], key, path)
    for key in ("images", "categories"):
        if not coco_json[key]:
            raise UserError(f"{path} lists no {key}; a split needs at least one.")
    for category in coco_json["categories"]:
        if not isinstance(category.get("name"), str):
            raise UserError(f'Category {category["id"]} of {path} has no "name"; add one.')
    for image in coco_json["images"]:
        if not isinstance(image.get("file_name"), str):
            raise UserError(f'Image {image["id"]} of {path} has no "file_name"; add it.')
        if not all(_is_integer(image.get(key)) and image[key] > 0 for key in ("height", "width")):
            raise UserError(f'Image {image["id"]} of {path} has no positive "height" and "width"; add them in pixels.')
    _check_annotations(coco_json, path)
    valid: CocoJson = coco_json
    return valid


def categories(coco_json: CocoJson) -> list[dict[str, Any]]:
    """The classes of a file as {"id", "name"}, by ascending id, which is the order of class indices."""
    return sorted(({"id": c["id"], "name": c["name"]} for c in coco_json["categories"]), key=lambda c: c["id"])


def select(coco_json: CocoJson, ids: Iterable[int]) -> CocoJson:
    """Select the images `ids` with all their annotations, crowds and degenerate boxes too.

    Optional fields that evaluation needs are added where missing: `iscrowd` as 0, and `area` as the box's area.
    """
    chosen = set(ids)
    return {
        **coco_json,
        "images": [image for image in coco_json["images"] if image["id"] in chosen],
        "annotations": [
            {"iscrowd": 0, "area": a["bbox"][2] * a["bbox"][3], **a}
            for a in coco_json["annotations"]
            if a["image_id"] in chosen
        ],
    }


def build_arrays(coco_json: CocoJson, classes: list[dict[str, Any]], path: Path) -> SplitArrays:
    """Convert a validated file to arrays; `classes` are those of `categories`, perhaps from another file.

    Raises UserError when an annotation's category is missing from `classes` or has another name there.
    """
    names = {category["id"]: category["name"] for category in classes}
    used = {annotation["category_id"] for annotation in coco_json["annotations"]}
    for category in coco_json["categories"]:
        if category["id"] in used and names.get(category["id"]) != category["name"]:
            train_name = repr(names[category["id"]]) if category["id"] in names else "not listed"
            raise UserError(
                f"Category {category['id']} is {category['name']!r} in {path}, but {train_name} in the train "
                "annotations; give all splits the same categories."
            )
    images, annotations = coco_json["images"], coco_json["annotations"]
    index_of = {image["id"]: i for i, image in enumerate(images)}
    sizes = np.array([[image["height"], image["width"]] for image in images], dtype=np.int64).reshape(-1, 2)
    ids = np.array([a["id"] for a in annotations], dtype=np.int64)
    image_index = np.array([index_of[a["image_id"]] for a in annotations], dtype=np.int64)
    crowd = np.array([bool(a.get("iscrowd", 0)) for a in annotations], dtype=bool)
    label_of = {category["id"]: i for i, category in enumerate(classes)}
    labels = np.array([label_of[a["category_id"]] for a in annotations], dtype=np.int64)
    xywh = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)

    boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)  # (T, 4) xyxy
    clipped = boxes.clip(0, np.tile(sizes[image_index][:, ::-1], 2)).astype(np.float32)
    empty = (clipped[:, 2:] <= clipped[:, :2]).any(axis=1) | (xywh[:, 2:] <= 0).any(axis=1)
    usable = ~crowd & ~empty
    notes = [
        _describe("left out of the targets", "crowd", ids[crowd]),
        _describe("left out of the targets", "box without area inside its image", ids[empty & ~crowd]),
        # COCO's files round to a hundredth of a pixel; clipping that little is not reported.
        _describe("clipped to the image", "box", ids[usable & (np.abs(clipped - boxes) > 0.011).any(axis=1)]),
    ]
    order = np.flatnonzero(usable)[np.argsort(image_index[usable], kind="stable")]
    return SplitArrays(
        ids=np.array([image["id"] for image in images], dtype=np.int64),
        files=np.array([image["file_name"].encode() for image in images]),
        sizes=sizes,
        starts=np.concatenate([[0], np.cumsum(np.bincount(image_index[usable], minlength=len(images)))]),
        boxes=clipped[order],
        labels=labels[order],
        notes=[note for note in notes if note],
    )


def check_files(arrays: SplitArrays, folder: Path) -> None:
    """Raise UserError when an image file is missing from `folder`."""
    if not folder.is_dir():
        raise UserError(f"The folder of images {folder} does not exist; correct its path.")
    names = [name.decode() for name in arrays.files]
    # Listing each folder once is fast; on a network drive, 100,000 calls of `exists` are slow.
    parents = {os.path.dirname(name) for name in names}
    present = {os.path.join(p, f) for p in parents if (folder / p).is_dir() for f in os.listdir(folder / p)}
    missing = [name for name in names if name not in present and not (folder / name).exists()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(names)} images are missing, the first is {folder / missing[0]}; "
            "add them, or remove them from the JSON."
        )


def _check_ids(entries: list[Any], key: str, path: Path) -> None:
    ids = set()
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict) or not _is_integer(entry.get("id")):
            raise UserError(f'Entry {position} of "{key}" in {path} has no integer "id"; add one.')
        if entry["id"] in ids:
            raise UserError(f'The id {entry["id"]} occurs twice in "{key}" of {path}; ids must differ.')
        ids.add(entry["id"])


def _check_annotations(coco_json: CocoJson, path: Path) -> None:
    images = {image["id"] for image in coco_json["images"]}
    categories = {category["id"] for category in coco_json["categories"]}
    for annotation in coco_json["annotations"]:
        name = f"Annotation {annotation['id']} of {path}"
        if annotation.get("image_id") not in images:
            raise UserError(f"{name} belongs to image {annotation.get('image_id')}, which is not listed; list it.")
        if annotation.get("category_id") not in categories:
            raise UserError(f"{name} has category {annotation.get('category_id')}, which is not listed; list it.")
        if not _is_box(annotation.get("bbox")):
            raise UserError(f'{name} has the "bbox" {annotation.get("bbox")}; expected four numbers x, y, w, h.')


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_box(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 4:
        return False
    return all(isinstance(x, int | float) and not isinstance(x, bool) and -1e9 < x < 1e9 for x in value)  # NaN fails


def _describe(action: str, kind: str, ids: NDArray[np.int64]) -> str:
    if not len(ids):
        return ""
    examples = ", ".join(str(i) for i in ids[:3]) + (", ..." if len(ids) > 3 else "")
    return f"{action}: {len(ids)} x {kind} (annotation {examples})"
