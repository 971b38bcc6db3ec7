"""torchvision's detectors as files: names of tensors, also of earlier versions, classes, and files that are refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import torchvision.models.detection as detection
from torch import Tensor

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from common.train import assembly
from detr.importing.torchvision_detectors import adopt

MODELS = {
    "faster_rcnn_r50_fpn": detection.fasterrcnn_resnet50_fpn,
    "mask_rcnn_r50_fpn": detection.maskrcnn_resnet50_fpn,
    "retinanet_r50_fpn": detection.retinanet_resnet50_fpn,
    "fcos_r50_fpn": detection.fcos_resnet50_fpn,
    "ssd": detection.ssd300_vgg16,
}
WITH_BACKGROUND = ("faster_rcnn_r50_fpn", "mask_rcnn_r50_fpn", "ssd")


def tensors(function: Any, **options: Any) -> dict[str, Tensor]:
    """The state dict of a model without weights, without memory."""
    with torch.device("meta"):
        weights: dict[str, Tensor] = function(weights=None, weights_backbone=None, **options).state_dict()
    return weights


def old_name(name: str, key: str) -> str:
    """The name of a tensor in files of torchvision before 0.13, as the published ones are."""
    if name in ("faster_rcnn_r50_fpn", "mask_rcnn_r50_fpn"):
        key = re.sub(r"mask_head\.(\d)\.0\.", lambda found: f"mask_head.mask_fcn{int(found[1]) + 1}.", key)
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
    adopted = adopt({"model": content} if old else content, masks=name == "mask_rcnn_r50_fpn")
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
    head = "roi_heads.box_predictor." if "_rcnn_" in name else "head.classification_head."
    content = {key: value for key, value in tensors(MODELS[name]).items() if not key.startswith(head)}
    assert adopt(content).task_state == {}


REFUSED = {
    "Keypoint R-CNN": lambda: tensors(detection.keypointrcnn_resnet50_fpn),
    "version 2": lambda: tensors(detection.fasterrcnn_resnet50_fpn_v2),
    "torchvision's version 2": lambda: tensors(detection.maskrcnn_resnet50_fpn_v2),
    "an official DETR": lambda: {"transformer.encoder.layers.0.norm1.weight": torch.zeros(3)},
    "model.backbone.weights=FILE": lambda: torchvision.models.resnet18(weights=None).state_dict(),
    "something else": lambda: {"weight": torch.zeros(3)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_other_files_are_refused_by_name(reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        adopt(REFUSED[reason]())


# The small models have the layout of torchvision's, so their networks serve as files.


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("shapes")
    return [f"data.root={folder}", "data.train_count=4", "data.val_count=1", "data.test_count=1"]


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("faster_rcnn", ["roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"]),
        ("retinanet", ["head.classification_head.cls_logits"]),
        ("fcos", ["head.classification_head.cls_logits"]),
    ],
)
def test_fine_tuning_re_initialises_the_class_head_and_keeps_the_rest(
    name: str, heads: list[str], shapes: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    columns = 91 - (name == "faster_rcnn")
    theirs = build(configure("train", [f"model={name}"])["model"], classes=columns).net.state_dict()
    torch.save(theirs, tmp_path / "theirs.pth")
    parts = assembly.assemble(configure("train", [f"model={name}", *shapes, f"checkpoint={tmp_path / 'theirs.pth'}"]))
    names = [f"net.{head}.{leaf}" for head in heads for leaf in ("weight", "bias")]
    assert parts.weights_line.endswith(f"; re-initialised: {', '.join(names)}")
    ours = parts.model.state_dict()
    assert {key for key in ours if key not in names} == {f"net.{key}" for key in theirs} - {*names}
    assert all(torch.equal(ours[key], theirs[key.removeprefix("net.")]) for key in ours if key not in names)
    restored = assembly.restore(
        configure("evaluate", [f"model={name}", f"checkpoint={tmp_path / 'theirs.pth'}"], assembly.stored_config)
    )
    assert restored.task.state()["categories"][-1] == {"id": 90, "name": "toothbrush"}


def test_equally_many_other_classes_re_initialise_the_class_head_too(shapes: list[str], tmp_path: Path) -> None:
    torch.manual_seed(1)
    torch.save(build(configure("train", ["model=fcos"])["model"], classes=4).net.state_dict(), tmp_path / "four.pth")
    parts = assembly.assemble(configure("train", ["model=fcos", *shapes, f"checkpoint={tmp_path / 'four.pth'}"]))
    assert "re-initialised: net.head.classification_head.cls_logits.weight" in parts.weights_line


def test_a_backbone_starts_from_torchvisions_imagenet_weights_or_from_a_detectors_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    published = torchvision.models.resnet18(weights=None).state_dict()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(published, tmp_path / "checkpoints/resnet18-f37072fd.pth")
    small = ["model.backbone.name=resnet18", "model.width=32"]

    def model(*overrides: str) -> Any:
        return build(configure("train", ["model=fcos_r50_fpn", *small, *overrides])["model"], classes=3)

    first = model()
    assert "except the backbone: imagenet_v1" in first.fetch_weights()
    body = first.net.backbone.body.state_dict()
    assert all(torch.equal(value, published[key]) for key, value in body.items()) and len(body) == 100
    torch.save(first.net.state_dict(), tmp_path / "detector.pth")
    second = model(f"model.backbone.weights={tmp_path / 'detector.pth'}")
    second.fetch_weights()
    assert all(torch.equal(value, body[key]) for key, value in second.net.backbone.body.state_dict().items())
    assert model("model.backbone.weights=none").fetch_weights() is None


@pytest.mark.slow
def test_ssd_starts_from_the_vgg_that_torchvision_publishes_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    published = torchvision.models.vgg16(weights=None).features.state_dict(prefix="features.")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(published, tmp_path / "checkpoints/vgg16_features-amdegroot-88682ab5.pth")
    model = build(configure("train", ["model=ssd"])["model"], classes=3)
    model.fetch_weights()
    backbone = model.net.backbone
    assert torch.equal(backbone.features[21].weight, published["features.21.weight"])
    assert torch.equal(backbone.extra[0][5].weight, published["features.28.weight"])


def test_the_boxes_of_a_mask_rcnn_make_a_faster_rcnn() -> None:
    adopted = adopt(tensors(detection.maskrcnn_resnet50_fpn))
    with torch.device("meta"):
        ours = build(configure("train", ["model=faster_rcnn_r50_fpn"])["model"], classes=90).state_dict()
    assert adopted.weights.keys() == ours.keys()
    heads = [name for name in adopted.left_out if not name.endswith("num_batches_tracked")]
    assert len(heads) == 12 and all(name.startswith("roi_heads.mask_") for name in heads)
