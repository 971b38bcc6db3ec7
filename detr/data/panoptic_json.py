"""The JSON format of panoptic segmentation (Kirillov et al. 2019, arXiv:1801.00868), converted to COCO instances JSON.

The format is defined at cocodataset.org, "Data format", 4. Panoptic Segmentation. An annotation lists the segments of
one image, and names the PNG that holds their pixels.
"""

import json
from collections import Counter
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from common.errors import UserError
from detr.data.annotations import NO_NAME, CocoJson, has_usable_area
from detr.data.masks import decode, show
from detr.data.panoptic_png import MAX_ID, encode_ids

SEGMENT_KEYS = ("id", "category_id", "bbox", "area", "iscrowd")
PNG_KEY = "panoptic_file"  # the key of an image's PNG in the converted JSON


def to_coco(panoptic_json: Any, path: Path) -> CocoJson:
    """Convert the content of a panoptic JSON to COCO instances JSON, with an annotation for each segment.

    An annotation's id is that of its segment, which is unique only in its image. Each image gets the name of its PNG
    under PNG_KEY. Category, box and iscrowd are those of the file, unchecked: `annotations.check` validates them.
    The key "annotations" is missing if the file lacks it.

    Raises UserError, which names `path`, if the file is not panoptic JSON, if an image has no annotation or two, or if
    a segment's id is invalid or occurs twice in its image, or if a segment has no positive area.
    """
    _check_lists(panoptic_json, path)
    for category in panoptic_json["categories"]:
        if category.get("isthing") not in (0, 1):
            raise UserError(
                f'The category {show(category.get("id"))} of {path} has the "isthing" '
                f"{show(category.get('isthing'))}; expected 1 for things and 0 for stuff."
            )
    if "annotations" not in panoptic_json:
        return dict(panoptic_json)
    entries = _by_image(panoptic_json, path)
    images = [{**image, PNG_KEY: entries[image["id"]]["file_name"]} for image in panoptic_json["images"]]
    segments = [_to_annotation(segment, image) for image in entries for segment in entries[image]["segments_info"]]
    return {**panoptic_json, "images": images, "annotations": segments}


def _check_lists(panoptic_json: Any, path: Path) -> None:
    for key in ("images", "categories", "annotations"):
        if isinstance(panoptic_json, dict) and key == "annotations" and key not in panoptic_json:
            continue  # a test set that is published without annotations
        entries = panoptic_json.get(key) if isinstance(panoptic_json, dict) else None
        if not isinstance(entries, list):
            raise UserError(f'{path} has no list of "{key}", so it is not COCO panoptic JSON; give such a file.')
        for position, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise UserError(f'Entry {position} of "{key}" in {path} is {show(entry)}; expected an object {{...}}.')
            if key == "images" and type(entry.get("id")) is not int:
                raise UserError(
                    f'Entry {position} of "images" in {path} has the "id" {show(entry.get("id"))}; expected an '
                    "integer, without quotes."
                )


def _by_image(panoptic_json: dict[str, Any], path: Path) -> dict[int, dict[str, Any]]:
    """Return the annotation of each image, by image id, in the order of the file."""
    images = {image["id"] for image in panoptic_json["images"]}
    entries: dict[int, dict[str, Any]] = {}
    for position, entry in enumerate(panoptic_json["annotations"]):
        id = entry.get("image_id")
        if type(id) is not int or id not in images:
            raise UserError(
                f'Entry {position} of "annotations" in {path} belongs to image {show(id)}, which is not listed; list '
                "it."
            )
        if id in entries:
            raise UserError(f"Image {id} has two annotations in {path}; a panoptic JSON has one for each image.")
        _check_entry(entry, path)
        entries[id] = entry
    if missing := sorted(images - entries.keys()):
        raise UserError(
            f"{len(missing)} of {len(images)} images of {path} have no annotation, the first is image {missing[0]}; "
            "add one for each image, or remove the images."
        )
    return entries


def _check_entry(entry: dict[str, Any], path: Path) -> None:
    id, name, segments = (entry.get(key) for key in ("image_id", "file_name", "segments_info"))
    where = f"The annotation of image {id} in {path}"
    if not isinstance(segments, list) or not all(isinstance(segment, dict) for segment in segments):
        raise UserError(
            f'{where} has no list of "segments_info", so it is not of a panoptic JSON; give such a file, or data=coco.'
        )
    if not isinstance(name, str) or not name or NO_NAME.search(name):
        raise UserError(f'{where} has the "file_name" {show(name)}; expected the name of its PNG.')
    ids = [segment.get("id") for segment in segments]
    for segment_id in ids:
        if type(segment_id) is not int or not 0 < segment_id <= MAX_ID:
            raise UserError(
                f'{where} has a segment with the "id" {show(segment_id)}; expected an integer from 1 to {MAX_ID}, the '
                "colour of its pixels (0 is no segment)."
            )
    if repeated := next((segment_id for segment_id, count in Counter(ids).items() if count > 1), None):
        raise UserError(f"{where} lists the segment {repeated} twice; ids must differ within an image.")
    if unmeasured := next((segment for segment in segments if not has_usable_area(segment)), None):
        raise UserError(
            f'{where} has the segment {unmeasured["id"]} with the "area" {show(unmeasured.get("area"))}; expected its '
            "number of pixels, from which the panoptic quality is computed."
        )


def _to_annotation(segment: dict[str, Any], image: int) -> dict[str, Any]:
    return {"image_id": image} | {key: segment[key] for key in SEGMENT_KEYS if key in segment}


def write_panoptic(coco_json: CocoJson, path: Path) -> None:
    """Write instances JSON whose masks do not overlap as panoptic JSON to `path`, and its PNGs to the folder beside it.

    The masks of the annotations are compressed run-length codes. The segments of an image are numbered from 1.
    """
    path.with_suffix("").mkdir()
    by_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in coco_json["images"]}
    for annotation in coco_json["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    entries = []
    for image in coco_json["images"]:
        ids = np.zeros((image["height"], image["width"]), dtype=np.int64)
        segments = []
        for number, annotation in enumerate(by_image[image["id"]], 1):
            ids[decode([annotation["segmentation"]])[0] == 1] = number
            segments.append({"id": number} | {key: annotation[key] for key in SEGMENT_KEYS if key != "id"})
        name = f"{PurePath(image['file_name']).stem}.png"
        (path.with_suffix("") / name).write_bytes(encode_ids(ids))
        entries.append({"image_id": image["id"], "file_name": name, "segments_info": segments})
    path.write_text(json.dumps({**coco_json, "annotations": entries}))
