"""pycocotools and hotcoco give bit-identical numbers for any input."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as rle

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from detr.evaluation import coco_evaluators
from detr.evaluation.coco_evaluators import select_evaluator
from detr.evaluation.coco_metric import CocoMetric
from detr.evaluation.coco_numbers import Evaluation, evaluate_results
from detr.evaluation.coco_tables import tabulate_results
from detr.evaluation.coco_truth import renumber

ORACLE = Path(os.environ.get("TRIPTYCH_DATA", "data")) / "coco_eval_oracle"
with_oracle = pytest.mark.skipif(not ORACLE.exists(), reason=f"the official COCO example is not at {ORACLE}")
with_both = pytest.mark.skipif(find_spec("hotcoco") is None, reason="hotcoco is not installed")
every_kind = pytest.mark.parametrize("kind", ["bbox", "segm"])

CAT = [{"id": 7, "name": "cat"}]


def assert_same_bits(truth: dict, results: list[dict], kind: str) -> Evaluation:
    """Compare the numbers, the rows of classes, and the precision for each IoU, recall, class, area and limit.

    Returns pycocotools' evaluation.
    """
    reference, fast = (evaluate_results(truth, results, kind, name) for name in ("pycocotools", "hotcoco"))
    assert json.dumps(fast) == json.dumps(reference)
    precisions = []
    for name in ("pycocotools", "hotcoco"):
        copy = renumber(truth, kind)
        statistics = select_evaluator(name)(copy.dataset, tabulate_results(results, copy, kind), kind)
        precisions.append(statistics.precision)
    assert precisions[0].shape == precisions[1].shape and precisions[0].tobytes() == precisions[1].tobytes()
    return reference


def images(number: int, side: int = 200) -> list[dict]:
    return [{"id": n, "file_name": f"{n}.jpg", "width": side, "height": side} for n in range(1, number + 1)]


def box(rng: np.random.Generator, side: int) -> list[float]:
    """A random x y width height, sometimes with width 0."""
    corner = rng.random(2) * side
    lengths = rng.random(2) * (side - corner) * [rng.random() > 0.05, 1]
    return [*corner.tolist(), *lengths.tolist()]


def filled(shape: list[float], side: int, rng: np.random.Generator) -> dict:
    """The run-length code of a box, sometimes with holes."""
    mask = np.zeros((side, side), np.uint8, order="F")
    x, y, width, height = map(int, shape)
    mask[y : y + height, x : x + width] = 1
    if rng.random() < 0.5:
        mask &= rng.random((side, side)) < 0.9
    code = rle.encode(mask)
    return {"size": code["size"], "counts": code["counts"].decode()}


def annotation(image: int, category: int, side: int, kind: str, rng: np.random.Generator) -> dict:
    """An annotation: often a crowd, without area, or with one on a bound of COCO's ranges; ids repeat, some are 0."""
    shape = box(rng, side)
    fields: dict[str, Any] = {"id": int(rng.integers(0, 5)), "image_id": image, "category_id": category, "bbox": shape}
    if rng.random() < 0.6:
        fields["area"] = float(rng.choice([shape[2] * shape[3] / 2, 32**2, 96**2, 0, 1e-3, 1e10]))
    if rng.random() < 0.5:
        fields["iscrowd"] = int(rng.random() < 0.4)
    if rng.random() < 0.1:
        fields["ignore"] = 1
    if kind == "segm":
        x, y, w, h = shape
        polygon = [[x, y, x + w + 1, y, x + w + 1, y + h + 1, x, y + h + 1]]
        fields["segmentation"] = polygon if rng.random() < 0.5 else filled(shape, side, rng)
    return fields


def result(image: int, objects: list[dict], classes: list[int], side: int, kind: str, rng: np.random.Generator) -> dict:
    """A result: often an object of the image, exactly or nearly; scores often repeat; the class may not exist."""
    shape, category = box(rng, side), int(rng.choice([*classes, 1000]))
    if objects and rng.random() < 0.6:
        target = objects[int(rng.integers(len(objects)))]
        noise = 0.04 * side * rng.normal(size=4) * (rng.random() < 0.7)
        shape, category = (np.array(target["bbox"]) + noise).clip(0).tolist(), target["category_id"]
    fields = {"image_id": image, "category_id": category, "score": float(rng.integers(6) / 6)}
    return fields | ({"bbox": shape} if kind == "bbox" else {"segmentation": filled(shape, side, rng)})


def scene(seed: int, kind: str) -> tuple[dict, list[dict]]:
    """Up to 11 images, some without objects; sometimes over 100 results in each, none at all, or ids above 2^53."""
    rng = np.random.default_rng(seed)
    side = int(rng.choice([40, 110] if kind == "segm" else [20, 200, 700]))
    offset, max_results = int(rng.choice([0, 2**60])), int(rng.choice([1, 9, 9, 9, 9, 250]))
    ids = (rng.permutation(36)[: rng.integers(1, 12)] + offset).tolist()
    classes = rng.permutation(90)[: rng.integers(1, 5)].tolist()
    annotations, results = [], []
    for image in ids:
        categories = rng.choice(classes, size=rng.poisson(3)).tolist()
        objects = [annotation(image, category, side, kind, rng) for category in categories]
        annotations += objects
        results += [result(image, objects, classes, side, kind, rng) for _ in range(rng.integers(max_results))]
    truth = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": side, "height": side} for n in ids],
        "categories": [{"id": n, "name": f"class {n}"} for n in classes],
        "annotations": annotations,
    }
    return truth, [results[n] for n in rng.permutation(len(results))]


@with_both
@with_oracle
@every_kind
def test_the_official_example_has_the_same_bits(kind):
    truth = json.loads((ORACLE / "instances_val2014_100.json").read_text())
    results = json.loads((ORACLE / f"instances_val2014_fake{kind}100_results.json").read_text())
    assert 0 < assert_same_bits(truth, results, kind).numbers["AP"] < 1


@with_both
@every_kind
@pytest.mark.parametrize("first", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (50, 100, 150))])
def test_random_scenes_have_the_same_bits(kind, first):
    evaluations = [assert_same_bits(*scene(seed, kind), kind) for seed in range(first, first + 50)]
    APs = {evaluation.numbers["AP"] for evaluation in evaluations}
    assert 0 in APs and len(APs) > 20


@with_both
@pytest.mark.parametrize("objects", [1, 2, 3, 4, 5, 99, 100, 101, 127, 128, 129, 199, 200, 201, 256, 257, 300])
@pytest.mark.parametrize(
    "detections", ["right", "right wrong", "right right wrong", "wrong right", "right right right"]
)
def test_the_first_detections_of_a_class_have_the_same_bits(detections, objects):
    """One object and at most one detection in each image, in the order of scores.

    Only a right detection that no other right one follows has a precision slightly below 1.
    """
    object = {"category_id": 7, "bbox": [10, 10, 50, 50]}
    truth = {"images": images(objects), "categories": CAT}
    truth["annotations"] = [object | {"id": n, "image_id": n} for n in range(1, objects + 1)]
    results = [
        {
            "image_id": n,
            "category_id": 7,
            "score": 1 - n / 10,
            "bbox": [10, 10, 50, 50] if word == "right" else [100, 100, 9, 9],
        }
        for n, word in enumerate(detections.split()[:objects], start=1)
    ]
    first = assert_same_bits(truth, results, "bbox").rows[0]
    if objects == 1 and detections.startswith("right"):
        assert first.AP == pytest.approx(1, abs=1e-15) and first.AP < 1  # pycocotools divides by 1 + 2^-52


@with_both
@every_kind
def test_no_detections_and_no_objects_have_the_same_bits(kind):
    bare = {"images": images(2), "categories": CAT, "annotations": []}
    assert set(assert_same_bits(bare, [], kind).numbers.values()) == {-1}
    cat = {"id": 0, "image_id": 2, "category_id": 7, "bbox": [0, 0, 50, 50], "segmentation": [[0, 0, 50, 0, 50, 50]]}
    assert assert_same_bits(bare | {"annotations": [cat]}, [], kind).numbers["AP"] == 0
    crowd = cat | {"iscrowd": 1}
    assert set(assert_same_bits(bare | {"annotations": [crowd]}, [], kind).numbers.values()) == {-1}


@with_both
@every_kind
def test_shapes_that_no_image_holds_have_the_same_bits(kind):
    """Boxes without area, inside out, outside or huge; masks without a pixel, of one, or of another image's size."""
    square = [10, 10, 50, 50]
    object = {"image_id": 1, "category_id": 7, "bbox": square, "segmentation": [[10, 10, 60, 10, 60, 60, 10, 60]]}
    truth = {"images": images(1), "categories": CAT, "annotations": [object | {"id": n} for n in range(1, 4)]}
    boxes = [square, [10, 10, 0, 0], [60, 60, -50, -50], [-1e6, 0, 9, 9], [0, 0, 1e100, 1e100], [10, 10, 50, 1e-300]]
    masks = [np.zeros((200, 200)), np.ones((200, 200)), np.ones((30, 70)), np.eye(200), np.ones((1, 1))]
    codes = [rle.encode(np.asfortranarray(mask, np.uint8)) for mask in masks]
    shapes = boxes if kind == "bbox" else [{**code, "counts": code["counts"].decode()} for code in codes]
    key = "bbox" if kind == "bbox" else "segmentation"
    for start in range(len(shapes)):
        order = [*shapes[start:], *shapes[:start]]  # each shape ranks first once
        results = [{"image_id": 1, "category_id": 7, "score": 1 / n, key: order[n - 1]} for n in range(1, len(order))]
        assert_same_bits(truth, results, kind)


@with_both
def test_names_that_are_not_utf8_and_images_without_a_size_have_the_same_bits():
    truth = {"images": [{"id": 1, "file_name": "\udc80.jpg", "licence": Path("x")}]}
    truth |= {"categories": [{"id": 7, "name": "cat \udcff"}], "annotations": [{"image_id": 1, "category_id": 7}]}
    truth["annotations"][0]["bbox"] = [1, 1, 9, 9]
    result = {"image_id": 1, "category_id": 7, "bbox": [1, 1, 9, 8], "score": 0.5}
    assert assert_same_bits(truth, [result], "bbox").rows[0].name == "cat \udcff"


@with_both
@every_kind
def test_evaluators_print_nothing(kind, capfd):
    for seed in range(5):
        assert_same_bits(*scene(seed, kind), kind)
    assert capfd.readouterr() == ("", "")


@with_both
def test_auto_is_the_faster_evaluator_if_it_is_installed(monkeypatch):
    fast = select_evaluator("auto")
    assert fast is select_evaluator("hotcoco") is not select_evaluator("pycocotools")
    monkeypatch.setattr(coco_evaluators, "find_spec", lambda name: None)
    assert select_evaluator("auto") is select_evaluator("pycocotools")


def test_an_evaluator_that_is_not_installed_is_refused_before_the_first_image(monkeypatch):
    monkeypatch.setattr(coco_evaluators, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install hotcoco"):
        CocoMetric({"images": images(1), "categories": CAT, "annotations": []}, CAT, "hotcoco")


def test_an_evaluator_that_is_not_installed_stops_training_before_its_first_step(inside, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(coco_evaluators, "find_spec", lambda name: None)
    keys = [
        "model=detr",
        f"data.root={tmp_path}/shapes",
        "data.train_count=16",
        "data.val_count=3",
        "data.test_count=3",
    ]
    build(configure("train", keys)["data"]).ground_truth("val")  # reports that it draws the set
    capsys.readouterr()
    output = inside("train", *keys, "task.evaluator=hotcoco", "run_dir=run", code=2)
    assert "pip install hotcoco" in output and "task.evaluator=auto" in output
    assert not list(Path("run").glob("**/*.pt"))


def test_prediction_needs_no_evaluator(tmp_path, monkeypatch):
    monkeypatch.setattr(coco_evaluators, "find_spec", lambda name: None)
    config = configure("train", ["model=detr", f"data.root={tmp_path}", "task.evaluator=hotcoco"])
    assert build(config["task"], data=build(config["data"])).evaluator == "hotcoco"


def test_auto_is_the_default():
    assert configure("train", ["model=detr_r50"])["task"]["evaluator"] == "auto"
