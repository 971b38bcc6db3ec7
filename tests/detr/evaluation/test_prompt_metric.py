"""The metrics by hand, over batches and ranks, and files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from detr.evaluation.prompt_metric import PromptMetric


def answer(ious: list[list[float]], predicted: list[list[float]], oracle: list[float]) -> dict[str, Any]:
    return {
        "ious": torch.tensor(ious, dtype=torch.float64).reshape(-1, 2),
        "predicted": torch.tensor(predicted, dtype=torch.float64).reshape(-1, 2),
        "oracle": torch.tensor(oracle, dtype=torch.float64),
    }


ANSWERS = [
    answer([[0.5, 0.9], [0.1, 0.3]], [[0.7, 0.8], [0.15, 0.2]], [0.6, 0.4]),
    answer([], [], []),
    answer([[0.9, 1.0]], [[1.05, 0.95]], [0.9]),
]


def metric(batches: list[list[int]]) -> PromptMetric:
    made = PromptMetric(images=3, clicks=2)
    for ids in batches:
        made.update({"ids": ids}, [ANSWERS[i] for i in ids])
    made.gather()
    return made


@pytest.mark.parametrize("batches", [[[0, 1, 2]], [[2], [0, 1]]])
def test_the_metrics_are_means_over_all_objects(batches: list[list[int]]) -> None:
    numbers = metric(batches).compute()
    expected = {
        "mIoU_1": (0.5 + 0.1 + 0.9) / 3,
        "mIoU_2": (0.9 + 0.3 + 1.0) / 3,
        "oracle_1": (0.6 + 0.4 + 0.9) / 3,
        "iou_error_1": (0.2 + 0.05 + 0.15) / 3,
        "iou_error_2": (0.1 + 0.1 + 0.05) / 3,
    }
    assert numbers == pytest.approx(expected)


def test_the_calibration_groups_masks_by_their_predicted_iou() -> None:
    header, *rows = metric([[0, 1, 2]]).details()
    assert header == ("predicted_from", "predicted_to", "masks", "mean_predicted", "mean_actual")
    assert [row[2] for row in rows] == [1, 1, 1, 1, 2] and sum(row[2] for row in rows) == 6
    first, last = rows[0], rows[-1]
    assert first == pytest.approx((0.1, 0.2, 1, 0.15, 0.1))
    assert last == pytest.approx((0.9, 1.0, 2, 1.0, 0.95)), "a prediction above 1 is in the last range"


def test_a_split_without_objects_has_no_numbers() -> None:
    empty = PromptMetric(images=1, clicks=2)
    empty.update({"ids": [1]}, [ANSWERS[1]])
    empty.gather()
    assert empty.compute() == {} and len(empty.details()) == 1


def test_a_missing_image_is_noticed_and_a_part_of_a_split_can_be_evaluated() -> None:
    part = PromptMetric(images=3, clicks=2)
    part.update({"ids": [2]}, [ANSWERS[2]])
    with pytest.raises(AssertionError, match="1 of 3 samples"):
        part.gather()
    part.restrict(1)
    part.gather()
    assert part.compute()["mIoU_1"] == pytest.approx(0.9)


def test_the_file_holds_the_values_of_each_object(tmp_path: Path) -> None:
    metric([[0, 1, 2]]).write(tmp_path)
    images = json.loads((tmp_path / "prompts.json").read_text())
    assert [len(image["objects"]) for image in images] == [2, 0, 1]
    expected = {"iou_1": 0.5, "iou_2": 0.9, "predicted_1": 0.7, "predicted_2": 0.8, "oracle_1": 0.6}
    assert images[0]["objects"][0] == pytest.approx(expected)
