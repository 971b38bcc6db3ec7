"""torchvision's detectors as files: names of tensors, also of earlier versions, classes, and files that are refused."""

from typing import Any

import pytest
import torch
import torchvision
import torchvision.models.detection as detection
from torch import Tensor

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from detr.importing.torchvision_detectors import adopt

MODELS = {
    "faster_rcnn_r50_fpn": detection.fasterrcnn_resnet50_fpn,
    "retinanet_r50_fpn": detection.retinanet_resnet50_fpn,
    "fcos_r50_fpn": detection.fcos_resnet50_fpn,
    "ssd": detection.ssd300_vgg16,
}
WITH_BACKGROUND = ("faster_rcnn_r50_fpn", "ssd")


def tensors(function: Any, **options: Any) -> dict[str, Tensor]:
    """The state dict of a model without weights, without memory."""
    with torch.device("meta"):
        weights: dict[str, Tensor] = function(weights=None, weights_backbone=None, **options).state_dict()
    return weights


def old_name(name: str, key: str) -> str:
    """The name of a tensor in files of torchvision before 0.13, as the published ones are."""
    if name == "faster_rcnn_r50_fpn":
        return key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
    if name == "retinanet_r50_fpn" and "_head.conv." in key:
        head, _, rest = key.partition("_head.conv.")
        number, _, leaf = rest.partition(".0.")
        return f"{head}_head.conv.{2 * int(number)}.{leaf}"
    return key


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("old", [False, True])
def test_a_file_has_exactly_the_tensors_of_our_model(name: str, old: bool) -> None:
    content = tensors(MODELS[name])
    if old:
        content = {old_name(name, key): value for key, value in content.items()}
    adopted = adopt({"model": content} if old else content)
    classes = len(adopted.task_state["categories"])
    with torch.device("meta"):
        ours = build(configure("train", [f"model={name}"])["model"], classes=classes).state_dict()
    assert {k: v.shape for k, v in adopted.weights.items()} == {k: v.shape for k, v in ours.items()}
    assert all(key.endswith("num_batches_tracked") for key in adopted.left_out)


@pytest.mark.parametrize("name", MODELS)
def test_a_column_of_the_class_scores_is_a_category_id(name: str) -> None:
    first = int(name in WITH_BACKGROUND)
    categories = adopt(tensors(MODELS[name])).task_state["categories"]
    assert [category["id"] for category in categories] == list(range(first, 91))
    assert {category["id"]: category["name"] for category in categories}[18] == "dog"
    others = adopt(tensors(MODELS[name], num_classes=4)).task_state["categories"]
    assert others == [{"id": i, "name": f"class {i}"} for i in range(first, 4)]


@pytest.mark.parametrize("name", MODELS)
def test_without_the_class_head_there_are_no_classes(name: str) -> None:
    head = "roi_heads.box_predictor." if name == "faster_rcnn_r50_fpn" else "head.classification_head."
    content = {key: value for key, value in tensors(MODELS[name]).items() if not key.startswith(head)}
    assert adopt(content).task_state == {}


REFUSED = {
    "Mask R-CNN": lambda: tensors(detection.maskrcnn_resnet50_fpn),
    "version 2": lambda: tensors(detection.fasterrcnn_resnet50_fpn_v2),
    "an official DETR": lambda: {"transformer.encoder.layers.0.norm1.weight": torch.zeros(3)},
    "model.backbone.weights=FILE": lambda: torchvision.models.resnet18(weights=None).state_dict(),
    "something else": lambda: {"weight": torch.zeros(3)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_other_files_are_refused_by_name(reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        adopt(REFUSED[reason]())
