import json

import numpy as np
import pytest
import torch

from common.errors import UserError
from detr.data.lane_labels import LaneLabels
from detr.evaluation.lane_metric import LaneMetric
from detr.evaluation.lane_scores import score
from detr.evaluation.straight_lanes import StraightLane

ROWS = np.arange(0.0, 100.0, 10.0)
CURVED = 200 + (ROWS - 50) ** 2 / 20  # deviates from every straight line by up to 45 pixels


def labels() -> list[LaneLabels]:
    images = [np.stack([np.full(10, 100.0), CURVED]), np.full((1, 10), 300.0), np.zeros((0, 10))]
    return [LaneLabels(f"{i}.png", ROWS, lanes, f"line {i}") for i, lanes in enumerate(images)]


def answer(lanes, scores, run_time=7.0):
    return {
        "lanes": torch.tensor(np.array(lanes)).reshape(-1, 10),
        "scores": torch.tensor(scores),
        "run_time": run_time,
    }


def evaluated(road=()) -> LaneMetric:
    """Both lanes of the first image are found beside one doubtful one; in the second image, the lane is 25 px off."""
    metric = LaneMetric(labels(), 20.0, road)
    metric.update({"ids": [2, 0]}, [answer([], []), answer([[100.0] * 10, CURVED, [5.0] * 10], [0.9, 0.8, 0.5])])
    metric.update({"ids": [1]}, [answer([[325.0] * 10], [0.6])])
    metric.gather()
    return metric


def test_numbers_are_means_over_images():
    numbers = evaluated().compute()
    assert numbers["accuracy"] == pytest.approx((1 + 0 + 0) / 3)
    assert numbers["FP"] == pytest.approx((0 + 1 + 0) / 3) and numbers["FN"] == pytest.approx((0 + 1 + 0) / 3)
    assert "mean_road_accuracy" not in numbers


def test_baselines_are_compared_on_the_same_images():
    numbers = evaluated([StraightLane(310.0, 0.0, 0.0, 100.0)]).compute()
    slope, intercept = np.polyfit(ROWS, CURVED, 1)
    share = (abs(intercept + slope * ROWS - CURVED) < 20 / np.cos(np.arctan(slope))).mean()
    assert 0.2 < share < 0.8 and numbers["straight_accuracy"] == pytest.approx(((1 + share) / 2 + 1 + 0) / 3)
    assert numbers["mean_road_accuracy"] == pytest.approx((0.05 + 1 + 0) / 3)  # one of ten rows of one of two lanes


def test_details_group_images_by_their_number_of_lanes():
    metric = evaluated()
    assert metric.details() == [("lanes", "images", "accuracy", "FP", "FN")]
    metric.compute()
    assert metric.details()[1:] == [(0, 1, 0.0, 0.0, 0.0), (1, 1, 0.0, 1.0, 1.0), (2, 1, 1.0, 0.0, 0.0)]


def test_the_submission_has_the_scores_of_compute(tmp_path):
    metric = evaluated()
    metric.write(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "lanes.json").read_text().splitlines()]
    assert [line["raw_file"] for line in lines] == ["0.png", "1.png", "2.png"] and lines[0]["run_time"] == 7.0
    assert [len(line["lanes"]) for line in lines] == [2, 1, 0]
    scores = [
        score([np.array(lane, dtype=float) for lane in line["lanes"]], list(image.lanes), ROWS, 20.0)
        for line, image in zip(lines, labels(), strict=True)
    ]
    assert np.mean(scores, 0).tolist() == [metric.compute()[name] for name in ("accuracy", "FP", "FN")]


def test_rows_without_a_point_are_written_as_minus_two(tmp_path):
    metric = LaneMetric(labels()[1:2], 20.0, [])
    metric.update({"ids": [0]}, [answer([[-2.0] * 5 + [301.25] * 5], [0.9])])
    metric.gather()
    metric.write(tmp_path)
    (line,) = (tmp_path / "lanes.json").read_text().splitlines()
    assert json.loads(line)["lanes"] == [[-2] * 5 + [301.25] * 5] and "-2.0" not in line


def test_a_split_without_lanes_has_no_numbers_but_a_submission(tmp_path):
    metric = LaneMetric([LaneLabels("0.png", ROWS, None, "line 1")], 20.0, [])
    metric.update({"ids": [0]}, [answer([CURVED], [0.9])])
    metric.gather()
    assert metric.compute() == {}
    metric.write(tmp_path)
    assert json.loads((tmp_path / "lanes.json").read_text())["lanes"] == [CURVED.tolist()]


def test_outputs_that_are_not_finite_are_refused():
    metric = LaneMetric(labels(), 20.0, [])
    with pytest.raises(UserError, match=r"^image 1.png: .*not finite"):
        metric.update({"ids": [1]}, [answer([[np.nan] * 10], [0.9])])


def test_fewer_images_are_accepted_only_after_restrict():
    metric = LaneMetric(labels(), 20.0, [])
    metric.restrict(1)
    metric.update({"ids": [1]}, [answer([[300.0] * 10], [0.9])])
    metric.gather()
    assert metric.compute()["accuracy"] == 1
    whole = LaneMetric(labels(), 20.0, [])
    whole.update({"ids": [1]}, [answer([[300.0] * 10], [0.9])])
    with pytest.raises(AssertionError, match="1 of 3 samples"):
        whole.gather()
