"""COCO's 12 numbers for boxes or masks, by pycocotools: a ground truth and a list of results in, plain floats out.

Lin et al., "Microsoft COCO: Common Objects in Context", 2014, arXiv:1405.0312; the numbers are those of
cocodataset.org/#detection-eval. A number is -1 where the ground truth holds nothing that it could count.
"""

import io
import json
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from common.errors import UserError

Kind = Literal["bbox", "segm"]

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


def evaluate_results(ground_truth: dict[str, Any], results: list[dict[str, Any]], kind: Kind) -> dict[str, float]:
    """The 12 numbers of `results` over every image of `ground_truth`, also those without annotations.

    Args:
        ground_truth: a COCO JSON, which stays as it is. A missing area is that of the box, a missing iscrowd is 0.
        results: lines of a COCO results file, in any order of images.
        kind: "bbox" compares boxes, "segm" masks.

    Raises:
        UserError: a result belongs to no image of the ground truth, or an annotation's segmentation cannot be read.
    """
    return summary(evaluate(ground_truth, results, kind))


def read_results(file: Path, kind: Kind) -> list[dict[str, Any]]:
    """The lines of a COCO results file for boxes or masks; raises UserError when it is none."""
    try:
        results = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as a COCO results file: {error}") from error
    keys = {"image_id", "category_id", SHAPE_KEY[kind], "score"}
    if not isinstance(results, list) or not all(isinstance(line, dict) and keys <= line.keys() for line in results):
        raise UserError(f"{file}: expected a COCO results file, a list of lines with {', '.join(sorted(keys))}.")
    return results


def evaluate(ground_truth: dict[str, Any], results: list[dict[str, Any]], kind: Kind) -> COCOeval:
    """Run pycocotools, which counts every image of the ground truth unless told otherwise."""
    with redirect_stdout(io.StringIO()):  # it prints its progress
        truth = _truth(ground_truth, kind)
        evaluation = COCOeval(truth, _detections(truth, results, kind), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def summary(evaluation: COCOeval) -> dict[str, float]:
    """The 12 numbers of an evaluation by their names."""
    return dict(zip(NAMES, map(float, evaluation.stats), strict=True))


def per_class(evaluation: COCOeval) -> list[ClassRow]:
    """A row for each class of the ground truth, by rising category id."""
    truth = evaluation.cocoGt
    objects = Counter(annotation["category_id"] for annotation in truth.anns.values() if not annotation["iscrowd"])
    rows = []
    for index, category in enumerate(map(int, evaluation.params.catIds)):
        precision = evaluation.eval["precision"][:, :, index, 0, -1]  # (IoU, recall) at all areas and 100 detections
        AP, AP50 = float(precision.mean()), float(precision[0].mean())
        rows.append(ClassRow(truth.cats[category]["name"], AP, AP50, objects[category]))
    return rows


def _truth(ground_truth: dict[str, Any], kind: Kind) -> COCO:
    """The ground truth as pycocotools wants it, in copies, because it writes into annotations."""
    images = {image["id"] for image in ground_truth["images"]}
    given = [annotation for annotation in ground_truth["annotations"] if annotation["image_id"] in images]
    if kind == "segm" and not any(annotation.get("segmentation") for annotation in given):
        given = []  # boxes only: every mask number is -1
    annotations = []
    for number, annotation in enumerate(given, start=1):
        area = annotation.get("area")
        area = annotation["bbox"][2] * annotation["bbox"][3] if area is None else area
        # Numbered anew: pycocotools takes a match with id 0 for no match and loses annotations that share an id.
        annotations.append(annotation | {"id": number, "area": area, "iscrowd": annotation.get("iscrowd") or 0})
    truth = _index(ground_truth, annotations)
    if kind == "segm":
        for annotation, original in zip(annotations, given, strict=True):
            try:
                annotation["segmentation"] = truth.annToRLE(annotation)
            except Exception as error:  # pycocotools raises nothing more specific
                raise UserError(
                    f"annotation {original.get('id')} of image {original['image_id']}: its segmentation is missing or "
                    f"cannot be read ({error}); mask numbers need a polygon or run-length code for every annotation."
                ) from error
    return truth


def _detections(truth: COCO, results: list[dict[str, Any]], kind: Kind) -> COCO:
    """Results as pycocotools wants them. Its own loadRes breaks on an empty list and writes into the caller's."""
    foreign = sorted({line["image_id"] for line in results} - truth.imgs.keys())
    if foreign:
        raise UserError(f"the results name images that the ground truth does not have: {foreign[:5]}.")
    annotations = []
    for number, line in enumerate(results, start=1):
        area = line["bbox"][2] * line["bbox"][3] if kind == "bbox" else float(rle.area(line["segmentation"]))
        annotations.append(line | {"id": number, "area": area, "iscrowd": 0})
    return _index(truth.dataset, annotations)


def _index(dataset: dict[str, Any], annotations: list[dict[str, Any]]) -> COCO:
    coco = COCO()
    coco.dataset = {"images": dataset["images"], "categories": dataset["categories"], "annotations": annotations}
    coco.createIndex()
    return coco
