"""COCO's 12 metrics for boxes or masks, computed from a ground truth and the entries of a results file.

Lin et al., "Microsoft COCO: Common Objects in Context", 2014, arXiv:1405.0312; the metrics are defined at
cocodataset.org/#detection-eval. A metric is -1 if the ground truth has no object that counts for it.
"""

import gc
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle

from common.errors import UserError
from detr.data import masks
from detr.data.annotations import complete, things
from detr.evaluation.coco_evaluators import Dataset, Evaluator, IouType, select_evaluator

SHAPE_KEY = {"bbox": "bbox", "segm": "segmentation"}  # the key of a result's box or mask

# In the order of COCOeval.stats. Areas in square pixels: small up to 32^2, medium up to 96^2, large above; an area on a
# bound belongs to both ranges.
NAMES = tuple("AP AP50 AP75 AP_small AP_medium AP_large AR1 AR10 AR100 AR_small AR_medium AR_large".split())


class ClassRow(NamedTuple):
    """The box or mask metrics of one class, and its number of objects without crowds."""

    name: str
    AP: float
    AP50: float
    objects: int


class Evaluation(NamedTuple):
    """COCO's 12 metrics by name (`NAMES`), and a row for each class of the ground truth, sorted by category id."""

    numbers: dict[str, float]
    rows: list[ClassRow]


def evaluate_results(
    ground_truth: dict[str, Any],
    results: Iterable[dict[str, Any]],
    iou_type: IouType,
    evaluator: Evaluator = "pycocotools",
) -> Evaluation:
    """Evaluate `results` on all images of `ground_truth`, including images without annotations.

    Args:
        ground_truth: a COCO JSON, which is not modified. A missing or unusable area or iscrowd is replaced as in
            `detr.data.annotations.complete`.
        results: entries of a COCO results file, in any order.
        iou_type: "bbox" compares boxes, "segm" masks.
        evaluator: the package that computes the metrics; all packages give identical values.

    Raises:
        UserError: a result's image is not in the ground truth, an annotation's segmentation cannot be read, or the
            evaluator is not installed.
    """
    evaluate = select_evaluator(evaluator)
    with _gc_disabled():
        truth, images, classes = _renumber(ground_truth, iou_type)
        detections = truth | {"annotations": _to_annotations(results, iou_type, images, classes)}
        statistics = evaluate(truth, detections, iou_type)
    numbers = dict(zip(NAMES, statistics.numbers, strict=True))
    return Evaluation(numbers, _class_rows(truth, statistics.precision))


def check_masks(ground_truth: dict[str, Any]) -> None:
    """Raise UserError if `evaluate_results` could not compute the metrics of masks, except for those of stuff.

    A ground truth without annotations, or without any mask, is valid: it gives no numbers, or -1.
    """
    if "annotations" in ground_truth:
        _renumber(things(ground_truth), "segm")


def read_results(file: Path, iou_type: IouType) -> list[dict[str, Any]]:
    """Read the entries of a COCO results file for boxes or masks.

    Raises UserError if the file is not a JSON list of objects with the keys of such entries. Values are not checked.
    """
    try:
        results = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as a COCO results file: {error}") from error
    keys = {"image_id", "category_id", SHAPE_KEY[iou_type], "score"}
    if not isinstance(results, list) or not all(isinstance(entry, dict) and keys <= entry.keys() for entry in results):
        raise UserError(f"{file}: expected a COCO results file, a list of objects with {', '.join(sorted(keys))}.")
    return results


def write_results(file: Path, results: Iterable[dict[str, Any]]) -> None:
    """Write a COCO results file.

    Entries are encoded one by one, because a list of half a million dicts would take too much memory.
    """
    file.write_text(f"[{', '.join(map(json.JSONEncoder().encode, results))}]")


def _class_rows(truth: Dataset, precision: np.ndarray) -> list[ClassRow]:
    objects = Counter(annotation["category_id"] for annotation in truth["annotations"] if not annotation["iscrowd"])
    rows = []
    for index, category in enumerate(truth["categories"]):
        curves = precision[:, :, index, 0, -1]  # (10 IoUs, 101 recalls) of all areas and 100 detections
        AP, AP50 = float(curves.mean()), float(curves[0].mean())
        rows.append(ClassRow(category["name"], AP, AP50, objects[category["id"]]))
    return rows


def _renumber(ground_truth: dict[str, Any], iou_type: IouType) -> tuple[Dataset, dict[Any, int], dict[Any, int]]:
    """Copy the ground truth with new ids, counted from 1; also returns the new ids of images and categories by old id.

    Evaluators get a copy, because they modify the ground truth. The copy has new ids, because evaluators misread some
    ids: an annotation with id 0 counts as not matched, only one of several annotations with equal ids counts, and
    faster-coco-eval stores ids as floats, which are exact only up to 2^53.
    """
    images = _new_ids(ground_truth["images"])
    classes = _new_ids(ground_truth["categories"])
    names = {classes[category["id"]]: category["name"] for category in ground_truth["categories"]}
    truth: Dataset = {
        "images": [image | {"id": images[image["id"]]} for image in ground_truth["images"]],
        "categories": [{"id": number, "name": names[number]} for number in sorted(names)],
    }
    annotations = complete(ground_truth)["annotations"]
    annotations = [a for a in annotations if a["image_id"] in images and a["category_id"] in classes]
    if iou_type == "segm" and not any(annotation.get("segmentation") for annotation in annotations):
        annotations = []  # the ground truth has only boxes, so every mask metric is -1
    truth["annotations"] = [
        {
            "id": number,
            "image_id": images[annotation["image_id"]],
            "category_id": classes[annotation["category_id"]],
            "bbox": annotation["bbox"],
            "area": annotation["area"],
            "iscrowd": annotation["iscrowd"],
        }
        for number, annotation in enumerate(annotations, start=1)
    ]
    if iou_type == "segm":
        _add_masks(truth, annotations)
    return truth, images, classes


def _new_ids(entries: list[dict[str, Any]]) -> dict[Any, int]:
    return {id: number for number, id in enumerate(sorted({entry["id"] for entry in entries}), start=1)}


def _add_masks(truth: Dataset, originals: list[dict[str, Any]]) -> None:
    """Add a run-length code to each annotation of `truth`, from the polygons or the code in `originals`.

    Raises UserError if a segmentation is missing, invalid or wholly outside its image.
    """
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    for annotation, original in zip(truth["annotations"], originals, strict=True):
        try:
            annotation["segmentation"] = masks.encode(original.get("segmentation"), *sizes[annotation["image_id"]])
        except masks.MaskFault as fault:
            raise UserError(
                f"The annotation {original.get('id')} of image {original['image_id']} {fault}; the metrics of masks "
                "need every mask."
            ) from None


def _to_annotations(
    results: Iterable[dict[str, Any]], iou_type: IouType, images: dict[Any, int], classes: dict[Any, int]
) -> list[dict[str, Any]]:
    """Convert results to annotations for the evaluators, with new ids.

    pycocotools' loadRes is not used, because it fails on an empty list and modifies its argument. Results of classes
    that are not in the ground truth are dropped, because they do not affect the metrics. Raises UserError for a result
    of an image that is not in the ground truth.
    """
    key, annotations, unknown = SHAPE_KEY[iou_type], [], set()
    for number, result in enumerate(results, start=1):
        image, category, shape = images.get(result["image_id"]), classes.get(result["category_id"]), result[key]
        if image is None:
            unknown.add(result["image_id"])
        elif category is not None:
            area = shape[2] * shape[3] if iou_type == "bbox" else float(rle.area(shape))
            annotations.append(
                {
                    "id": number,
                    "image_id": image,
                    "category_id": category,
                    key: shape,
                    "score": result["score"],
                    "area": area,
                    "iscrowd": 0,
                }
            )
    if unknown:
        raise UserError(f"the results name images that are not in the ground truth: {sorted(unknown)[:5]}.")
    return annotations


@contextmanager
def _gc_disabled() -> Iterator[None]:
    """Disable Python's cyclic garbage collection inside the block.

    The collector would repeatedly scan a million new objects, none of which is part of a cycle.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
