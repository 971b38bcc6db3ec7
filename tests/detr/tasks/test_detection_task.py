"""Which metrics a detection task computes, and the masks that these need."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from detr.evaluation.coco_metric import CocoMetric
from detr.evaluation.combined_metric import CombinedMetric

SQUARE = {"bbox": [2, 2, 6, 6], "segmentation": [[2, 2, 8, 2, 8, 8, 2, 8]], "area": 36, "image_id": 1}


def task(model: str, *overrides: str) -> Any:
    config = configure("train", [f"model={model}", *overrides])
    return build(config["task"], data=build(config["data"]))


def write(folder: Path, kinds: tuple[int, ...] = (), crowds: str = "") -> str:
    """Write train, val and test with an object of each of two classes; returns the override of `data.root`.

    kinds: "isthing" of the classes; () = it is not stated. crowds: the split that has a crowd without a mask.
    """
    (folder / "images").mkdir()
    Image.new("RGB", (16, 16)).save(folder / "images/a.png")
    for split in ("train", "val", "test"):
        categories: list[dict[str, Any]] = [{"id": i, "name": f"class {i}"} for i in (1, 2)]
        for category, kind in zip(categories, kinds, strict=False):
            category["isthing"] = kind
        annotations: list[dict[str, Any]] = [{**SQUARE, "id": i, "category_id": i} for i in (1, 2)]
        if split == crowds:
            annotations.append({**SQUARE, "id": 3, "category_id": 1, "iscrowd": 1, "segmentation": None})
        images = [{"id": 1, "file_name": "a.png", "width": 16, "height": 16}]
        content = {"images": images, "categories": categories, "annotations": annotations}
        (folder / f"{split}.json").write_text(json.dumps(content))
    return f"data.root={folder}"


@pytest.mark.parametrize("model", ["detr_masks", "mask_rcnn"])
@pytest.mark.parametrize("kinds", [(1, 1), (1, 0)])
def test_coco_json_that_states_things_and_stuff_has_no_panoptic_quality(
    model: str, kinds: tuple[int, ...], tmp_path: Path
) -> None:
    detection = task(model, "data=coco", write(tmp_path, kinds))
    assert isinstance(detection.metric("test"), CocoMetric)


def test_the_panoptic_quality_is_computed_for_models_with_segments_alone(tmp_path: Path) -> None:
    drawn = ["data.stuff=true", f"data.root={tmp_path}", "data.train_count=2", "data.val_count=2", "data.test_count=2"]
    assert isinstance(task("detr_masks", *drawn).metric("test"), CombinedMetric)
    for model in ("mask_rcnn", "detr"):
        assert isinstance(task(model, *drawn).metric("test"), CocoMetric), model


def test_a_mask_that_evaluation_lacks_is_named_before_the_first_step(tmp_path: Path) -> None:
    root = write(tmp_path, crowds="test")
    message = r"^The annotation 3 of image 1 has no \"segmentation\"; .*; the metrics of masks need every mask\.$"
    with pytest.raises(UserError, match=message):
        task("detr_masks", "data=coco", root).advice(pretrained=True)
    with pytest.raises(UserError, match=message):
        task("detr_masks", "data=coco", root).metric("test")
    task("detr", "data=coco", root).advice(pretrained=True)
    task("detr_masks", "data=coco", root).metric("val")


def test_crowds_of_train_need_no_mask(tmp_path: Path) -> None:
    detection = task("detr_masks", "data=coco", write(tmp_path, crowds="train"))
    assert not any("segmentation" in line for line in detection.advice(pretrained=True))
    assert detection.data.count("train") > 0 and isinstance(detection.metric("test"), CocoMetric)
