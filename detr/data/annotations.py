"""Validation and repair of COCO instances JSON (cocodataset.org, "Data format").

An invalid file raises a UserError that names the file, the invalid entry and the remedy.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath
from typing import Any

from common.errors import UserError
from detr.data import masks
from detr.data.masks import show

CocoJson = dict[str, Any]  # has the keys images, categories and, if labelled, annotations
Annotation = dict[str, Any]

MAX_AREA = 1e10  # square pixels; COCOeval's range "all" ends here, so it ignores larger objects
# Characters that no name may contain: null and lone surrogates. \udc80 to \udcff are allowed, because they stand for
# bytes that are not UTF-8.
NO_NAME = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")
CROWD_TEXTS = {"0": False, "false": False, "": False, "1": True, "true": True}  # values of iscrowd as text


def check(
    coco_json: Any, path: Path, labelled: bool = True, read_size: Callable[[str], tuple[int, int]] | None = None
) -> CocoJson:
    """Validate the content of a COCO JSON file and return it; raises a UserError that names `path` if it is invalid.

    The content is modified in place: ids, heights and widths that are written as 64.0 become integers. If the height or
    width of an image is missing or 0, both are set to the (height, width) that `read_size` returns for the image's
    file_name. Without `read_size`, a height or width that is missing or 0 is an error. The ids of annotations occur
    only in messages, so they may be of any type, repeated or missing. If `labelled` is False, the file may lack
    "annotations", as COCO's image_info_test-dev2017.json does.
    """
    unlabelled = not labelled and isinstance(coco_json, dict) and "annotations" not in coco_json
    for key in ("images", "categories") if unlabelled else ("images", "annotations", "categories"):
        if not isinstance(coco_json, dict) or not isinstance(coco_json.get(key), list):
            raise UserError(f'{path} has no list of "{key}", so it is not COCO instances JSON; give such a file.')
        for position, entry in enumerate(coco_json[key]):
            if not isinstance(entry, dict):
                raise UserError(f'Entry {position} of "{key}" in {path} is {show(entry)}; expected an object {{...}}.')
    if any("segments_info" in annotation for annotation in coco_json.get("annotations", [])[:1]):
        raise UserError(
            f'{path} is panoptic JSON, because its annotations have "segments_info"; give data=coco_panoptic.'
        )
    for key in ("images", "categories"):
        if not coco_json[key]:
            raise UserError(f"{path} lists no {key}; a split needs at least one.")
        _check_ids(coco_json[key], key, path)
    for category in coco_json["categories"]:
        if fault := _name_fault(category, "name"):
            raise UserError(f"Category {category['id']} of {path} {fault}.")
    for image in coco_json["images"]:
        if fault := _name_fault(image, "file_name"):
            raise UserError(f"Image {image['id']} of {path} {fault}.")
        if read_size is not None and any(_lacks_number(image.get(key)) for key in ("height", "width")):
            image["height"], image["width"] = read_size(image["file_name"])
        for key in ("height", "width"):
            image[key] = _whole(image.get(key))
            if not isinstance(image[key], int) or not 0 < image[key] < 2**31:
                raise UserError(
                    f'Image {image["id"]} of {path} has no positive "height" and "width" ({key} is '
                    f"{show(image[key])}); add them in pixels, without quotes."
                )
    _check_annotations(coco_json, path)
    valid: CocoJson = coco_json
    return valid


def categories(coco_json: CocoJson) -> list[dict[str, Any]]:
    """Return the classes of a file as a list of {"id", "name"}, sorted by id; a class's index is its position there.

    A class also has "isthing", 1 for things and 0 for stuff, if the file states it.
    """
    classes = [{key: c[key] for key in ("id", "name", "isthing") if key in c} for c in coco_json["categories"]]
    return sorted(classes, key=lambda c: c["id"])


def things(coco_json: CocoJson) -> CocoJson:
    """Return a JSON with only the categories that are not stuff ("isthing" 0), and their annotations."""
    stuff = {category["id"] for category in coco_json["categories"] if category.get("isthing") == 0}
    countable = {**coco_json, "categories": [c for c in coco_json["categories"] if c["id"] not in stuff]}
    if "annotations" in coco_json:
        countable["annotations"] = [a for a in coco_json["annotations"] if a["category_id"] not in stuff]
    return countable


def select(coco_json: CocoJson, ids: Iterable[int]) -> CocoJson:
    """Return a JSON with only the images `ids` and all their annotations, including crowds and boxes without area."""
    chosen = set(ids)
    selected = {**coco_json, "images": [image for image in coco_json["images"] if image["id"] in chosen]}
    if "annotations" in coco_json:
        selected["annotations"] = [a for a in coco_json["annotations"] if a["image_id"] in chosen]
    return selected


def complete(coco_json: CocoJson) -> CocoJson:
    """Return a copy in which each annotation has what evaluation needs: `iscrowd` as 0 or 1, and `area` as a number.

    A missing area is replaced by the area of the box. An unusable area (text, NaN, zero, a negative number, more than
    MAX_AREA) is replaced by the area of the segmentation. If the segmentation is missing, unreadable or empty, the area
    of the box is used instead. The area of a box with a side of 0 or less is 0. A JSON without "annotations" is
    returned unchanged.
    """
    if "annotations" not in coco_json:
        return coco_json
    sizes = {image["id"]: (image.get("height"), image.get("width")) for image in coco_json["images"]}
    return {
        **coco_json,
        "annotations": [
            {**a, "iscrowd": int(is_crowd(a)), "area": area(a, *sizes.get(a["image_id"], (None, None)))}
            for a in coco_json["annotations"]
        ],
    }


def is_crowd(annotation: Annotation) -> bool:
    """Whether `iscrowd` is true; a missing or unreadable value counts as false."""
    return bool(_read_crowd(annotation.get("iscrowd")))


def has_usable_area(annotation: Annotation) -> bool:
    """Whether an annotation states its area as a positive number of at most MAX_AREA."""
    value = annotation.get("area")
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_AREA  # NaN fails


def area(annotation: Annotation, height: int | None, width: int | None) -> float:
    """Return the area of an annotation in square pixels; a missing or unusable area is replaced as in `complete`.

    `height` and `width` are those of its image in pixels; if one of them is None, the segmentation is not used.
    """
    if has_usable_area(annotation):
        usable: float = annotation["area"]
        return usable
    if annotation.get("area") is not None and height and width:
        mask_area = masks.area(annotation.get("segmentation"), height, width)
        if mask_area > 0:
            return mask_area
    box_width, box_height = annotation["bbox"][2:]
    return float(box_width * box_height) if box_width > 0 and box_height > 0 else 0.0


def name_annotation(annotation: Annotation, position: int) -> str:
    """Return an annotation's name for messages: its id or, if it has none, its `position` in the file's list."""
    return show(annotation["id"]) if "id" in annotation else f"at position {position}"


def find_id(name: str, categories: Iterable[dict[str, Any]]) -> int | None:
    """Return the id of the first category with this name; None if there is none."""
    return next((category["id"] for category in categories if category["name"] == name), None)


def _check_ids(entries: list[dict[str, Any]], key: str, path: Path) -> None:
    ids = set()
    for position, entry in enumerate(entries):
        id = entry["id"] = _whole(entry.get("id"))
        if not _is_id(id):
            raise UserError(
                f'Entry {position} of "{key}" in {path} has {_describe_id(id, "id")}; expected an integer below 2^63'
                f"{', without quotes' if isinstance(id, str) else ''}."
            )
        if id in ids:
            raise UserError(f'The id {id} occurs twice in "{key}" of {path}; ids must differ.')
        ids.add(id)


def _check_annotations(coco_json: CocoJson, path: Path) -> None:
    listed = {
        "image_id": {image["id"] for image in coco_json["images"]},
        "category_id": {category["id"] for category in coco_json["categories"]},
    }
    for position, annotation in enumerate(coco_json.get("annotations", [])):
        for key in listed:
            annotation[key] = _whole(annotation.get(key))
        if fault := _find_fault(annotation, listed):
            raise UserError(f"Annotation {name_annotation(annotation, position)} of {path} {fault}.")


def _find_fault(annotation: Annotation, listed: dict[str, set[int]]) -> str | None:
    """Return the first fault of an annotation, as the predicate of a sentence about it; None if it is valid.

    `listed` holds the ids that "image_id" and "category_id" may have.
    """
    for key, verb in (("image_id", "belongs to image"), ("category_id", "has category")):
        id = annotation[key]
        if not _is_id(id):
            return f'has {_describe_id(id, key)}; expected an integer, the "id" of one {verb.split()[-1]}'
        if id not in listed[key]:
            return f"{verb} {id}, which is not listed; list it"
    if not _is_box(annotation.get("bbox")):
        return f'has the "bbox" {show(annotation.get("bbox"))}; expected four numbers x, y, w, h'
    if _read_crowd(annotation.get("iscrowd")) is None:
        return f'has the "iscrowd" {show(annotation["iscrowd"])}; expected 0 or 1'
    return None


def _name_fault(entry: dict[str, Any], key: str) -> str | None:
    """Return the fault of the name under `key`, as the predicate of a sentence about the entry; None if it is valid."""
    name = entry.get(key)
    if name is None:
        return f'has no "{key}"; add it'
    if not isinstance(name, str) or NO_NAME.search(name) or (key == "file_name" and not PurePath(name).name):
        return f'has the "{key}" {show(name)}, which is no name; correct it'
    return None


def _whole(value: Any) -> Any:
    """Convert a float without a fraction to an integer (64.0 to 64); any other value is returned unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _lacks_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value == 0)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _describe_id(value: Any, key: str) -> str:
    if value is None:
        return f'no "{key}"'
    remarks = {str: ", which is text", list: ", which is a list", int: ", which does not fit 64 bits"}
    return f'the "{key}" {show(value)}{remarks.get(type(value), "")}'


def _is_box(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 4:
        return False
    return all(isinstance(x, int | float) and not isinstance(x, bool) and -1e9 < x < 1e9 for x in value)  # NaN fails


def _read_crowd(value: Any) -> bool | None:
    """Convert a value of `iscrowd` to a bool.

    None and 0 are converted to False, and other numbers to True. A text is looked up in CROWD_TEXTS. Returns None for a
    value that cannot be read: a text that is not in CROWD_TEXTS, NaN, or a value of another type.
    """
    if value is None:
        return False
    if isinstance(value, str):
        return CROWD_TEXTS.get(value.strip().lower())
    return bool(value) if isinstance(value, int | float) and value == value else None  # NaN differs from itself
