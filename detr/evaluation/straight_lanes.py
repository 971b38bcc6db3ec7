"""Straight lanes as baselines: the mean road of train, and the straight lines that fit an image's own lanes best."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from detr.data.lane_labels import MISSING, LaneLabels
from detr.evaluation.lane_scores import Lane, slope


class StraightLane(NamedTuple):
    """A straight lane, in pixels."""

    intercept: float  # x at y = 0
    slope: float  # dx/dy
    top: float  # y of its upper end
    bottom: float  # y of its lower end

    def at(self, rows: Lane) -> Lane:
        """Return x at each row (P,), and `MISSING` beyond the ends."""
        inside = (rows >= self.top) & (rows <= self.bottom)
        lane: Lane = np.where(inside, self.intercept + self.slope * rows, MISSING)
        return lane


def fit(lane: Lane, rows: Lane) -> StraightLane:
    """Fit a straight line to a lane's points by least squares; it has the ends of the lane."""
    points, steepness = lane >= 0, slope(lane, rows)
    x, y = lane[points], rows[points]
    return StraightLane(float(x.mean() - steepness * y.mean()), steepness, float(y.min()), float(y.max()))


def mean_road(labels: Sequence[LaneLabels]) -> list[StraightLane]:
    """Return the straight lanes of the mean road, from left to right; an empty list if no image has a lane.

    Of the images with the most frequent number of lanes, the first lanes from the left are fitted by one straight line,
    and so are the second, and so on. The ends are the means of the lanes' ends.
    """
    roads = [(_left_to_right(image), image.rows) for image in labels if image.with_points()]
    if not roads:
        return []
    counts = Counter(len(lanes) for lanes, _ in roads)
    frequent = min(counts, key=lambda number: (-counts[number], number))  # the smallest of equally frequent numbers
    roads = [(lanes, rows) for lanes, rows in roads if len(lanes) == frequent]
    road = []
    for number in range(frequent):
        lanes = [(lanes[number], rows) for lanes, rows in roads]
        x = np.concatenate([lane[lane >= 0] for lane, _ in lanes])
        y = np.concatenate([rows[lane >= 0] for lane, rows in lanes])
        line = fit(x, y)
        ends = np.array([(rows[lane >= 0].min(), rows[lane >= 0].max()) for lane, rows in lanes]).mean(0)
        road.append(line._replace(top=float(ends[0]), bottom=float(ends[1])))
    return road


def _left_to_right(image: LaneLabels) -> list[Lane]:
    """Return an image's lanes, sorted by the x at which the lines fitted to them reach the last row."""
    last = float(image.rows[-1])

    def position(lane: Lane) -> float:
        line = fit(lane, image.rows)
        return line.intercept + line.slope * last

    return sorted(image.with_points(), key=position)
