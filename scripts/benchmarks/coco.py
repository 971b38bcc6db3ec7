"""COCO's numbers of a whole evaluation set, against pycocotools used as its demo shows (Lin et al. 2014, 1405.0312)."""

import io
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
from scripts.benchmarks.timing import Disagreement, Row, Setting

CLASSES, HEIGHT, WIDTH = 80, 480, 640
OBJECTS = 7.3  # in an image on average, as in COCO's val2017; 1.2 % of its annotations are crowds
CROWDS = 0.012
QUERIES = 100
BATCH = 8


def evaluation(setting: Setting) -> Row:
    """All 12 box numbers of val2017's 5,000 images, with a detector's 100 answers to each.

    pycocotools starts from the lines of a results file in memory, ours from the answers of the model.
    """
    images = 20 if setting.tiny else 5000
    ground_truth, answers = scene(images)
    lines = list(_filled(ground_truth, answers, "pycocotools").results("bbox"))

    def their() -> list[float]:
        with redirect_stdout(io.StringIO()):
            truth = COCO()
            truth.dataset = ground_truth
            truth.createIndex()
            counted = COCOeval(truth, truth.loadRes(lines), "bbox")
            counted.evaluate()
            counted.accumulate()
            counted.summarize()
        return counted.stats.tolist()

    def our(evaluator: Evaluator) -> list[float]:
        return list(_filled(ground_truth, answers, evaluator).compute().values())

    contenders = {
        "pycocotools": their,
        "ours with pycocotools": lambda: our("pycocotools"),
        "ours with faster-coco-eval": lambda: our("faster_coco_eval"),
    }

    def check() -> str:
        truth = their()
        for name, work in contenders.items():
            identical(name, work(), truth)
        return f"{len(truth)} numbers identical, AP {truth[0]:.3f}"

    return Row(
        name=f"evaluation of {images:,} images, {QUERIES} detections each",
        contenders=contenders,
        pairs=[("ours with faster-coco-eval", "pycocotools"), ("ours with pycocotools", "pycocotools")],
        check=check,
        threads=1,
    )


ROWS = {"evaluation": evaluation}


def identical(name: str, numbers: list[float], truth: list[float]) -> None:
    """Raise Disagreement unless all numbers are the same to the last bit."""
    for key, number, right in zip(NAMES, numbers, truth, strict=True):
        if number != right:
            raise Disagreement(f"{name}: {key} is {number!r} and not {right!r}, so this is not the same work.")


def scene(images: int) -> tuple[dict[str, Any], list[Answer]]:
    """A ground truth with COCO's classes, sizes and crowds, and the answers of a fair detector."""
    draw = np.random.default_rng(0)
    common = 1 / np.arange(1, CLASSES + 1)  # classes by rank: few are common, many are rare
    pictures, annotations, answers = [], [], []
    for image in range(1, images + 1):
        pictures.append({"id": image, "file_name": f"{image}.jpg", "height": HEIGHT, "width": WIDTH})
        present = draw.choice(CLASSES, size=3, p=common / common.sum())
        boxes = _boxes(draw.poisson(OBJECTS), draw)
        labels = draw.choice(present, size=len(boxes))
        for box, label in zip(boxes, labels, strict=True):
            corner, size = box[:2], box[2:] - box[:2]
            annotation = {"id": len(annotations) + 1, "image_id": image, "category_id": int(label) + 1}
            annotation |= {"bbox": [*corner.tolist(), *size.tolist()], "area": 0.6 * float(size.prod())}
            annotations.append(annotation | {"iscrowd": int(draw.random() < CROWDS)})
        answers.append(_answer(boxes, labels, present, draw))
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, CLASSES + 1)]
    return {"images": pictures, "annotations": annotations, "categories": categories}, answers


def _boxes(number: int, draw: np.random.Generator) -> np.ndarray:
    """(number, 4) xyxy within the image, of 4 to 400 pixels, half of them under some 60."""
    centres = draw.random((number, 2)) * [WIDTH, HEIGHT]
    half = np.exp(draw.normal(4.1, 1.0, (number, 2))).clip(4, 400) / 2
    low = (centres - half).clip(0, [WIDTH - 1, HEIGHT - 1])
    return np.concatenate([low, (centres + half).clip(low + 1, [WIDTH, HEIGHT])], axis=1)


def _answer(boxes: np.ndarray, labels: np.ndarray, present: np.ndarray, draw: np.random.Generator) -> Answer:
    """Each object found with some error, mostly in the right class, and low scores elsewhere, in random order."""
    found = min(len(boxes), QUERIES)
    sizes = np.tile(boxes[:found, 2:] - boxes[:found, :2], 2)
    near = boxes[:found] + 0.08 * sizes * draw.normal(size=(found, 4))
    near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
    confused = draw.random(found) < 0.1
    right = np.where(confused, draw.integers(0, CLASSES, found), labels[:found])
    likely = np.concatenate([present, draw.integers(0, CLASSES, 8)])
    false = QUERIES - found
    order = draw.permutation(QUERIES)
    return {
        "boxes": torch.from_numpy(np.concatenate([near, _boxes(false, draw)])[order]).float(),
        "scores": torch.from_numpy(np.concatenate([draw.beta(4, 2, found), draw.beta(1, 12, false)])[order]).float(),
        "labels": torch.from_numpy(np.concatenate([right, draw.choice(likely, size=false)])[order]),
    }


def _filled(ground_truth: dict[str, Any], answers: list[Answer], evaluator: Evaluator) -> CocoMetric:
    """Our metric after the last batch."""
    metric = CocoMetric(ground_truth, ground_truth["categories"], evaluator)
    ids = [image["id"] for image in ground_truth["images"]]
    for start in range(0, len(ids), BATCH):
        metric.update({"ids": ids[start : start + BATCH]}, answers[start : start + BATCH])
    metric.gather()
    return metric
