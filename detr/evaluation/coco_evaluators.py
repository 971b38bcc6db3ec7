"""The packages that compute COCO's metrics: pycocotools, and faster-coco-eval for bit-identical results in less time.

pycocotools is the reference. faster-coco-eval is an optional package, written in C++. Its own results differ slightly
from those of pycocotools; `_add_to_divisors` removes the difference.
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
# A COCO JSON with images, categories and annotations. Ids count from 1, and every key that evaluators read is present.
Dataset = dict[str, Any]

LONE_MATCH_PRECISION = 1 - 2**-52  # pycocotools' precision after a correct first detection: 1 / (1 + 2^-52)


class CocoStatistics(NamedTuple):
    """The result of an evaluation, bit-identical for all evaluators."""

    numbers: list[float]  # COCO's 12 metrics, in the order of COCOeval.stats
    precision: np.ndarray  # (10 IoUs, 101 recalls, K classes, 4 areas, 3 detection limits); -1 if there is no object


def select_evaluator(name: Evaluator) -> Callable[[Dataset, Dataset, IouType], CocoStatistics]:
    """Select a function that evaluates detections: (ground truth, detections, IoU type) -> `CocoStatistics`.

    "auto" selects faster-coco-eval if it is installed, and pycocotools otherwise.

    Raises:
        UserError: the evaluator is not installed.
    """
    fast_is_installed = find_spec("faster_coco_eval") is not None
    if name == "faster_coco_eval" and not fast_is_installed:
        raise UserError(
            "task.evaluator=faster_coco_eval, but that package is not installed: pip install faster-coco-eval, or give "
            "task.evaluator=auto, which gives the same numbers."
        )
    return _with_pycocotools if name == "pycocotools" or not fast_is_installed else _with_faster_coco_eval


def _with_pycocotools(truth: Dataset, detections: Dataset, iou_type: IouType) -> CocoStatistics:
    with redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation = COCOeval(_index(COCO, truth), _index(COCO, detections), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return CocoStatistics(evaluation.stats.tolist(), evaluation.eval["precision"])


def _with_faster_coco_eval(truth: Dataset, detections: Dataset, iou_type: IouType) -> CocoStatistics:
    import faster_coco_eval  # not at the top, because it is optional

    evaluation = faster_coco_eval.COCOeval_faster(
        _index(faster_coco_eval.COCO, truth), _index(faster_coco_eval.COCO, detections), iou_type
    )
    recalls, max_objects = evaluation.params.recThrs, max(1, len(truth["annotations"]))
    evaluation.params.recThrs = np.concatenate([recalls, 0.5 ** np.arange(max_objects.bit_length())])
    evaluation.evaluate()
    evaluation.accumulate()
    precision, halves = np.split(evaluation.eval["precision"], [len(recalls)], axis=1)
    precision = np.ascontiguousarray(precision)  # the rounding of a mean depends on the memory layout
    _add_to_divisors(precision, halves, _count_objects(truth, evaluation.params.areaRng))
    evaluation.params.recThrs, evaluation.eval["precision"] = recalls, precision
    evaluation.summarize()
    return CocoStatistics(evaluation.stats.tolist(), precision)


def _add_to_divisors(precision: np.ndarray, halves: np.ndarray, objects: np.ndarray) -> None:
    """Change precisions of 1 to the values that pycocotools computes, in place.

    To avoid a division by zero, pycocotools adds 2^-52 to the number of detections and divides by the sum. For 2 or
    more detections, the sum is rounded to their number, so only the precision after the first detection changes. The
    precision at a recall is the highest precision at this or any higher recall. Therefore a precision of 1 changes only
    if the first detection is correct and the second is wrong or missing.

    With n >= 2 objects, the first two detections are correct exactly if the precision is 1 at a recall in (1/n, 2/n].
    This interval contains one power of two, and `halves` holds the precision at this recall.

    Args:
        precision: (T IoUs, R recalls, K classes, A areas, M detection limits), at COCO's recalls.
        halves: (T, P, K, A, M), the precisions at the P recalls 1, 1/2, 1/4, ...
        objects: (K, A), the number of objects of each class in each range of areas.
    """
    for (k, a), n in np.ndenumerate(objects):
        power = (int(n) - 1).bit_length() - 1  # 1/n < 2^-power <= 2/n
        two_correct = halves[:, power, k, a] == 1 if n > 1 else np.zeros(halves[:, 0, k, a].shape, bool)  # (T, M)
        curve = precision[:, :, k, a]  # (T, R, M)
        curve[(curve == 1) & ~two_correct[:, None]] = LONE_MATCH_PRECISION


def _count_objects(truth: Dataset, areas: list[list[float]]) -> np.ndarray:
    """Count the objects (K, A) of each class in each range of areas, bounds included, without crowds."""
    objects = [a for a in truth["annotations"] if not a["iscrowd"]]
    classes = np.array([a["category_id"] for a in objects], dtype=np.int64)
    area = np.array([a["area"] for a in objects], dtype=np.float64)
    length = len(truth["categories"]) + 1
    by_area = [classes[(area >= low) & (area <= high)] for low, high in areas]
    return np.stack([np.bincount(ids, minlength=length)[1:] for ids in by_area], axis=1)


def _index(coco_class: Any, dataset: Dataset) -> Any:
    """Create an indexed COCO object from `dataset`; `coco_class` is the class COCO of one of the two packages."""
    coco = coco_class()
    coco.dataset = dataset
    coco.createIndex()
    return coco
