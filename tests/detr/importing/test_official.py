"""Official files: tensor names, parity with an implementation of the official network, and files that are refused."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d

from common.errors import UserError
from common.files import checkpoint
from common.machine.seeds import generator
from common.nn.positions import sine_2d
from common.nn.resnet import BackboneOptions
from detr.criterion.matcher import MatcherOptions
from detr.criterion.set_loss import LossOptions
from detr.importing.coco_categories import panoptic_categories
from detr.importing.official import adopt, export
from detr.models.detector import Detector, PositionOptions
from detr.tasks.detection import Detection, PredictOptions

SINE = PositionOptions(kind="sine", temperature=10000.0, at_input=False)
LEARNED = PositionOptions(kind="learned", temperature=10000.0, at_input=False)


class OfficialDetr(nn.Module):
    """The official network, with its tensor names, built from PyTorch's layers."""

    def __init__(self, *, body: str, width: int, layers: int, rows: int, pre_norm: bool = False, learned: bool = False):
        super().__init__()
        resnet = getattr(torchvision.models, body)(weights=None, norm_layer=FrozenBatchNorm2d)
        features, self.pre_norm = resnet.fc.in_features, pre_norm
        self.backbone = nn.ModuleList([nn.Module(), nn.Module()])
        self.backbone[0].body = IntermediateLayerGetter(resnet, {"layer4": "0"})
        if learned:
            self.backbone[1].row_embed, self.backbone[1].col_embed = (nn.Embedding(50, width // 2) for _ in range(2))
        arguments = {"d_model": width, "nhead": 4, "dim_feedforward": 2 * width, "dropout": 0.0, "batch_first": True}
        self.transformer = nn.ModuleDict({"encoder": nn.Module(), "decoder": nn.Module()})
        encoder, decoder = self.transformer["encoder"], self.transformer["decoder"]
        encoder.layers = nn.ModuleList(nn.TransformerEncoderLayer(**arguments) for _ in range(layers))
        decoder.layers = nn.ModuleList(nn.TransformerDecoderLayer(**arguments) for _ in range(layers))
        encoder.norm = nn.LayerNorm(width) if pre_norm else nn.Identity()
        decoder.norm = nn.LayerNorm(width)
        self.class_embed = nn.Linear(width, rows)
        self.bbox_embed = nn.Module()
        self.bbox_embed.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 4)])
        self.query_embed = nn.Embedding(10, width)
        self.input_proj = nn.Conv2d(features, width, 1)

    def forward(self, images: Tensor, padding: Tensor) -> dict[str, Tensor]:
        """`padding` (B, H, W) is True outside the image, the official convention."""
        features = self.backbone[0].body(images)["0"]
        mask = nn.functional.interpolate(padding[None].float(), size=features.shape[-2:])[0].bool()
        if len(list(self.backbone[1].children())):
            _, height, width = mask.shape
            columns = self.backbone[1].col_embed.weight[None, :width].expand(height, -1, -1)
            rows = self.backbone[1].row_embed.weight[:height, None].expand(-1, width, -1)
            positions = torch.cat([columns, rows], dim=-1)[None]
        else:
            positions = sine_2d(~mask, self.query_embed.embedding_dim)
        positions, mask = positions.flatten(1, 2), mask.flatten(1)
        x = self.input_proj(features).flatten(2).transpose(1, 2)
        encoder, decoder = self.transformer["encoder"], self.transformer["decoder"]
        for layer in encoder.layers:
            x = self.residual(
                x, layer.norm1, lambda y, at=layer: at.self_attn(y + positions, y + positions, y, mask)[0]
            )
            x = self.residual(x, layer.norm2, lambda y, at=layer: at.linear2(at.linear1(y).relu()))
        memory, queries = encoder.norm(x), self.query_embed.weight.expand(len(images), -1, -1)
        keys, x, outputs = memory + positions, torch.zeros_like(queries), []
        for layer in decoder.layers:
            x = self.residual(x, layer.norm1, lambda y, at=layer: at.self_attn(y + queries, y + queries, y)[0])
            x = self.residual(x, layer.norm2, lambda y, at=layer: at.multihead_attn(y + queries, keys, memory, mask)[0])
            x = self.residual(x, layer.norm3, lambda y, at=layer: at.linear2(at.linear1(y).relu()))
            outputs.append(decoder.norm(x))
        decoded = torch.stack(outputs)
        first, second, third = self.bbox_embed.layers
        boxes = third(second(first(decoded).relu()).relu()).sigmoid()
        return {"logits": self.class_embed(decoded), "boxes_cxcywh": boxes}

    def residual(self, x: Tensor, norm: nn.Module, sublayer: Any) -> Tensor:
        return x + sublayer(norm(x)) if self.pre_norm else norm(x + sublayer(x))


def official(**changed: Any) -> OfficialDetr:
    torch.manual_seed(0)
    network = OfficialDetr(**{"body": "resnet18", "width": 32, "layers": 2, "rows": 92, **changed}).eval()
    rng = generator("official")
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.dim() == 1:  # norms, statistics and biases, which start as ones and zeros
                low = 0.5 if name.endswith(("weight", "running_var")) else -0.2
                tensor.uniform_(low, low + 0.4, generator=rng)
    return network


def detector(classes: int = 91, **changed: Any) -> Detector:
    body = changed.pop("body", "resnet18")
    arguments = {"width": 32, "heads": 4, "encoder_layers": 2, "decoder_layers": 2, "feedforward": 64, "queries": 10}
    arguments |= {"dropout": 0.0, "pre_norm": False, "positions": SINE, "auxiliary": True, "official_padding": True}
    backbone = BackboneOptions(name=body, weights="none", dilation=False, frozen=2)
    return Detector(classes=classes, backbone=backbone, **{**arguments, **changed}).eval()


@pytest.mark.parametrize("pre_norm", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("learned", [False, True], ids=["sine", "learned"])
@torch.no_grad()
def test_an_adopted_file_gives_the_outputs_of_the_official_network(pre_norm: bool, learned: bool) -> None:
    theirs = official(pre_norm=pre_norm, learned=learned)
    ours = detector(pre_norm=pre_norm, positions=LEARNED if learned else SINE)
    ours.load_state_dict(adopt({"model": theirs.state_dict()}).weights)

    sizes = torch.tensor([[70, 65], [50, 97]])
    images, padding = torch.zeros(2, 3, 70, 97), torch.ones(2, 70, 97, dtype=torch.bool)
    for image, mask, (height, width) in zip(images, padding, sizes.tolist(), strict=True):
        image[:, :height, :width] = torch.randn(3, height, width, generator=generator(height))
        mask[:height, :width] = False
    layers, expected = ours(images, sizes), theirs(images, padding)
    stacked = {name: torch.stack([layer[name] for layer in layers]) for name in expected}
    for name in expected:
        torch.testing.assert_close(stacked[name], expected[name], rtol=0, atol=1e-5)  # fp32, logits of order 1


@pytest.mark.parametrize(
    "keys, theirs, ours",
    [
        (458, {}, {}),
        (460, {"pre_norm": True}, {"pre_norm": True}),
        (460, {"learned": True}, {"positions": LEARNED}),
        (713, {"body": "resnet101"}, {"body": "resnet101"}),
    ],
    ids=["R50", "pre-norm", "learned", "R101"],
)
def test_published_layouts_fill_every_tensor_of_our_models(
    keys: int, theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    with torch.device("meta"):
        file = OfficialDetr(**{"body": "resnet50", "width": 256, "layers": 6, "rows": 92, **theirs}).state_dict()
        arguments = {"width": 256, "encoder_layers": 6, "decoder_layers": 6, "feedforward": 512}
        model = detector(**{"body": "resnet50", **arguments, **ours}).state_dict()
    assert len(file) == keys
    weights = adopt(file).weights
    assert {name: value.shape for name, value in weights.items()} == {name: v.shape for name, v in model.items()}


@pytest.mark.parametrize("changed", [{}, {"pre_norm": True}, {"learned": True}, {"body": "resnet50"}], ids=str)
def test_adopting_then_exporting_changes_nothing(changed: dict[str, Any]) -> None:
    file = official(**changed).state_dict()
    exported = export(adopt({"model": file}).weights)
    assert list(exported) == ["model"] and list(exported["model"]) == list(file), "names in the same order"
    assert all(torch.equal(exported["model"][name], value) for name, value in file.items())


def test_exporting_then_adopting_changes_nothing() -> None:
    ours = detector(classes=4, positions=LEARNED).state_dict()
    restored = adopt(export(ours)).weights
    assert list(restored) == list(ours) and all(torch.equal(restored[name], ours[name]) for name in ours)


def test_published_files_and_official_checkpoints_are_loaded_and_adopted(tmp_path: Path) -> None:
    """Files published in 2020 are no zip archives; a checkpoint has the arguments and the optimizer's state."""
    weights = official().state_dict()
    torch.save({"model": weights}, tmp_path / "published.pth", _use_new_zipfile_serialization=False)
    content = {"model": weights, "optimizer": {"state": {}}, "epoch": 3, "args": argparse.Namespace(lr=1e-4)}
    torch.save(content, tmp_path / "own.pth")
    for name in ("published.pth", "own.pth"):
        adopted = adopt(checkpoint.load(tmp_path / name))
        detector().load_state_dict(adopted.weights)
        assert adopted.left_out == []


def test_a_bare_state_dict_is_adopted() -> None:
    weights = official().state_dict()
    assert adopt(dict(weights)).weights.keys() == adopt({"model": weights}).weights.keys()


def test_92_rows_are_cocos_categories_by_id() -> None:
    """torchvision lists them by id as well, with the same unused ids."""
    published = torchvision.models.detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    categories = adopt(official().state_dict()).task_state["categories"]
    assert [category["id"] for category in categories] == list(range(91))
    names = [category["name"] for category in categories]
    assert names == ["N/A", *published[1:]]
    assert sum(name != "N/A" for name in names) == 80 and names[1] == "person" and names[90] == "toothbrush"


def test_classes_other_than_cocos_are_numbered() -> None:
    categories = adopt(official(rows=4).state_dict()).task_state["categories"]
    assert categories == [{"id": i, "name": f"class {i}"} for i in range(3)]


def test_the_state_is_what_the_task_restores() -> None:
    task = Detection(
        data=None,
        queries=10,
        loss=LossOptions(
            class_weight=1.0,
            box_weight=5.0,
            giou_weight=2.0,
            no_object=0.1,
            classification="softmax",
            focal_alpha=0.25,
            focal_gamma=2.0,
        ),
        matcher=MatcherOptions(class_cost=1.0, box_cost=5.0, giou_cost=2.0),
        predict=PredictOptions(threshold=0.5),
        evaluator="pycocotools",
    )
    adopted = task.adopt({"model": official().state_dict()})
    task.restore(adopted.task_state)
    model = detector(**task.model_arguments())
    model.load_state_dict(adopted.weights)
    assert task.state() == adopted.task_state


def test_the_mask_head_of_a_panoptic_file_is_left_out_and_listed() -> None:
    detr = official(rows=251)
    file = {f"detr.{name}": value for name, value in detr.state_dict().items()}
    mask_head = ["bbox_attention.q_linear.weight", "mask_head.lay1.weight", "mask_head.gn1.bias"]
    mask_head += ["mask_head.adapter1.bias"]
    file |= {name: torch.zeros(1) for name in mask_head}
    adopted = adopt({"model": file})
    assert adopted.left_out == mask_head
    assert len(adopted.task_state["categories"]) == 250
    assert all(torch.equal(adopted.weights[name], value) for name, value in adopt(detr.state_dict()).weights.items())


def test_counters_are_left_out_and_listed() -> None:
    counters = ["backbone.0.body.bn1.num_batches_tracked", "class_embed.total_ops", "total_params"]
    adopted = adopt({**official().state_dict(), **{name: torch.zeros(1) for name in counters}})
    assert adopted.left_out == counters
    detector().load_state_dict(adopted.weights)


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in official().state_dict().items() if name not in names}


REFUSED = {
    "a Deformable DETR": {"transformer.encoder.layers.0.self_attn.sampling_offsets.weight": torch.zeros(1)},
    "a conditional, DAB- or DN-DETR": {"transformer.decoder.layers.0.ca_qpos_proj.weight": torch.zeros(1)},
    "a model in the layout of transformers": {"class_labels_classifier.weight": torch.zeros(1)},
    "a detector of torchvision": {"rpn.head.conv.weight": torch.zeros(1)},
    "a ResNet alone .which model.backbone.weights=FILE": {"layer4.0.conv1.weight": torch.zeros(1)},
    "something else": {"weights": torch.zeros(1)},
}


@pytest.mark.parametrize("format_name", REFUSED)
@pytest.mark.parametrize("among", ["alone", "among an official file's"])
def test_another_format_is_refused_by_its_name(format_name: str, among: str) -> None:
    tensors = {**(official().state_dict() if among != "alone" else {}), **REFUSED[format_name]}
    with pytest.raises(UserError, match=rf"is {format_name}.*not an official DETR .it has .*give a") as refusal:
        adopt({"model": tensors})
    assert str(refusal.value).count(". ") == 0, "one sentence"


@pytest.mark.parametrize("part", ["bbox_embed.layers.2", "input_proj", "transformer.decoder.norm"])
def test_a_file_that_lacks_a_part_is_refused_with_its_name(part: str) -> None:
    with pytest.raises(UserError, match=rf"not an official DETR .it has no {part}\."):
        adopt(without(f"{part}.weight"))


@pytest.mark.parametrize("content", [{}, {"model": None}, {"epoch": 3}, {"weights": {"a": torch.zeros(1)}}], ids=str)
def test_a_file_without_weights_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="holds no weights"):
        adopt(content)


@pytest.mark.parametrize("parts", [("class_embed",), ("class_embed", "query_embed")])
def test_a_file_for_fine_tuning_has_no_classes_and_is_not_evaluated(parts: tuple[str, ...]) -> None:
    names = [f"{part}.{leaf}" for part in parts for leaf in ("weight", "bias")]
    adopted = adopt({"model": without(*names)})
    missing = {"class_head.weight", "class_head.bias", "queries.weight"}
    lacking = {name for name in missing if name.split(".")[0] in ("class_head", "queries")[: len(parts)]}
    assert detector().state_dict().keys() - adopted.weights.keys() == lacking and adopted.task_state == {}
    with pytest.raises(UserError, match=r"no class head .*start a run from it .train.py checkpoint=FILE"):
        Detection.restore(object.__new__(Detection), adopted.task_state)


@pytest.mark.parametrize("prefix", ["module.", "net.", "model.", "model._orig_mod.", "model.module.", "_orig_mod."])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "module"])
def test_wrappers_and_prefixes_of_training_programs_are_removed(prefix: str, wrapper: str | None) -> None:
    tensors = {f"{prefix}{name}": value for name, value in official().state_dict().items()}
    tensors["criterion.empty_weight"] = torch.ones(1)  # of a LightningModule with the official criterion
    adopted = adopt(tensors if wrapper is None else {wrapper: tensors, "epoch": 3})
    detector().load_state_dict(adopted.weights)
    assert adopted.left_out == ["criterion.empty_weight"]


def test_only_our_detector_is_exported() -> None:
    with pytest.raises(UserError, match=r"patches.weight has no place in the official DETR"):
        export({**detector().state_dict(), "patches.weight": torch.zeros(1)})


def test_an_official_panoptic_file_is_read_and_written_with_its_490_tensors() -> None:
    backbone = BackboneOptions(name="resnet50", weights="none", dilation=False, frozen=2)
    with torch.device("meta"):
        ours = Detector(
            classes=250,
            backbone=backbone,
            width=256,
            heads=8,
            encoder_layers=6,
            decoder_layers=6,
            feedforward=2048,
            dropout=0.1,
            pre_norm=False,
            queries=100,
            positions=SINE,
            auxiliary=True,
            official_padding=False,
            masks=True,
        ).state_dict()
    tensors = export(ours)["model"]
    assert len(tensors) == 490
    names = {name for name in tensors if not name.startswith("detr.")}
    parts = {*(f"lay{i}" for i in range(1, 6)), *(f"gn{i}" for i in range(1, 6)), *(f"adapter{i}" for i in (1, 2, 3))}
    assert {name.split(".")[1] for name in names if name.startswith("mask_head.")} == parts | {"out_lay"}
    assert {name for name in names if not name.startswith("mask_head.")} == {
        f"bbox_attention.{part}_linear.{leaf}" for part in "qk" for leaf in ("weight", "bias")
    }
    shapes = {"lay1": (264, 264, 3, 3), "lay5": (16, 32, 3, 3), "adapter1": (128, 1024, 1, 1), "out_lay": (1, 16, 3, 3)}
    assert {part: tuple(tensors[f"mask_head.{part}.weight"].shape) for part in shapes} == shapes
    adopted = adopt({"model": tensors}, masks=True)
    assert not adopted.left_out and len(adopted.task_state["categories"]) == 250
    assert all(adopted.weights[name] is tensor for name, tensor in ours.items()) and len(adopted.weights) == len(ours)
    assert len(adopt({"model": tensors}).left_out) == 4 + 2 * 14


def test_the_classes_of_an_official_panoptic_file_are_those_of_cocos_panoptic_task() -> None:
    categories = panoptic_categories()
    assert [category["id"] for category in categories] == list(range(250))
    named = [category for category in categories if category["name"] != "N/A"]
    assert len(named) == 133 and sum(category["isthing"] for category in named) == 80
    by_id = {category["id"]: category for category in named}
    assert by_id[18] == {"id": 18, "name": "dog", "isthing": 1}
    assert by_id[187] == {"id": 187, "name": "sky-other-merged", "isthing": 0}


def test_cocos_panoptic_categories_are_those_of_its_json(real_data: Callable[[str], Path]) -> None:
    path = real_data("coco_panoptic_mini") / "annotations" / "panoptic_val2017.json"
    stored = json.loads(path.read_text())["categories"]
    ours = {category["id"]: category for category in panoptic_categories()}
    assert len(stored) == 133
    assert all(ours[c["id"]] == {"id": c["id"], "name": c["name"], "isthing": c["isthing"]} for c in stored)
