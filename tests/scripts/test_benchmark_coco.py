"""The COCO evaluation row of the benchmark: identical numbers before times, on plausible data."""

from pathlib import Path

import pytest
import torch

from scripts.benchmarks import coco
from scripts.benchmarks.timing import MismatchError, Setting, measure

pytest.importorskip("hotcoco")


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(device=torch.device("cpu"), tiny=True, compile=False, images=None, scratch=tmp_path)


def test_the_row_runs_and_its_numbers_are_plausible(setting: Setting) -> None:
    row = coco.ROWS["evaluation"](setting)
    measurement = measure(row, rounds=1, warm_up=0, device=setting.device)
    assert "12 numbers identical" in measurement["agreement"]
    assert {ratio["other"] for ratio in measurement["ratios"]} == {"pycocotools"}
    numbers = [tuple(work()) for work in row.contenders.values()]
    assert len(set(numbers)) == 1 and all(0.1 < number < 0.95 for number in numbers[0])


def test_nothing_is_timed_if_one_bit_differs(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    original = coco.CocoMetric.compute

    def patched(metric: coco.CocoMetric) -> dict[str, float]:
        numbers = original(metric)
        return numbers | {"AR10": numbers["AR10"] + 2**-53} if metric.evaluator == "hotcoco" else numbers

    monkeypatch.setattr(coco.CocoMetric, "compute", patched)
    row = coco.evaluation(setting)
    with pytest.raises(MismatchError, match="ours with hotcoco: AR10"):
        row.check()


def test_the_sampled_data_set_resembles_coco() -> None:
    ground_truth, answers = coco.sample_dataset(300)
    per_image = len(ground_truth["annotations"]) / len(ground_truth["images"])
    assert per_image == pytest.approx(7.3, abs=0.5)
    small = [a["area"] < 32**2 for a in ground_truth["annotations"]]
    assert 0.3 < sum(small) / len(small) < 0.5  # 41 % of COCO's objects are small
    assert all(len(answer["scores"]) == 100 for answer in answers)
