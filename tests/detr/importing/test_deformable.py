"""Official Deformable DETR files: the names of the four published layouts, there and back, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from common.nn.resnet import BackboneOptions
from detr.importing.deformable import adopt, export, recognises
from detr.models.deformable_detector import DeformableDetector
from detr.models.levels import SamplingOptions, SinePositionOptions

FOUR, ONE = SamplingOptions(maps=3, levels=4, points=4), SamplingOptions(maps=1, levels=1, points=4)
VARIANTS: dict[str, tuple[dict[str, Any], int]] = {  # options, and number of tensors in the official file
    "four levels": ({}, 561),
    "refinement": ({"refine": True}, 597),
    "two stages": ({"refine": True, "two_stage": True}, 630),
    "one level": ({"sampling": ONE}, 549),
}


def detector(**changed: Any) -> DeformableDetector:
    arguments: dict[str, Any] = {
        "classes": 91,
        "logits": 91,
        "backbone": BackboneOptions(name="resnet50", weights="none", dilation=False, frozen=2),
        "sampling": FOUR,
        "width": 256,
        "heads": 8,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "feedforward": 1024,
        "dropout": 0.1,
        "pre_norm": False,
        "queries": 300,
        "positions": SinePositionOptions(kind="sine", temperature=10000.0, at_input=False),
        "refine": False,
        "two_stage": False,
        "auxiliary": True,
        "official_padding": False,
    }
    return DeformableDetector(**{**arguments, **changed})


def official_shapes(levels: int, refine: bool, two_stage: bool) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the official network outside its backbone, written down from its architecture."""
    shapes: dict[str, tuple[int, ...]] = {"transformer.level_embed": (levels, 256)}

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def norm(name: str, width: int = 256) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    for level, channels in enumerate((512, 1024, 2048, 2048) if levels == 4 else (2048,)):
        kernel = 3 if level == 3 else 1
        shapes |= {
            f"input_proj.{level}.0.weight": (256, channels, kernel, kernel),
            f"input_proj.{level}.0.bias": (256,),
        }
        norm(f"input_proj.{level}.1")
    for i in range(6):
        for layer, attention in ((f"encoder.layers.{i}", "self_attn"), (f"decoder.layers.{i}", "cross_attn")):
            for name, outputs in (
                ("sampling_offsets", 8 * levels * 4 * 2),
                ("attention_weights", 8 * levels * 4),
                ("value_proj", 256),
                ("output_proj", 256),
            ):
                linear(f"transformer.{layer}.{attention}.{name}", outputs, 256)
            linear(f"transformer.{layer}.linear1", 1024, 256)
            linear(f"transformer.{layer}.linear2", 256, 1024)
            norm(f"transformer.{layer}.norm1")
            norm(f"transformer.{layer}.norm2")
        norm(f"transformer.decoder.layers.{i}.norm3")
        shapes[f"transformer.decoder.layers.{i}.self_attn.in_proj_weight"] = (768, 256)
        shapes[f"transformer.decoder.layers.{i}.self_attn.in_proj_bias"] = (768,)
        linear(f"transformer.decoder.layers.{i}.self_attn.out_proj", 256, 256)
    if two_stage:
        for name, width in (("enc_output", 256), ("pos_trans", 512)):
            linear(f"transformer.{name}", width, width)
            norm(f"transformer.{name}_norm", width)
    else:
        linear("transformer.reference_points", 2, 256)
        shapes["query_embed.weight"] = (300, 512)
    for i in range(6 + two_stage):
        for prefix in ["", *["transformer.decoder."] * two_stage]:
            linear(f"{prefix}class_embed.{i}", 91, 256)
        for prefix in ["", *["transformer.decoder."] * refine]:
            for layer, outputs in enumerate((256, 256, 4)):
                linear(f"{prefix}bbox_embed.{i}.layers.{layer}", outputs, 256)
    return shapes


@pytest.mark.parametrize("variant", VARIANTS)
def test_exported_files_have_the_official_names_and_shapes(variant: str) -> None:
    options, count = VARIANTS[variant]
    with torch.device("meta"):
        model = detector(**options)
    tensors = export(model.state_dict())["model"]
    outside = {name: tuple(v.shape) for name, v in tensors.items() if not name.startswith("backbone.0.body.")}
    two_stage, refine = options.get("two_stage", False), options.get("refine", False)
    assert outside == official_shapes(options.get("sampling", FOUR).levels, refine, two_stage)
    assert len(tensors) == count


@pytest.mark.parametrize("variant", VARIANTS)
def test_exporting_then_adopting_changes_nothing(variant: str) -> None:
    ours = tiny(variant)
    file = export(ours)
    adopted = adopt({**file, "epoch": 3})
    assert adopted.weights.keys() == ours.keys()
    assert all(torch.equal(adopted.weights[name], ours[name]) for name in ours)
    again = export(adopted.weights)["model"]
    assert again.keys() == file["model"].keys() and all(torch.equal(again[n], v) for n, v in file["model"].items())
    assert adopt(dict(file["model"])).weights.keys() == ours.keys(), "a bare state dict"


def tiny(variant: str, classes: int = 91) -> dict[str, Tensor]:
    backbone = BackboneOptions(name="resnet18", weights="none", dilation=False, frozen=2)
    changed = {"width": 32, "encoder_layers": 1, "decoder_layers": 2, "feedforward": 32, "queries": 5}
    options = {**VARIANTS[variant][0], **changed, "classes": classes, "logits": classes, "backbone": backbone}
    weights = detector(**options).state_dict()
    return {name: torch.randn_like(value) for name, value in weights.items()}


def test_91_columns_are_cocos_category_ids() -> None:
    categories = adopt(export(tiny("refinement"))).task_state["categories"]
    assert [category["id"] for category in categories] == list(range(91))
    assert (categories[0]["name"], categories[1]["name"], categories[90]["name"]) == ("N/A", "person", "toothbrush")
    others = adopt(export(tiny("refinement", classes=3))).task_state["categories"]
    assert others == [{"id": i, "name": f"class {i}"} for i in range(3)]


@pytest.mark.parametrize(
    "variant, name",
    [
        ("four levels", "class_embed.1.weight"),
        ("one level", "bbox_embed.1.layers.2.bias"),
        ("refinement", "transformer.decoder.bbox_embed.1.layers.0.weight"),
        ("two stages", "transformer.decoder.class_embed.2.bias"),
    ],
)
def test_copies_that_differ_are_refused(variant: str, name: str) -> None:
    file = export(tiny(variant))
    file["model"][name] = file["model"][name] + 1
    with pytest.raises(UserError, match=rf"{name} differ"):
        adopt(file)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"transformer.decoder.ref_point_head.layers.0.weight": torch.zeros(1)}, "a DINO, DN- or DAB-DETR and not"),
        ({"weights": torch.zeros(1)}, "something else and not an official Deformable DETR .it has weights,"),
        ({"input_proj.0.0.weight": None}, "it has no input_proj.0.0.weight"),
        ({"transformer.level_embed": None}, "it has no transformer.level_embed"),
    ],
    ids=["DINO", "an unknown tensor", "without projection", "without level embedding"],
)
def test_other_files_are_refused(change: dict[str, Any], message: str) -> None:
    tensors = {**export(tiny("refinement"))["model"], **change}
    with pytest.raises(UserError, match=message):
        adopt({"model": {name: value for name, value in tensors.items() if value is not None}})


def test_counters_are_left_out_and_listed() -> None:
    tensors = {**export(tiny("four levels"))["model"], "class_embed.0.total_ops": torch.zeros(1)}
    assert adopt({"model": tensors}).left_out == ["class_embed.0.total_ops"]


def test_only_our_detector_is_exported() -> None:
    with pytest.raises(UserError, match=r"patches\.weight has no place in the official Deformable DETR"):
        export({**tiny("refinement"), "patches.weight": torch.zeros(1)})


def test_files_are_recognised_by_their_sampling_offsets() -> None:
    assert recognises(export(tiny("one level")))
    assert not recognises({"model": {"transformer.encoder.layers.0.self_attn.in_proj_weight": torch.zeros(1)}})
