"""Benchmark our COCO metrics (Lin et al. 2014, arXiv 1405.0312) on a whole evaluation set against pycocotools.

pycocotools is called as in its demo.
"""

import io
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from common.task import Answer
from detr.evaluation.coco_evaluators import Evaluator
from detr.evaluation.coco_metric import CocoMetric
from detr.evaluation.coco_numbers import NAMES
from scripts.benchmarks.timing import MismatchError, Row, Setting

CLASSES, HEIGHT, WIDTH = 80, 480, 640
MEAN_OBJECTS = 7.3  # per image, as in COCO's val2017
CROWD_FRACTION = 0.012  # of all annotations, as in val2017
QUERIES = 100
BATCH = 8


def evaluation(setting: Setting) -> Row:
    """Build a benchmark that times the 12 box metrics of 5,000 images, as many as in val2017, with 100 detections each.

    With `setting.tiny`, there are 20 images. pycocotools starts from the entries of a results file, which are already
    in memory. Our metric starts from the detector's answers.
    """
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # hotcoco reads it when it first computes
    images = 20 if setting.tiny else 5000
    ground_truth, answers = sample_dataset(images)
    results = list(_metric(ground_truth, answers, "pycocotools").results("bbox"))

    def run_pycocotools() -> list[float]:
        with redirect_stdout(io.StringIO()):
            coco_api = COCO()
            coco_api.dataset = ground_truth
            coco_api.createIndex()
            evaluation = COCOeval(coco_api, coco_api.loadRes(results), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return [float(number) for number in evaluation.stats]

    def run_ours(evaluator: Evaluator) -> list[float]:
        return list(_metric(ground_truth, answers, evaluator).compute().values())

    contenders: dict[str, Callable[[], list[float]]] = {
        "pycocotools": run_pycocotools,
        "ours with pycocotools": lambda: run_ours("pycocotools"),
        "ours with hotcoco": lambda: run_ours("hotcoco"),
    }

    def check() -> str:
        expected = run_pycocotools()
        for name, work in contenders.items():
            check_identical(name, work(), expected)
        return f"{len(expected)} numbers identical, AP {expected[0]:.3f}"

    return Row(
        name=f"evaluation of {images:,} images, {QUERIES} detections each",
        contenders=contenders,
        pairs=[("ours with hotcoco", "pycocotools"), ("ours with pycocotools", "pycocotools")],
        check=check,
        threads=1,
    )


ROWS = {"evaluation": evaluation}


def check_identical(name: str, numbers: list[float], expected: list[float]) -> None:
    """Raise MismatchError unless all numbers are identical to the last bit."""
    for key, number, expected_number in zip(NAMES, numbers, expected, strict=True):
        if number != expected_number:
            raise MismatchError(
                f"{name}: {key} is {number!r} and not {expected_number!r}, so this is not the same work."
            )


def sample_dataset(images: int) -> tuple[dict[str, Any], list[Answer]]:
    """Sample a ground truth as COCO JSON, and the answers of a fairly good detector.

    The ground truth is like COCO's in the numbers of classes and objects, the image size and the fraction of crowds.
    """
    rng = np.random.default_rng(0)
    frequencies = 1 / np.arange(1, CLASSES + 1)  # by rank: few classes are common, many are rare
    image_records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    answers = []
    for image in range(1, images + 1):
        image_records.append({"id": image, "file_name": f"{image}.jpg", "height": HEIGHT, "width": WIDTH})
        classes = rng.choice(CLASSES, size=3, p=frequencies / frequencies.sum())
        boxes = _sample_boxes(rng.poisson(MEAN_OBJECTS), rng)
        labels = rng.choice(classes, size=len(boxes))
        for box, label in zip(boxes, labels, strict=True):
            corner, extent = box[:2], box[2:] - box[:2]
            annotation: dict[str, Any] = {"id": len(annotations) + 1, "image_id": image, "category_id": int(label) + 1}
            annotation |= {"bbox": [*corner.tolist(), *extent.tolist()], "area": 0.6 * float(extent.prod())}
            annotations.append(annotation | {"iscrowd": int(rng.random() < CROWD_FRACTION)})
        answers.append(_sample_answer(boxes, labels, classes, rng))
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, CLASSES + 1)]
    return {"images": image_records, "annotations": annotations, "categories": categories}, answers


def _sample_boxes(count: int, rng: np.random.Generator) -> np.ndarray:
    """Sample boxes (count, 4) xyxy with sides of 4 to 400 pixels, half of them below about 60, clipped to the image."""
    centres = rng.random((count, 2)) * [WIDTH, HEIGHT]
    half_extents = np.exp(rng.normal(4.1, 1.0, (count, 2))).clip(4, 400) / 2
    low = (centres - half_extents).clip(0, [WIDTH - 1, HEIGHT - 1])
    return np.concatenate([low, (centres + half_extents).clip(low + 1, [WIDTH, HEIGHT])], axis=1)


def _sample_answer(boxes: np.ndarray, labels: np.ndarray, classes: np.ndarray, rng: np.random.Generator) -> Answer:
    """Sample 100 detections of one image: one per object, and false positives.

    The detection of an object has an inexact box and, in about nine of ten cases, the right class.
    """
    true = min(len(boxes), QUERIES)
    extents = np.tile(boxes[:true, 2:] - boxes[:true, :2], 2)
    true_boxes = boxes[:true] + 0.08 * extents * rng.normal(size=(true, 4))
    true_boxes[:, 2:] = np.maximum(true_boxes[:, 2:], true_boxes[:, :2] + 1)
    confused = rng.random(true) < 0.1
    true_labels = np.where(confused, rng.integers(0, CLASSES, true), labels[:true])
    false_classes = np.concatenate([classes, rng.integers(0, CLASSES, 8)])
    false = QUERIES - true
    order = rng.permutation(QUERIES)
    return {
        "boxes": torch.from_numpy(np.concatenate([true_boxes, _sample_boxes(false, rng)])[order]).float(),
        "scores": torch.from_numpy(np.concatenate([rng.beta(4, 2, true), rng.beta(1, 12, false)])[order]).float(),
        "labels": torch.from_numpy(np.concatenate([true_labels, rng.choice(false_classes, size=false)])[order]),
    }


def _metric(ground_truth: dict[str, Any], answers: list[Answer], evaluator: Evaluator) -> CocoMetric:
    """Return our metric, after `update` with all batches and `gather`."""
    metric = CocoMetric(ground_truth, ground_truth["categories"], evaluator)
    ids = [image["id"] for image in ground_truth["images"]]
    for start in range(0, len(ids), BATCH):
        metric.update({"ids": ids[start : start + BATCH]}, answers[start : start + BATCH])
    metric.gather()
    return metric
