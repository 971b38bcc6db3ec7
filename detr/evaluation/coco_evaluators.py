"""The packages that compute COCO's metrics: pycocotools, and hotcoco for bit-identical results in less time.

pycocotools is the reference. hotcoco is an optional package, written in Rust.
"""

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from common.errors import UserError
from detr.evaluation.coco_tables import DetectionTable
from detr.evaluation.coco_truth import Dataset, IouType

Evaluator = Literal["auto", "pycocotools", "hotcoco"]


class CocoStatistics(NamedTuple):
    """The result of an evaluation, bit-identical for all evaluators."""

    numbers: list[float]  # COCO's 12 metrics, in the order of COCOeval.stats
    precision: np.ndarray  # (10 IoUs, 101 recalls, K classes, 4 areas, 3 detection limits); -1 if there is no object


def select_evaluator(name: Evaluator) -> Callable[[Dataset, DetectionTable, IouType], CocoStatistics]:
    """Select a function that evaluates detections: (ground truth, detections, IoU type) -> `CocoStatistics`.

    "auto" selects hotcoco if it is installed, and pycocotools otherwise.

    Raises:
        UserError: the evaluator is not installed.
    """
    fast_is_installed = find_spec("hotcoco") is not None
    if name == "hotcoco" and not fast_is_installed:
        raise UserError(
            "task.evaluator=hotcoco, but that package is not installed: pip install hotcoco, or give "
            "task.evaluator=auto, which gives the same numbers."
        )
    return _with_pycocotools if name == "pycocotools" or not fast_is_installed else _with_hotcoco


def _with_pycocotools(truth: Dataset, detections: DetectionTable, iou_type: IouType) -> CocoStatistics:
    indexed = []
    for dataset in (truth, truth | {"annotations": _to_annotations(detections)}):
        indexed.append(COCO())
        indexed[-1].dataset = dataset
        with redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            indexed[-1].createIndex()
    return _evaluate(COCOeval(*indexed, iou_type))


def _with_hotcoco(truth: Dataset, detections: DetectionTable, iou_type: IouType) -> CocoStatistics:
    import hotcoco  # not at the top, because it is optional

    indexed = hotcoco.COCO(truth)
    return _evaluate(hotcoco.COCOeval(indexed, indexed.load_res(_to_results(detections)), iou_type))


def _evaluate(evaluation: Any) -> CocoStatistics:
    """Run an evaluation; `evaluation` is an object of the class COCOeval of one of the two packages."""
    with redirect_stdout(io.StringIO()):  # both print their progress or their metrics
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return CocoStatistics(evaluation.stats.tolist(), evaluation.eval["precision"])


def _to_annotations(detections: DetectionTable) -> list[dict[str, Any]]:
    """Convert detections to pycocotools' annotations, with ids counted from 1."""
    if isinstance(detections.shapes, np.ndarray):
        key, shapes = "bbox", detections.shapes.tolist()
        areas = (detections.shapes[:, 2] * detections.shapes[:, 3]).tolist()
    else:
        key, shapes, areas = "segmentation", detections.shapes, [float(rle.area(code)) for code in detections.shapes]
    columns = (column.tolist() for column in (detections.images, detections.categories, detections.scores))
    return [
        {"id": id, "image_id": image, "category_id": category, "score": score, key: shape, "area": area, "iscrowd": 0}
        for id, (image, category, score, shape, area) in enumerate(zip(*columns, shapes, areas, strict=True), start=1)
    ]


def _to_results(detections: DetectionTable) -> np.ndarray | list[dict[str, Any]]:
    """Convert detections to what hotcoco loads: boxes to an array (N, 7), masks to the entries of a results file.

    Entries have no box, because hotcoco takes the area of a detection from its box if there is one.
    """
    images, categories, scores, shapes = detections
    if isinstance(shapes, np.ndarray):
        return np.column_stack([images, shapes, scores, categories])
    return [
        {"image_id": image, "category_id": category, "segmentation": code, "score": score}
        for image, category, code, score in zip(
            images.tolist(), categories.tolist(), shapes, scores.tolist(), strict=True
        )
    ]
