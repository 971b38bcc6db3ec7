import numpy as np
import pytest

from detr.data.lane_labels import LaneLabels
from detr.evaluation.straight_lanes import fit, mean_road

ROWS = np.array([10.0, 20.0, 30.0, 40.0])


def image(*lanes: list[float]) -> LaneLabels:
    return LaneLabels("a.png", ROWS, np.array(lanes).reshape(-1, len(ROWS)), "labels, line 1")


def test_a_straight_lane_is_fitted_exactly_between_its_ends():
    line = fit(np.array([-2.0, 25.0, 27.0, 29.0]), ROWS)
    assert line == pytest.approx((21.0, 0.2, 20.0, 40.0))
    assert line.at(ROWS).tolist() == pytest.approx([-2.0, 25.0, 27.0, 29.0])


def test_a_curved_lane_is_fitted_by_least_squares():
    lane = np.array([1.0, 5.0, 2.0, 9.0])
    slope, intercept = np.polyfit(ROWS, lane, 1)
    assert fit(lane, ROWS)[:2] == pytest.approx((intercept, slope))


def test_the_mean_road_is_that_of_the_most_frequent_number_of_lanes():
    """Two images have two lanes, in either order: x = 10 and 14 on the left, 50 and 60 + y on the right."""
    images = [
        image([10.0] * 4, [50.0] * 4),
        image([70.0, 80.0, 90.0, 100.0], [-2.0, 14.0, 14.0, 14.0]),
        image([0.0] * 4),
        image(),
    ]
    left, right = mean_road(images)
    x, y = np.array([10.0] * 4 + [14.0] * 3), np.concatenate([ROWS, ROWS[1:]])
    slope, intercept = np.polyfit(y, x, 1)
    assert left == pytest.approx((intercept, slope, 15.0, 40.0))
    assert right == pytest.approx((55.0, 0.5, 10.0, 40.0))


def test_no_lanes_give_no_road():
    assert mean_road([image(), LaneLabels("b.png", ROWS, None, "")]) == []
