import copy
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pycocotools import mask as rle

from common.errors import UserError
from detr.evaluation.coco_metric import CocoMetric
from detr.evaluation.coco_numbers import NAMES, evaluate_results, read_results

ORACLE = Path(os.environ.get("TRIPTYCH_DATA", "data")) / "coco_eval_oracle"
with_oracle = pytest.mark.skipif(not ORACLE.exists(), reason=f"the official COCO example is not at {ORACLE}")

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]  # class index 0 is COCO id 7


def truth(*annotations: dict, images: int = 2) -> dict:
    """A ground truth of images 1, 2, ... of 200 x 200 pixels; annotations are numbered from 1."""
    return {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 200, "height": 200} for n in range(1, images + 1)],
        "categories": CATEGORIES,
        "annotations": [{"id": n} | annotation for n, annotation in enumerate(annotations, start=1)],
    }


def answer(boxes: list = (), scores: list = (), labels: list = ()) -> dict:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def numbers_of(ground_truth: dict, answers: dict[int, dict]) -> dict[str, float]:
    metric = CocoMetric(ground_truth, CATEGORIES)
    for image, detections in answers.items():
        metric.update({"ids": [image]}, [detections])
    metric.gather()
    return metric.compute()


def oracle(name: str) -> list | dict:
    return json.loads((ORACLE / name).read_text())


def oracle_answers() -> tuple[dict, list[dict], dict[int, dict]]:
    """Ground truth, classes in descending order of id, and the official boxes as answers (float64 as in the file)."""
    ground_truth = oracle("instances_val2014_100.json")
    categories = sorted(ground_truth["categories"], key=lambda category: -category["id"])
    index = {category["id"]: number for number, category in enumerate(categories)}
    lines: dict[int, list] = {image["id"]: [] for image in ground_truth["images"]}
    for line in oracle("instances_val2014_fakebbox100_results.json"):
        lines[line["image_id"]].append(line)
    answers = {}
    for image, entries in lines.items():
        boxes = torch.tensor([line["bbox"] for line in entries], dtype=torch.float64).reshape(-1, 4)
        answers[image] = {
            "boxes": torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1),
            "scores": torch.tensor([line["score"] for line in entries], dtype=torch.float64),
            "labels": torch.tensor([index[line["category_id"]] for line in entries], dtype=torch.int64),
        }
    return ground_truth, categories, answers


@with_oracle
def test_answers_of_a_model_give_the_official_numbers_and_so_does_the_written_file(tmp_path):
    ground_truth, categories, answers = oracle_answers()
    metric = CocoMetric(ground_truth, categories)
    metric.update({"ids": list(answers)}, list(answers.values()))
    metric.gather()
    numbers = metric.compute()
    official = evaluate_results(ground_truth, oracle("instances_val2014_fakebbox100_results.json"), "bbox")
    assert numbers == pytest.approx(official.numbers, abs=1e-12, rel=0)
    metric.write(tmp_path)
    assert evaluate_results(ground_truth, read_results(tmp_path / "boxes.json", "bbox"), "bbox").numbers == numbers
    assert not (tmp_path / "masks.json").exists()


def test_images_without_annotations_have_no_numbers_and_their_answers_are_written(tmp_path):
    unlabelled = {key: entries for key, entries in truth(images=1).items() if key != "annotations"}
    metric = CocoMetric(unlabelled, CATEGORIES)
    metric.update({"ids": [1]}, [answer([[10, 10, 110, 110]], [0.5], [0])])
    metric.gather()
    assert metric.compute() == {}
    metric.write(tmp_path)
    assert read_results(tmp_path / "boxes.json", "bbox") == [
        {"image_id": 1, "category_id": 7, "bbox": [10, 10, 100, 100], "score": 0.5}
    ]


def test_the_numbers_of_a_part_are_those_of_a_file_with_these_images_alone() -> None:
    cat = {"category_id": 7, "bbox": [10, 10, 100, 100]}
    both = truth(cat | {"image_id": 1}, cat | {"image_id": 2})
    metric = CocoMetric(both, CATEGORIES)
    metric.restrict(1)
    metric.update({"ids": [2]}, [answer([[10, 10, 110, 110]], [0.5], [0])])
    metric.gather()
    assert metric.compute()["AP"] == pytest.approx(1) and len(both["images"]) == 2


def test_two_objects_evaluated_by_hand(capsys):
    """Two cats of 100 x 100 in two images. Detections by score:

        0.9  image 1, exact                                          right at all 10 thresholds
        0.8  image 2, 100 x 100 beside the cat                       wrong
        0.7  image 2, inside the cat, 62.5 x 100, so IoU 0.625       right at 0.50, 0.55, 0.60 only

    At those three, precision is 1 up to recall 1/2 (51 of the 101 points) and 2/3 up to recall 1 (50 points):
    (51 + 100/3)/101. At the other seven it is 51/101. One detection per image finds one cat of two, more find
    both at three thresholds. Both cats are large. No dog exists, so dogs count nowhere.
    """
    cat = {"category_id": 7, "bbox": [10, 10, 100, 100]}
    ground_truth = truth(cat | {"image_id": 1}, cat | {"image_id": 2})
    before = copy.deepcopy(ground_truth)
    metric = CocoMetric(ground_truth, CATEGORIES)
    first = answer([[10, 10, 110, 110]], [0.9], [0])
    second = answer([[10, 10, 72.5, 110], [111, 111, 200, 200], [100, 100, 200, 200]], [0.7, 0.1, 0.8], [0, 1, 0])
    metric.update({"ids": [2, 1]}, [second, first])
    metric.gather()
    numbers = metric.compute()
    low, high = (51 + 100 / 3) / 101, 51 / 101
    AP, AR = (3 * low + 7 * high) / 10, (3 * 1 + 7 * 0.5) / 10
    expected = [AP, low, high, -1, -1, AP, 0.5, AR, AR, -1, -1, AR]
    assert numbers == pytest.approx(dict(zip(NAMES, expected, strict=True)), abs=1e-12)
    assert metric.details()[1] == ("dog", -1, -1, 0)
    assert metric.details()[2] == ("cat", pytest.approx(AP), pytest.approx(low), 2)
    assert ground_truth == before
    assert capsys.readouterr().out == ""


def test_a_crowd_is_no_object_and_absorbs_detections():
    """One cat is detected exactly; three boxes inside the crowd are neither right nor wrong, so AP is 1."""
    cat = {"image_id": 1, "category_id": 7, "bbox": [0, 0, 50, 50], "area": 2000, "iscrowd": 0}
    crowd = {"image_id": 1, "category_id": 7, "bbox": [100, 0, 100, 100], "iscrowd": 1}
    inside = [[100, 0, 150, 50], [150, 0, 200, 50], [100, 50, 150, 100]]
    detections = answer([*inside, [0, 0, 50, 50]], [0.9, 0.8, 0.7, 0.6], [0] * 4)
    numbers = numbers_of(truth(cat, crowd, images=1), {1: detections})
    assert numbers["AP"] == pytest.approx(1) and numbers["AR1"] == 0 and numbers["AP_large"] == -1


def test_zero_detections_give_zeros_and_areas_without_objects_minus_one():
    cat = {"image_id": 1, "category_id": 7, "bbox": [0, 0, 50, 50]}  # medium
    numbers = numbers_of(truth(cat), {1: answer(), 2: answer()})
    absent = {"AP_small", "AP_large", "AR_small", "AR_large"}
    assert numbers == {name: -1 if name in absent else 0 for name in NAMES}


def test_a_split_without_objects_gives_minus_one():
    assert set(numbers_of(truth(), {1: answer([[0, 0, 5, 5]], [0.5], [0]), 2: answer()}).values()) == {-1}


def test_false_detections_in_an_image_without_objects_lower_the_precision():
    """The wrong detection has the higher score, so precision is 1/2 at every recall."""
    cat = {"image_id": 1, "category_id": 7, "bbox": [0, 0, 50, 50]}
    wrong, right = answer([[0, 0, 50, 50]], [0.9], [0]), answer([[0, 0, 50, 50]], [0.8], [0])
    assert numbers_of(truth(cat), {1: right, 2: wrong})["AP"] == pytest.approx(0.5)


def test_a_class_that_the_ground_truth_does_not_have_changes_nothing():
    ground_truth = truth({"image_id": 1, "category_id": 7, "bbox": [0, 0, 50, 50]}, images=1)
    ground_truth["categories"] = CATEGORIES[:1]
    detections = answer([[0, 0, 50, 50], [0, 0, 50, 50]], [0.9, 0.8], [1, 0])
    assert numbers_of(ground_truth, {1: detections})["AP"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("ids", "message"),
    [([1], r"missing: \[2\]"), ([1, 2, 2], r"more than once: \[2\]"), ([1, 2, 9], r"not of .*\[9\]")],
)
def test_a_missing_doubled_or_foreign_image_is_an_error(ids, message):
    metric = CocoMetric(truth(), CATEGORIES)
    metric.update({"ids": ids}, [answer()] * len(ids))
    with pytest.raises(AssertionError, match=message):
        metric.gather()


def test_numbers_before_gather_are_an_error(tmp_path):
    metric = CocoMetric(truth(), CATEGORIES)
    for call in (metric.compute, lambda: metric.write(tmp_path)):
        with pytest.raises(AssertionError, match="gather"):
            call()


def test_an_answer_that_is_not_finite_names_its_image():
    metric = CocoMetric(truth(), CATEGORIES)
    with pytest.raises(UserError, match="image 2"):
        metric.update({"ids": [2]}, [answer([[0, 0, float("nan"), 5]], [0.5], [0])])


def test_masks_are_evaluated_beside_boxes_and_written(tmp_path):
    """The cat is the left half of its box. The mask is exact; the box, drawn around the mask, has IoU 0.5.

    So every mask number that exists is 1, while the box is right at the first of ten thresholds.
    """
    cat = {"image_id": 1, "category_id": 7, "bbox": [0, 0, 80, 80], "segmentation": [[0, 0, 40, 0, 40, 80, 0, 80]]}
    ground_truth = truth(cat)
    mask = torch.zeros(1, 200, 200, dtype=torch.bool)
    mask[0, :80, :40] = True
    detections = answer([[0, 0, 40, 80]], [0.5], [0]) | {"masks": mask}
    metric = CocoMetric(ground_truth, CATEGORIES)
    metric.update({"ids": [1, 2]}, [detections, answer() | {"masks": mask[:0]}])
    metric.gather()
    numbers = metric.compute()
    assert list(numbers) == [*NAMES, *(f"mask_{name}" for name in NAMES)]
    assert numbers["AP"] == pytest.approx(0.1)
    assert numbers["mask_AP"] == pytest.approx(1) and numbers["mask_AR1"] == 1 and numbers["mask_AP_large"] == -1
    metric.write(tmp_path)
    assert json.loads((tmp_path / "boxes.json").read_text()) == [
        {"image_id": 1, "category_id": 7, "bbox": [0.0, 0.0, 40.0, 80.0], "score": 0.5}
    ]
    [line] = read_results(tmp_path / "masks.json", "segm")
    assert line.keys() == {"image_id", "category_id", "segmentation", "score"}
    assert line["segmentation"]["size"] == [200, 200] and isinstance(line["segmentation"]["counts"], str)
    assert evaluate_results(ground_truth, [line], "segm").numbers["AP"] == numbers["mask_AP"]


@pytest.mark.parametrize("counts", ["bytes", "text"])
def test_masks_may_be_run_length_codes(counts: str, tmp_path):
    """They give the numbers and the file of the boolean masks."""
    ground_truth, answers = mask_scene()
    expected = CocoMetric(ground_truth, CATEGORIES)
    metric = CocoMetric(ground_truth, CATEGORIES)
    for image, detections in answers.items():
        codes = rle.encode(np.asfortranarray(detections["masks"].permute(1, 2, 0).byte().numpy()))
        if counts == "text":
            codes = [{**code, "counts": code["counts"].decode()} for code in codes]
        expected.update({"ids": [image]}, [detections])
        metric.update({"ids": [image]}, [detections | {"masks": codes}])
    for each in (expected, metric):
        each.gather()
    assert metric.compute() == expected.compute() and 0 < metric.compute()["mask_AP"] < 1
    metric.write(tmp_path)
    assert read_results(tmp_path / "masks.json", "segm") == list(expected.results("segm"))


def test_both_evaluators_give_the_same_numbers_of_masks():
    pytest.importorskip("hotcoco")
    ground_truth, answers = mask_scene()
    numbers = []
    for evaluator in ("pycocotools", "hotcoco"):
        metric = CocoMetric(ground_truth, CATEGORIES, evaluator)
        for image, detections in answers.items():
            metric.update({"ids": [image]}, [detections])
        metric.gather()
        numbers.append(metric.compute())
    assert numbers[0] == numbers[1] and 0 < numbers[0]["mask_AP"] < 1


def mask_scene() -> tuple[dict, dict[int, dict]]:
    """Three images with two squares each, a polygon and runs, and detections that are shifted or of another class."""
    annotations, answers = [], {}
    for image in range(1, 4):
        left = {"image_id": image, "category_id": 7, "bbox": [10, 10, 40, 40]}
        left["segmentation"] = [[10, 10, 50, 10, 50, 50, 10, 50]]
        runs = [200 * 100, *[40, 160] * 39, 40, 200 * 61 - 40]
        right = {"image_id": image, "category_id": 3, "bbox": [100, 0, 40, 40]}
        right["segmentation"] = {"size": [200, 200], "counts": runs}
        annotations += [left, right]
        masks = torch.zeros(2, 200, 200, dtype=torch.bool)
        masks[0, 10:50, 10 + 4 * image : 50 + 4 * image] = True
        masks[1, :40, 100:140] = True
        boxes = [[10, 10, 50, 50], [100, 0, 140, 40]]
        answers[image] = answer(boxes, [0.9, 0.8], [0, image % 2]) | {"masks": masks}
    return truth(*annotations, images=3), answers


def test_stuff_and_detections_of_stuff_do_not_count():
    """COCO's metrics are those of things; without "isthing", every category counts."""
    cat = {"image_id": 1, "category_id": 7, "bbox": [0, 0, 50, 50]}
    grass = {"image_id": 1, "category_id": 3, "bbox": [0, 0, 200, 200]}
    ground_truth = truth(cat, grass, images=1)
    detections = answer([[0, 0, 50, 50], [5, 5, 9, 9]], [0.5, 0.9], [0, 1])
    assert numbers_of(ground_truth, {1: detections})["AP"] == pytest.approx(0.5)
    ground_truth["categories"] = [{**CATEGORIES[0], "isthing": 1}, {**CATEGORIES[1], "isthing": 0}]
    before = copy.deepcopy(ground_truth)
    assert numbers_of(ground_truth, {1: detections})["AP"] == pytest.approx(1) and ground_truth == before
    metric = CocoMetric(ground_truth, CATEGORIES)
    assert [category["name"] for category in metric.ground_truth["categories"]] == ["cat"]


def scene() -> tuple[dict, dict[int, dict]]:
    """Five images with random boxes; scores are equal across images, so that their order must not matter."""
    generator = torch.Generator().manual_seed(0)
    annotations, answers = [], {}
    for image in range(1, 6):
        corners = torch.rand(4, 2, generator=generator) * 100
        boxes = torch.cat([corners, torch.full((4, 2), 60.0)], dim=1)  # xywh
        labels = torch.tensor([0, 0, 1, 1])
        annotations += [
            {"image_id": image, "category_id": CATEGORIES[label]["id"], "bbox": box.tolist()}
            for box, label in zip(boxes, labels.tolist(), strict=True)
        ]
        start = corners + 20 * torch.rand(4, 2, generator=generator)
        answers[image] = {
            "boxes": torch.cat([start, start + 60], dim=1),
            "scores": torch.tensor([0.9, 0.5, 0.5, 0.1]),
            "labels": labels[torch.randperm(4, generator=generator)],
        }
    return truth(*annotations, images=5), answers


def evaluate_on_ranks(rank: int, folder: str) -> None:
    """With three ranks, then two: rank 0 evaluates four of the five images, rank 1 one, rank 2 none."""
    ground_truth, answers = scene()
    for world in (3, 2):
        if rank >= world:
            return
        dist.init_process_group("gloo", init_method=f"file://{folder}/group{world}", rank=rank, world_size=world)
        metric = CocoMetric(ground_truth, CATEGORIES)
        for image in [[5, 1, 3, 2], [4], []][rank]:
            metric.update({"ids": [image]}, [answers[image]])
        metric.gather()
        Path(folder, f"{world}-{rank}.json").write_text(json.dumps([metric.compute(), metric.details()]))
        metric.write(Path(folder, f"files{world}"))
        metric.update({"ids": [1]}, [answers[1]])
        with pytest.raises(AssertionError, match=r"more than once: \[1\]"):
            metric.gather()
        dist.destroy_process_group()


def test_one_two_and_three_ranks_give_the_same_numbers_and_files(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))  # so that a new process can import this file
    multiprocessing.set_forkserver_preload(["torch.distributed", "torchvision", "pycocotools.cocoeval"])
    mp.start_processes(evaluate_on_ranks, (str(tmp_path),), nprocs=3, start_method="forkserver")
    ground_truth, answers = scene()
    metric = CocoMetric(ground_truth, CATEGORIES)
    metric.update({"ids": list(answers)}, list(answers.values()))
    metric.gather()
    expected = json.loads(json.dumps([metric.compute(), metric.details()]))
    assert 0 < expected[0]["AP"] < 1
    for world in (2, 3):
        for rank in range(world):
            assert json.loads((tmp_path / f"{world}-{rank}.json").read_text()) == expected
        assert read_results(tmp_path / f"files{world}/boxes.json", "bbox") == list(metric.results("bbox"))
