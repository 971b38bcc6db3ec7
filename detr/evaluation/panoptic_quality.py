"""Panoptic quality (Kirillov et al. 2019, arXiv:1801.00868, section 4), with the definition of COCO's evaluation.

A predicted and a true segment match if they have the same category and an IoU above 0.5; crowds never match. In the
IoU, the true segment's area is that stated by the ground truth's JSON, and predicted pixels without a true label (VOID)
do not count.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from detr.data.panoptic import Segment
from detr.data.panoptic_png import VOID


class ClassCounts(NamedTuple):
    """The segments of one class that match or do not match, in one or more images."""

    ious: list[float]  # of the matched pairs
    false_positives: int  # predicted segments without a match
    false_negatives: int  # true segments without a match


class Quality(NamedTuple):
    """The qualities of a class, or their means over classes; PQ = SQ * RQ for a class."""

    PQ: float  # panoptic quality
    SQ: float  # segmentation quality: mean IoU of the matched pairs
    RQ: float  # recognition quality: F1 score


UNDEFINED = Quality(-1.0, -1.0, -1.0)  # of no class


def match_segments(
    truth_ids: NDArray[np.integer],
    truth: Sequence[Segment],
    ids: NDArray[np.integer],
    categories: Mapping[int, int],
) -> dict[int, ClassCounts]:
    """Match the predicted segments of an image to the true ones; returns the counts of each category that occurs.

    Args:
        truth_ids: (H, W) segment ids of the ground truth; VOID where a pixel has no label.
        truth: the segments of the ground truth.
        ids: (H, W) segment ids of the prediction; VOID where there is no segment.
        categories: predicted segment id -> its category id. Each of these segments has a pixel.
    """
    overlaps = _overlaps(truth_ids, [segment.id for segment in truth], ids, list(categories))  # (T + 1, P + 1)
    areas, void = overlaps[:, 1:].sum(axis=0), overlaps[0, 1:]  # (P,) pixels of predicted segments, all and in VOID
    overlaps = overlaps[1:, 1:]  # (T, P)
    truth_areas = np.array([segment.area for segment in truth], dtype=np.float64)
    crowd = np.array([segment.is_crowd for segment in truth], dtype=bool)
    truth_classes = np.array([segment.category for segment in truth], dtype=np.int64)
    classes = np.array(list(categories.values()), dtype=np.int64)
    ious = overlaps / (areas + truth_areas[:, None] - overlaps - void)
    matched = (truth_classes[:, None] == classes) & ~crowd[:, None] & (ious > 0.5)  # (T, P)

    # A prediction is not counted if more than half of it lies in VOID and in the crowd of its class. As in COCO's
    # evaluation, only the last crowd of a class is considered.
    crowd_rows = {segment.category: row for row, segment in enumerate(truth) if segment.is_crowd}
    ignored = void.copy()  # (P,)
    for column, category in enumerate(classes.tolist()):
        if category in crowd_rows:
            ignored[column] += overlaps[crowd_rows[category], column]
    false_positive = ~matched.any(axis=0) & ~(ignored / areas > 0.5)
    false_negative = ~matched.any(axis=1) & ~crowd
    return {
        category: ClassCounts(
            ious[matched & (truth_classes == category)[:, None]].tolist(),
            int(false_positive[classes == category].sum()),
            int(false_negative[truth_classes == category].sum()),
        )
        for category in sorted({*truth_classes.tolist(), *classes.tolist()})
    }


def _overlaps(
    truth_ids: NDArray[np.integer], truth: Sequence[int], ids: NDArray[np.integer], predicted: Sequence[int]
) -> NDArray[np.int64]:
    """Count the common pixels of each true and each predicted segment: (T + 1, P + 1), in row and column 0 of VOID."""
    rows, columns = _positions(truth_ids, truth), _positions(ids, predicted)
    width = len(predicted) + 1
    counts = np.bincount((rows * width + columns).ravel(), minlength=(len(truth) + 1) * width)
    return counts.reshape(-1, width)


def _positions(ids: NDArray[np.integer], listed: Sequence[int]) -> NDArray[np.int64]:
    """Map each of `ids` (H, W) to 0 if it is VOID, and otherwise to 1 + its position in `listed`."""
    values = np.array([VOID, *listed], dtype=np.int64)
    order = np.argsort(values)
    positions: NDArray[np.int64] = order[np.searchsorted(values, ids, sorter=order).clip(max=len(order) - 1)]
    assert (values[positions] == ids).all(), "each pixel's segment must be listed"
    return positions


def merge(counts: Iterable[Mapping[int, ClassCounts]]) -> dict[int, ClassCounts]:
    """Add up the counts of images, by category id."""
    total: dict[int, ClassCounts] = {}
    for of_image in counts:
        for category, new in of_image.items():
            old = total.get(category, ClassCounts([], 0, 0))
            total[category] = ClassCounts(
                old.ious + new.ious,
                old.false_positives + new.false_positives,
                old.false_negatives + new.false_negatives,
            )
    return total


def class_quality(counts: ClassCounts) -> Quality | None:
    """Return the qualities of a class; None if it has neither a true segment nor a prediction that counts."""
    matches = len(counts.ious)
    divisor = matches + 0.5 * counts.false_positives + 0.5 * counts.false_negatives
    if not divisor:
        return None
    total = math.fsum(counts.ious)  # correctly rounded, so the order of the images does not matter
    return Quality(total / divisor, total / matches if matches else 0.0, matches / divisor)


def mean_quality(qualities: Sequence[Quality]) -> Quality:
    """Return the means over classes, or UNDEFINED if there is none."""
    if not qualities:
        return UNDEFINED
    return Quality(*(math.fsum(values) / len(qualities) for values in zip(*qualities, strict=True)))
