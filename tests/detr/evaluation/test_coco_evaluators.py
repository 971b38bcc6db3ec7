"""pycocotools and faster-coco-eval give the same bits, whatever they are given."""

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
from detr.evaluation.coco_evaluators import LONE_MATCH_PRECISION, select_evaluator
from detr.evaluation.coco_metric import CocoMetric
from detr.evaluation.coco_numbers import Evaluation, evaluate_results

ORACLE = Path(os.environ.get("TRIPTYCH_DATA", "data")) / "coco_eval_oracle"
with_oracle = pytest.mark.skipif(not ORACLE.exists(), reason=f"the official COCO example is not at {ORACLE}")
with_both = pytest.mark.skipif(find_spec("faster_coco_eval") is None, reason="faster-coco-eval is not installed")
every_kind = pytest.mark.parametrize("kind", ["bbox", "segm"])

CAT = [{"id": 7, "name": "cat"}]


def assert_same_bits(truth: dict, results: list[dict], kind: str) -> Evaluation:
    """Of the numbers and of the rows of classes; NaN equals NaN."""
    one, other = (evaluate_results(truth, results, kind, name) for name in ("pycocotools", "faster_coco_eval"))
    assert json.dumps(other) == json.dumps(one)
    return one


def images(number: int, side: int = 200) -> list[dict]:
    return [{"id": n, "file_name": f"{n}.jpg", "width": side, "height": side} for n in range(1, number + 1)]


def box(draw: np.random.Generator, side: int) -> list[float]:
    """x y width height, now and then without a width."""
    corner = draw.random(2) * side
    size = draw.random(2) * (side - corner) * [draw.random() > 0.05, 1]
    return [*corner.tolist(), *size.tolist()]


def filled(shape: list[float], side: int, draw: np.random.Generator) -> dict:
    """Run-length code of the box, with holes now and then."""
    mask = np.zeros((side, side), np.uint8, order="F")
    x, y, width, height = map(int, shape)
    mask[y : y + height, x : x + width] = 1
    if draw.random() < 0.5:
        mask &= draw.random((side, side)) < 0.9
    code = rle.encode(mask)
    return {"size": code["size"], "counts": code["counts"].decode()}


def annotation(image: int, category: int, side: int, kind: str, draw: np.random.Generator) -> dict:
    """Often a crowd, without an area or with one on a border of COCO's, and with a number that is 0 or not the only."""
    shape = box(draw, side)
    made: dict[str, Any] = {"id": int(draw.integers(0, 5)), "image_id": image, "category_id": category, "bbox": shape}
    if draw.random() < 0.6:
        made["area"] = float(draw.choice([shape[2] * shape[3] / 2, 32**2, 96**2, 0]))
    if draw.random() < 0.5:
        made["iscrowd"] = int(draw.random() < 0.4)
    if draw.random() < 0.1:
        made["ignore"] = 1
    if kind == "segm":
        x, y, w, h = shape
        polygon = [[x, y, x + w + 1, y, x + w + 1, y + h + 1, x, y + h + 1]]
        made["segmentation"] = polygon if draw.random() < 0.5 else filled(shape, side, draw)
    return made


def result(image: int, own: list[dict], classes: list[int], side: int, kind: str, draw: np.random.Generator) -> dict:
    """Often an object of the image, exactly or nearly; scores are often equal; the class may not exist."""
    shape, category = box(draw, side), int(draw.choice([*classes, 1000]))
    if own and draw.random() < 0.6:
        chosen = own[int(draw.integers(len(own)))]
        noise = 0.04 * side * draw.normal(size=4) * (draw.random() < 0.7)
        shape, category = (np.array(chosen["bbox"]) + noise).clip(0).tolist(), chosen["category_id"]
    made = {"image_id": image, "category_id": category, "score": float(draw.integers(6) / 6)}
    return made | ({"bbox": shape} if kind == "bbox" else {"segmentation": filled(shape, side, draw)})


def scene(seed: int, kind: str) -> tuple[dict, list[dict]]:
    """Up to a dozen images, some empty; now and then more than 100 results in each, none at all, or ids above 2^53."""
    draw = np.random.default_rng(seed)
    side = int(draw.choice([40, 110] if kind == "segm" else [20, 200, 700]))
    offset, most = int(draw.choice([0, 2**60])), int(draw.choice([1, 9, 9, 9, 9, 250]))
    ids = (draw.permutation(36)[: draw.integers(1, 12)] + offset).tolist()
    classes = draw.permutation(90)[: draw.integers(1, 5)].tolist()
    annotations, results = [], []
    for image in ids:
        chosen = draw.choice(classes, size=draw.poisson(3)).tolist()
        own = [annotation(image, category, side, kind, draw) for category in chosen]
        annotations += own
        results += [result(image, own, classes, side, kind, draw) for _ in range(draw.integers(most))]
    truth = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": side, "height": side} for n in ids],
        "categories": [{"id": n, "name": f"class {n}"} for n in classes],
        "annotations": annotations,
    }
    return truth, [results[n] for n in draw.permutation(len(results))]


@with_both
@with_oracle
@every_kind
def test_the_official_example_has_the_same_bits(kind):
    truth = json.loads((ORACLE / "instances_val2014_100.json").read_text())
    results = json.loads((ORACLE / f"instances_val2014_fake{kind}100_results.json").read_text())
    assert 0 < assert_same_bits(truth, results, kind).numbers["AP"] < 1


@with_both
@every_kind
def test_random_scenes_have_the_same_bits(kind):
    seen = [assert_same_bits(*scene(seed, kind), kind) for seed in range(60)]
    APs = {evaluation.numbers["AP"] for evaluation in seen}
    assert 0 in APs and len(APs) > 20


@with_both
@pytest.mark.parametrize("objects", [1, 2, 3, 4, 5, 99, 100, 101, 127, 128, 129, 199, 200, 201, 256, 257, 300])
@pytest.mark.parametrize("found", ["right", "right wrong", "right right wrong", "wrong right", "right right right"])
def test_the_first_detections_of_a_class_have_the_same_bits(found, objects):
    """An object in each image; the detections, best first, are all in other images. Only a right detection that is
    followed by no other right one has a precision of a little less than 1."""
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
        for n, word in enumerate(found.split()[:objects], start=1)
    ]
    first = assert_same_bits(truth, results, "bbox").rows[0]
    if objects == 1 and found.startswith("right"):
        assert first.AP == pytest.approx(LONE_MATCH_PRECISION, abs=1e-15) and first.AP < 1


@with_both
def test_the_bits_differ_where_the_divisors_are_not_mended(monkeypatch):
    """Should the other program ever add 2^-52 itself, this test fails, and the mending can go."""
    truth = {"images": images(1), "categories": CAT}
    truth["annotations"] = [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [10, 10, 50, 50]}]
    results = [{"image_id": 1, "category_id": 7, "bbox": [10, 10, 50, 50], "score": 0.5}]
    assert_same_bits(truth, results, "bbox")
    monkeypatch.setattr(coco_evaluators, "_add_to_divisors", lambda *_: None)
    with pytest.raises(AssertionError):
        assert_same_bits(truth, results, "bbox")


@with_both
@every_kind
def test_nothing_found_and_nothing_to_find_have_the_same_bits(kind):
    bare = {"images": images(2), "categories": CAT, "annotations": []}
    assert set(assert_same_bits(bare, [], kind).numbers.values()) == {-1}
    cat = {"id": 0, "image_id": 2, "category_id": 7, "bbox": [0, 0, 50, 50], "segmentation": [[0, 0, 50, 0, 50, 50]]}
    assert assert_same_bits(bare | {"annotations": [cat]}, [], kind).numbers["AP"] == 0
    crowd = cat | {"iscrowd": 1}
    assert set(assert_same_bits(bare | {"annotations": [crowd]}, [], kind).numbers.values()) == {-1}


@with_both
def test_auto_takes_the_faster_one_and_counts_on_without_it(monkeypatch):
    fast = select_evaluator("auto")
    assert fast is select_evaluator("faster_coco_eval") is not select_evaluator("pycocotools")
    monkeypatch.setattr(coco_evaluators, "find_spec", lambda name: None)
    assert select_evaluator("auto") is select_evaluator("pycocotools")


def test_an_evaluator_that_is_not_installed_is_refused_before_the_first_image(monkeypatch):
    monkeypatch.setattr(coco_evaluators, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install faster-coco-eval"):
        CocoMetric({"images": images(1), "categories": CAT, "annotations": []}, CAT, "faster_coco_eval")


def test_an_evaluator_that_is_not_installed_stops_training_before_its_first_step(inside, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(coco_evaluators, "find_spec", lambda name: None)
    keys = [
        "model=detr",
        f"data.root={tmp_path}/shapes",
        "data.train_count=16",
        "data.val_count=3",
        "data.test_count=3",
    ]
    build(configure("train", keys)["data"]).ground_truth("val")  # says that it draws the set, once
    capsys.readouterr()
    said = inside("train", *keys, "task.evaluator=faster_coco_eval", "run_dir=run", code=2)
    assert "pip install faster-coco-eval" in said and "task.evaluator=auto" in said
    assert not list(Path("run").glob("**/*.pt"))


def test_prediction_asks_for_no_evaluator(tmp_path, monkeypatch):
    monkeypatch.setattr(coco_evaluators, "find_spec", lambda name: None)
    config = configure("train", ["model=detr", f"data.root={tmp_path}", "task.evaluator=faster_coco_eval"])
    assert build(config["task"], data=build(config["data"])).evaluator == "faster_coco_eval"


def test_auto_is_the_default():
    assert configure("train", ["model=detr_r50"])["task"]["evaluator"] == "auto"
