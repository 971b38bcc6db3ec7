import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from pycocotools import mask as rle

from common.errors import UserError
from detr.evaluation.coco_numbers import NAMES, evaluate_results, read_results

ORACLE = Path(os.environ.get("TRIPTYCH_DATA", "data")) / "coco_eval_oracle"
with_oracle = pytest.mark.skipif(not ORACLE.exists(), reason=f"the official COCO example is not at {ORACLE}")
with_both = pytest.mark.skipif(find_spec("hotcoco") is None, reason="hotcoco is not installed")
every_evaluator = pytest.mark.parametrize("evaluator", ["pycocotools", pytest.param("hotcoco", marks=with_both)])

# In the order of NAMES. The official val2014_fake_eval_res.txt has three digits of these, the README beside it all.
OFFICIAL = {
    "bbox": (
        "0.5045806987249628 0.6969727247299577 0.5729816669904824 0.5856257209410443 0.5193996948036719 "
        "0.5013978986347466 0.38681277964578054 0.5936795762842003 0.595352982877607 0.6398109626113442 "
        "0.5664205978994309 0.5642905982905982"
    ),
    "segm": (
        "0.3195452758576433 0.5622883972521636 0.29892653412086784 0.3873740315997837 0.31018272403369485 "
        "0.3269339071005138 0.2682297225711534 0.41544868114906375 0.4168394992198818 0.4694498622754236 "
        "0.37675922666197265 0.3814715099715099"
    ),
}


def truth(*annotations: dict) -> dict:
    """A ground truth of one image of 200 x 200 pixels with cats."""
    return {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 200, "height": 200}],
        "categories": [{"id": 7, "name": "cat"}],
        "annotations": [{"id": n} | annotation for n, annotation in enumerate(annotations, start=1)],
    }


def oracle(name: str) -> list | dict:
    return json.loads((ORACLE / name).read_text())


@with_oracle
@every_evaluator
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_official_example_gives_the_official_numbers(kind, evaluator):
    results = read_results(ORACLE / f"instances_val2014_fake{kind}100_results.json", kind)
    numbers = evaluate_results(oracle("instances_val2014_100.json"), results, kind, evaluator).numbers
    expected = dict(zip(NAMES, map(float, OFFICIAL[kind].split()), strict=True))
    assert numbers == pytest.approx(expected, abs=1e-12, rel=0)
    assert list(numbers) == list(NAMES) and all(type(number) is float for number in numbers.values())


@with_oracle
def test_ids_and_order_of_the_ground_truth_do_not_change_the_numbers():
    ground_truth = oracle("instances_val2014_100.json")
    results = oracle("instances_val2014_fakebbox100_results.json")
    expected = evaluate_results(ground_truth, results, "bbox")
    ground_truth["images"].reverse()
    ground_truth["categories"].reverse()
    for number, annotation in enumerate(ground_truth["annotations"]):
        annotation["id"] = number  # one of them is 0, which pycocotools reads as "no match"
    assert evaluate_results(ground_truth, results, "bbox") == expected


def test_masks_need_segmentations_in_the_ground_truth():
    """Without any, every number is -1; if only some are missing, the numbers would be wrong."""
    boxed = {"image_id": 1, "category_id": 7, "bbox": [0, 0, 80, 80], "segmentation": []}
    assert set(evaluate_results(truth(boxed), [], "segm").numbers.values()) == {-1}
    outlined = boxed | {"segmentation": [[0, 0, 40, 0, 40, 80]]}
    with pytest.raises(UserError, match="annotation 2 of image 1"):
        evaluate_results(truth(outlined, boxed), [], "segm")


def test_results_of_another_set_or_format_are_refused(tmp_path):
    line = {"image_id": 9, "category_id": 7, "bbox": [0, 0, 5, 5], "score": 0.5}
    with pytest.raises(UserError, match=r"\[9\]"):
        evaluate_results(truth(), [line], "bbox")
    file = tmp_path / "results.json"
    for text in ("{", "{}", "[1]", json.dumps([line | {"score": 1}]).replace("bbox", "box")):
        file.write_text(text)
        with pytest.raises(UserError, match=r"results\.json"):
            read_results(file, "bbox")


@every_evaluator
@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("area", ["575", float("nan"), float("inf"), [575], -3, 0, True], ids=str)
def test_an_area_that_is_no_positive_number_gives_the_numbers_of_the_computed_one(area, kind, evaluator):
    """A box of 40 x 40 is medium. Its area, 1,600, decides which of COCO's sizes the object belongs to."""
    polygon = [[10, 10, 50, 10, 50, 50, 10, 50]]
    field = {"image_id": 1, "category_id": 7, "bbox": [10, 10, 40, 40], "segmentation": polygon}
    code = {"size": [200, 200], "counts": rle.frPyObjects(polygon, 200, 200)[0]["counts"]}
    result = {"image_id": 1, "category_id": 7, "bbox": [10, 10, 40, 40], "segmentation": code, "score": 0.9}
    expected = evaluate_results(truth({**field, "area": 1600}), [result], kind, evaluator)
    assert expected.numbers["AP_medium"] > 0.99 and expected.numbers["AP_small"] == -1
    assert evaluate_results(truth({**field, "area": area}), [result], kind, evaluator) == expected


@every_evaluator
def test_iscrowd_as_text_is_read_as_a_number(evaluator):
    fields = {"image_id": 1, "category_id": 7, "bbox": [10, 10, 40, 40]}
    result = {"image_id": 1, "category_id": 7, "bbox": [10, 10, 40, 40], "score": 0.9}
    for text, crowd in (("0", 0), ("1", 1)):
        numbers = evaluate_results(truth({**fields, "iscrowd": text}, fields), [result], "bbox", evaluator)
        assert numbers == evaluate_results(truth({**fields, "iscrowd": crowd}, fields), [result], "bbox", evaluator)
