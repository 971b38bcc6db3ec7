"""Official DINO files: names and shapes there and back, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from common.nn.resnet import BackboneOptions
from detr.importing.dino import adopt, export, recognises
from detr.models.dino import Dino
from detr.models.levels import SamplingOptions, SinePositionOptions

FOUR = SamplingOptions(maps=3, levels=4, points=4)


def dino(**changed: Any) -> Dino:
    arguments: dict[str, Any] = {
        "classes": 91,
        "logits": 91,
        "backbone": BackboneOptions(name="resnet50", weights="none", dilation=False, frozen=2),
        "sampling": FOUR,
        "width": 256,
        "heads": 8,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "feedforward": 2048,
        "dropout": 0.0,
        "pre_norm": False,
        "queries": 900,
        "positions": SinePositionOptions(kind="sine", temperature=20.0, at_input=False, centred=False),
        "two_stage": True,
        "auxiliary": True,
        "official_padding": False,
    }
    return Dino(**{**arguments, **changed})


def tiny(**changed: Any) -> dict[str, Tensor]:
    backbone = BackboneOptions(name="resnet18", weights="none", dilation=False, frozen=2)
    size = {"width": 32, "encoder_layers": 1, "decoder_layers": 2, "feedforward": 32, "queries": 5}
    weights = dino(backbone=backbone, **size, **changed).state_dict()
    return {name: torch.randn_like(value) for name, value in weights.items()}


def test_exported_files_have_the_official_names_outside_encoder_and_decoder_layers() -> None:
    """Written down from the official code: transformer, heads for each layer, and their copies in the decoder."""
    with torch.device("meta"):
        tensors = export(dino().state_dict())["model"]
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    expected: dict[str, tuple[int, ...]] = {
        "label_enc.weight": (92, 256),
        "transformer.level_embed": (4, 256),
        "transformer.tgt_embed.weight": (900, 256),
        "transformer.enc_output.weight": (256, 256),
        "transformer.enc_output.bias": (256,),
        "transformer.enc_output_norm.weight": (256,),
        "transformer.enc_output_norm.bias": (256,),
        "transformer.decoder.norm.weight": (256,),
        "transformer.decoder.norm.bias": (256,),
        "transformer.decoder.ref_point_head.layers.0.weight": (256, 512),
        "transformer.decoder.ref_point_head.layers.0.bias": (256,),
        "transformer.decoder.ref_point_head.layers.1.weight": (256, 256),
        "transformer.decoder.ref_point_head.layers.1.bias": (256,),
    }
    heads = [f"{prefix}class_embed.{i}" for prefix in ("", "transformer.decoder.") for i in range(6)]
    for head in [*heads, "transformer.enc_out_class_embed"]:
        expected |= {f"{head}.weight": (91, 256), f"{head}.bias": (91,)}
        for layer, outputs in enumerate((256, 256, 4)):
            box = f"{head.replace('class_embed', 'bbox_embed')}.layers.{layer}"
            expected |= {f"{box}.weight": (outputs, 256), f"{box}.bias": (outputs,)}
    layers = ("transformer.encoder.layers.", "transformer.decoder.layers.", "backbone.0.body.", "input_proj.")
    assert {name: shape for name, shape in shapes.items() if not name.startswith(layers)} == expected


@pytest.mark.parametrize("two_stage", [True, False])
def test_exporting_then_adopting_changes_nothing(two_stage: bool) -> None:
    ours = tiny(two_stage=two_stage)
    file = export(ours)
    adopted = adopt({**file, "epoch": 3})
    assert recognises(file) and adopted.weights.keys() == ours.keys()
    assert all(torch.equal(adopted.weights[name], ours[name]) for name in ours)
    assert [category["id"] for category in adopted.task_state["categories"]] == list(range(91))


@pytest.mark.parametrize(
    "name", ["class_embed.1.weight", "transformer.decoder.bbox_embed.1.layers.0.weight", "bbox_embed.1.layers.2.bias"]
)
def test_copies_that_differ_are_refused(name: str) -> None:
    file = export(tiny())
    file["model"][name] = file["model"][name] + 1
    with pytest.raises(UserError, match=r"differ, although they are one tensor in the official network"):
        adopt(file)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backbone.0.patch_embed.proj.weight": torch.zeros(1)}, "it has backbone.0.patch_embed.proj.weight, which"),
        ({"transformer.tgt_embed.weight": None}, "it has no transformer.tgt_embed.weight"),
    ],
)
def test_other_files_are_refused(change: dict[str, Any], message: str) -> None:
    tensors = {**export(tiny())["model"], **change}
    with pytest.raises(UserError, match=message):
        adopt({"model": {name: value for name, value in tensors.items() if value is not None}})


def test_label_embeddings_beyond_the_classes_are_left_out() -> None:
    ours = tiny(classes=3, logits=3)
    file = export(ours)
    file["model"]["label_enc.weight"] = torch.cat([ours["label_embedding.weight"], torch.randn(88, 32)])
    adopted = adopt(file).weights
    assert all(torch.equal(adopted[name], value) for name, value in ours.items())
