"""The programs that match and count by COCO's rules: pycocotools, and faster-coco-eval for the same bits sooner.

pycocotools is the reference. faster-coco-eval (an optional package) does its work in C++; its one departure is mended
here, so that which of them counts can be told from the time alone.
"""

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from common.errors import UserError

Evaluator = Literal["auto", "pycocotools", "faster_coco_eval"]
IouType = Literal["bbox", "segm"]
Dataset = dict[str, Any]  # images, categories and annotations, numbered from 1, with every key that is read

LONE_MATCH_PRECISION = 1 - 2**-52  # pycocotools' precision of 1 right detection among 1: it adds 2^-52 to every divisor


class CocoStatistics(NamedTuple):
    """What was counted, the same for all evaluators to the last bit."""

    numbers: list[float]  # COCO's 12, in its order
    precision: np.ndarray  # (10 IoUs, 101 recalls, K classes, 4 areas, 3 limits of detections); -1 without objects


def select_evaluator(name: Evaluator) -> Callable[[Dataset, Dataset, IouType], CocoStatistics]:
    """The evaluator by that name, from ground truth and detections to counts; auto is the fastest that is installed.

    Raises:
        UserError: it is not installed.
    """
    found = find_spec("faster_coco_eval") is not None
    if name == "faster_coco_eval" and not found:
        raise UserError(
            "task.evaluator=faster_coco_eval, but that package is not installed: pip install faster-coco-eval, or give "
            "task.evaluator=auto, whose numbers are the same."
        )
    return _with_pycocotools if name == "pycocotools" or not found else _with_faster_coco_eval


def _with_pycocotools(truth: Dataset, detections: Dataset, kind: IouType) -> CocoStatistics:
    with redirect_stdout(io.StringIO()):  # it prints its progress
        evaluation = COCOeval(_index(COCO, truth), _index(COCO, detections), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return CocoStatistics(evaluation.stats.tolist(), evaluation.eval["precision"])


def _with_faster_coco_eval(truth: Dataset, detections: Dataset, kind: IouType) -> CocoStatistics:
    import faster_coco_eval  # here, because it is optional

    evaluation = faster_coco_eval.COCOeval_faster(
        _index(faster_coco_eval.COCO, truth), _index(faster_coco_eval.COCO, detections), kind
    )
    recalls, most = evaluation.params.recThrs, max(1, len(truth["annotations"]))
    evaluation.params.recThrs = np.concatenate([recalls, 0.5 ** np.arange(most.bit_length())])
    evaluation.evaluate()
    evaluation.accumulate()
    precision, halves = np.split(evaluation.eval["precision"], [len(recalls)], axis=1)
    precision = np.ascontiguousarray(precision)  # a mean depends on the order in memory
    _add_to_divisors(precision, halves, _objects(truth, evaluation.params.areaRng))
    evaluation.params.recThrs, evaluation.eval["precision"] = recalls, precision
    evaluation.summarize()
    return CocoStatistics(evaluation.stats.tolist(), precision)


def _add_to_divisors(precision: np.ndarray, halves: np.ndarray, objects: np.ndarray) -> None:
    """Give a precision of 1 the value that it has with pycocotools, in place.

    pycocotools adds 2^-52 to the number of detections, lest it be zero. Next to 2 and more that is rounded away, so it
    only shows where the first detection is right and the next one is not. Whether the next one is right, the
    precision at a recall of more than 1/n and at most 2/n tells, of n objects: exactly one power of two lies there.

    Args:
        precision: (T, R, K, A, M) at COCO's recalls.
        halves: (T, P, K, A, M) the same at the recalls 1, 1/2, 1/4, ...
        objects: (K, A) how many there are of each class in each range of areas.
    """
    for (k, a), n in np.ndenumerate(objects):
        two = halves[:, (int(n) - 1).bit_length() - 1, k, a] == 1 if n > 1 else np.zeros(halves[:, 0, k, a].shape, bool)
        curve = precision[:, :, k, a]  # (T, R, M)
        curve[(curve == 1) & ~two[:, None]] = LONE_MATCH_PRECISION


def _objects(truth: Dataset, areas: list[list[float]]) -> np.ndarray:
    """(K, A) objects by class and range of areas, whose borders belong to it; crowds are none."""
    counted = [a for a in truth["annotations"] if not a["iscrowd"]]
    classes = np.array([a["category_id"] for a in counted], dtype=np.int64)
    area = np.array([a["area"] for a in counted], dtype=np.float64)
    number = len(truth["categories"]) + 1
    within = [classes[(area >= low) & (area <= high)] for low, high in areas]
    return np.stack([np.bincount(some, minlength=number)[1:] for some in within], axis=1)


def _index(maker: Any, dataset: Dataset) -> Any:
    """The dataset in either program's own class."""
    coco = maker()
    coco.dataset = dataset
    coco.createIndex()
    return coco
