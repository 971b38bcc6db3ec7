"""COCO's 12 metrics for boxes or masks, computed from a ground truth and detections.

Lin et al., "Microsoft COCO: Common Objects in Context", 2014, arXiv:1405.0312; the metrics are defined at
cocodataset.org/#detection-eval. A metric is -1 if the ground truth has no object that counts for it.
"""

import gc
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError
from detr.evaluation.coco_evaluators import Evaluator, select_evaluator
from detr.evaluation.coco_tables import SHAPE_KEY, Detections, DetectionTable, tabulate_images, tabulate_results
from detr.evaluation.coco_truth import GroundTruth, IouType, renumber

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


def evaluate_images(
    ground_truth: dict[str, Any],
    detections: Sequence[tuple[Any, Detections]],
    categories: Sequence[Any],
    iou_type: IouType,
    evaluator: Evaluator = "pycocotools",
) -> Evaluation:
    """Evaluate a detector's detections, given as pairs (image id, detections); see `evaluate_results`.

    `categories` are the category ids by class index. All images must be in the ground truth.
    """
    return _evaluate(ground_truth, partial(tabulate_images, detections, categories), iou_type, evaluator)


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
    return _evaluate(ground_truth, partial(tabulate_results, results), iou_type, evaluator)


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


def _evaluate(
    ground_truth: dict[str, Any],
    tabulate: Callable[[GroundTruth, IouType], DetectionTable],
    iou_type: IouType,
    evaluator: Evaluator,
) -> Evaluation:
    evaluate = select_evaluator(evaluator)
    with _gc_disabled():
        truth = renumber(ground_truth, iou_type)
        statistics = evaluate(truth.dataset, tabulate(truth, iou_type), iou_type)
        numbers = dict(zip(NAMES, statistics.numbers, strict=True))
        return Evaluation(numbers, _class_rows(truth, statistics.precision))


def _class_rows(truth: GroundTruth, precision: np.ndarray) -> list[ClassRow]:
    annotations = truth.dataset["annotations"]
    objects = Counter(annotation["category_id"] for annotation in annotations if not annotation["iscrowd"])
    rows = []
    for index, name in enumerate(truth.names):
        curves = precision[:, :, index, 0, -1]  # (10 IoUs, 101 recalls) of all areas and 100 detections
        rows.append(ClassRow(name, float(curves.mean()), float(curves[0].mean()), objects[index + 1]))
    return rows


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
