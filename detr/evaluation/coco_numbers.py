"""COCO's 12 numbers for boxes or masks: a ground truth and the lines of a results file in, plain floats out.

Lin et al., "Microsoft COCO: Common Objects in Context", 2014, arXiv:1405.0312; the numbers are those of
cocodataset.org/#detection-eval. A number is -1 where the ground truth holds nothing that it could count.
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
from pycocotools.coco import COCO

from common.errors import UserError
from detr.evaluation.coco_evaluators import Dataset, Evaluator, IouType, select_evaluator

SHAPE_KEY = {"bbox": "bbox", "segm": "segmentation"}  # where a line of a results file holds its shape

# In the order of COCOeval.stats. By area in square pixels: small to 32^2, medium from there to 96^2, large above; what
# lies on a border belongs to both.
NAMES = tuple("AP AP50 AP75 AP_small AP_medium AP_large AR1 AR10 AR100 AR_small AR_medium AR_large".split())


class ClassRow(NamedTuple):
    """One class's line in the table of numbers per class; crowds are no objects."""

    name: str
    AP: float
    AP50: float
    objects: int


class Evaluation(NamedTuple):
    """COCO's 12 numbers by NAMES, and a row for each class of the ground truth, by rising category id."""

    numbers: dict[str, float]
    rows: list[ClassRow]


def evaluate_results(
    ground_truth: dict[str, Any],
    results: Iterable[dict[str, Any]],
    kind: IouType,
    evaluator: Evaluator = "pycocotools",
) -> Evaluation:
    """Count `results` over every image of `ground_truth`, also those without annotations.

    Args:
        ground_truth: a COCO JSON, which stays as it is. A missing area is that of the box, a missing iscrowd is 0.
        results: lines of a COCO results file, in any order of images.
        kind: "bbox" compares boxes, "segm" masks.
        evaluator: the program that counts; the numbers are the same.

    Raises:
        UserError: a result belongs to no image of the ground truth, an annotation's segmentation cannot be read, or the
            evaluator is not installed.
    """
    count = select_evaluator(evaluator)
    with _gc_disabled():
        truth, images, classes = _truth(ground_truth, kind)
        counts = count(truth, truth | {"annotations": _detections(results, kind, images, classes)}, kind)
    numbers = dict(zip(NAMES, counts.numbers, strict=True))
    return Evaluation(numbers, _rows(truth, counts.precision))


def read_results(file: Path, kind: IouType) -> list[dict[str, Any]]:
    """The lines of a COCO results file for boxes or masks; raises UserError when it is none."""
    try:
        results = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as a COCO results file: {error}") from error
    keys = {"image_id", "category_id", SHAPE_KEY[kind], "score"}
    if not isinstance(results, list) or not all(isinstance(line, dict) and keys <= line.keys() for line in results):
        raise UserError(f"{file}: expected a COCO results file, a list of lines with {', '.join(sorted(keys))}.")
    return results


def write_results(file: Path, results: Iterable[dict[str, Any]]) -> None:
    """Write a COCO results file, from lines as they come: all of them at once would be half a million objects."""
    file.write_text(f"[{', '.join(map(json.JSONEncoder().encode, results))}]")


def _rows(truth: Dataset, precision: np.ndarray) -> list[ClassRow]:
    objects = Counter(annotation["category_id"] for annotation in truth["annotations"] if not annotation["iscrowd"])
    rows = []
    for index, category in enumerate(truth["categories"]):
        curves = precision[:, :, index, 0, -1]  # (IoU, recall) at all areas and 100 detections
        AP, AP50 = float(curves.mean()), float(curves[0].mean())
        rows.append(ClassRow(category["name"], AP, AP50, objects[category["id"]]))
    return rows


def _truth(ground_truth: dict[str, Any], kind: IouType) -> tuple[Dataset, dict[Any, int], dict[Any, int]]:
    """The ground truth in copies, since evaluators write into it, and the numbers of its images and categories by id.

    All is numbered anew, in the order of ids: an annotation that is number 0 would be taken for no match, those that
    share an id would be lost, and faster-coco-eval keeps ids as floats, which end at 2^53.
    """
    images = _numbered(ground_truth["images"])
    classes = _numbered(ground_truth["categories"])
    names = {classes[category["id"]]: category["name"] for category in ground_truth["categories"]}
    truth: Dataset = {
        "images": [image | {"id": images[image["id"]]} for image in ground_truth["images"]],
        "categories": [{"id": number, "name": names[number]} for number in sorted(names)],
    }
    given = [a for a in ground_truth["annotations"] if a["image_id"] in images and a["category_id"] in classes]
    if kind == "segm" and not any(annotation.get("segmentation") for annotation in given):
        given = []  # boxes only: every mask number is -1
    truth["annotations"] = [
        {
            "id": number,
            "image_id": images[annotation["image_id"]],
            "category_id": classes[annotation["category_id"]],
            "bbox": annotation["bbox"],
            "area": _area(annotation),
            "iscrowd": annotation.get("iscrowd") or 0,
        }
        for number, annotation in enumerate(given, start=1)
    ]
    if kind == "segm":
        _add_masks(truth, given)
    return truth, images, classes


def _numbered(entries: list[dict[str, Any]]) -> dict[Any, int]:
    return {id: number for number, id in enumerate(sorted({entry["id"] for entry in entries}), start=1)}


def _area(annotation: dict[str, Any]) -> float:
    area: float | None = annotation.get("area")
    return float(annotation["bbox"][2] * annotation["bbox"][3]) if area is None else area


def _add_masks(truth: Dataset, given: list[dict[str, Any]]) -> None:
    """Give each annotation the run-length code of its original's polygons or code."""
    reader = COCO()
    reader.imgs = {image["id"]: image for image in truth["images"]}  # polygons do not tell how large their image is
    for annotation, original in zip(truth["annotations"], given, strict=True):
        try:
            annotation["segmentation"] = reader.annToRLE(annotation | {"segmentation": original.get("segmentation")})
        except Exception as error:  # pycocotools raises nothing more specific
            raise UserError(
                f"annotation {original.get('id')} of image {original['image_id']}: its segmentation is missing or "
                f"cannot be read ({error}); mask numbers need a polygon or run-length code for every annotation."
            ) from error


def _detections(
    results: Iterable[dict[str, Any]], kind: IouType, images: dict[Any, int], classes: dict[Any, int]
) -> list[dict[str, Any]]:
    """Results as evaluators want them. pycocotools' own loadRes breaks on an empty list and writes into the caller's.

    A class that the ground truth does not have can change no number.
    """
    key, annotations, foreign = SHAPE_KEY[kind], [], set()
    for number, line in enumerate(results, start=1):
        image, category, shape = images.get(line["image_id"]), classes.get(line["category_id"]), line[key]
        if image is None:
            foreign.add(line["image_id"])
        elif category is not None:
            area = shape[2] * shape[3] if kind == "bbox" else float(rle.area(shape))
            annotations.append(
                {
                    "id": number,
                    "image_id": image,
                    "category_id": category,
                    key: shape,
                    "score": line["score"],
                    "area": area,
                    "iscrowd": 0,
                }
            )
    if foreign:
        raise UserError(f"the results name images that the ground truth does not have: {sorted(foreign)[:5]}.")
    return annotations


@contextmanager
def _gc_disabled() -> Iterator[None]:
    """A million small objects are made at once, none in a cycle; Python would go through them again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
