"""TuSimple's scores of the lanes of one image, with the arithmetic of the official script (evaluate/lane.py).

The script is part of the benchmark of TuSimple's Lane Detection Challenge. Numbers agree with it in all its
peculiarities: rows in which neither the label nor the prediction has a point count as right; several lanes may match
the same prediction, which makes the share of false positives negative; with five lanes the worst does not count.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MATCHED = 0.85  # accuracy from which a lane is found
MAX_SURPLUS = 2  # number of predictions beyond the number of lanes with which an image still counts
COUNTED = 4  # at most this number of lanes counts
MAX_RUN_TIME = 200.0  # milliseconds for one image, in the official script
ABSENT = -100.0  # replaces every negative x

Lane = NDArray[np.float64]  # (P,) x in pixels at each row; negative where there is no point


class Scores(NamedTuple):
    """The scores of one image; those of a split are the means over its images."""

    accuracy: float
    false_positives: float  # share of the predictions
    false_negatives: float  # share of the lanes


def score(
    predicted: Sequence[Lane], lanes: Sequence[Lane], rows: Lane, tolerance: float, run_time: float = 0.0
) -> Scores:
    """Compare predicted lanes with the labelled `lanes` of an image, both given at `rows` (P,).

    A point is right if its horizontal distance is below `tolerance` / cos(angle) pixels, where `angle` is that of the
    labelled lane from the vertical; the official tolerance is 20 pixels of an image 1,280 pixels wide. `run_time` is in
    milliseconds.
    """
    if run_time > MAX_RUN_TIME or len(predicted) > len(lanes) + MAX_SURPLUS:
        return Scores(0.0, 0.0, 1.0)
    best = [max((_accuracy(p, lane, rows, tolerance) for p in predicted), default=0.0) for lane in lanes]
    matched = sum(value >= MATCHED for value in best)
    missed, total = len(lanes) - matched, sum(best)
    if len(lanes) > COUNTED:
        total -= min(best)
        missed -= missed > 0
    counted = max(min(COUNTED, len(lanes)), 1)
    surplus = (len(predicted) - matched) / len(predicted) if predicted else 0.0
    return Scores(total / counted, surplus, missed / counted)


def _accuracy(predicted: Lane, lane: Lane, rows: Lane, tolerance: float) -> float:
    """Return the share of rows in which a prediction is right, or in which neither has a point."""
    assert len(predicted) == len(lane) == len(rows)
    limit = tolerance / np.cos(np.arctan(slope(lane, rows)))
    distance = np.abs(np.where(predicted >= 0, predicted, ABSENT) - np.where(lane >= 0, lane, ABSENT))
    return float((distance < limit).mean())


def slope(lane: Lane, rows: Lane) -> float:
    """Return the slope dx/dy of the line fitted to a lane's points by least squares; 0 for fewer than two points."""
    points = lane >= 0
    if points.sum() < 2:
        return 0.0
    x, y = lane[points], rows[points]
    centred = y - y.mean()
    return float((centred * (x - x.mean())).sum() / (centred * centred).sum())
