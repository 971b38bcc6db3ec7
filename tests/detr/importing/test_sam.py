"""Official SAM files: names there and back, refusals, and a file through the door."""

from pathlib import Path

import pytest
import torch

from common.errors import UserError
from detr.importing import sam
from tests.segmenting import small_sam


def test_an_export_and_import_gives_the_same_tensors() -> None:
    weights = small_sam(torch.float32).state_dict()
    file = sam.export(weights)
    adopted = sam.adopt(file)
    assert adopted.weights.keys() == weights.keys() and not adopted.left_out and adopted.task_state == {}
    assert all(torch.equal(adopted.weights[name], tensor) for name, tensor in weights.items())


def test_the_names_are_those_of_the_official_code() -> None:
    file = sam.export(small_sam(torch.float32).state_dict())
    assert file["prompt_encoder.point_embeddings.3.weight"].shape == (1, 16)
    assert file["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"].shape == (2, 8)
    assert file["image_encoder.blocks.0.attn.rel_pos_h"].shape == (7, 8)
    assert file["image_encoder.blocks.1.attn.rel_pos_w"].shape == (11, 8)
    assert file["image_encoder.blocks.2.attn.qkv.weight"].shape == (72, 24)
    assert file["mask_decoder.transformer.layers.1.cross_attn_image_to_token.k_proj.bias"].shape == (8,)
    assert file["mask_decoder.output_hypernetworks_mlps.2.layers.2.weight"].shape == (2, 16)
    assert not any("in_proj" in name for name in file)


def test_wrappers_and_constants_are_removed() -> None:
    weights = small_sam(torch.float32).state_dict()
    file = {f"module.{name}": tensor for name, tensor in sam.export(weights).items()}
    adopted = sam.adopt({"model": {**file, "module.pixel_mean": torch.zeros(3, 1, 1)}})
    assert adopted.weights.keys() == weights.keys() and adopted.left_out == ["pixel_mean"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mask_decoder.hq_token.weight": torch.zeros(1, 16)}, "it has mask_decoder.hq_token.weight"),
        ({"image_encoder.pos_embed": None}, "it has no image_encoder.pos_embed"),
    ],
)
def test_other_networks_are_refused(change: dict[str, torch.Tensor | None], reason: str) -> None:
    file = {**sam.export(small_sam(torch.float32).state_dict()), **change}
    with pytest.raises(UserError, match=reason):
        sam.adopt({name: tensor for name, tensor in file.items() if tensor is not None})


def test_the_export_of_another_model_is_refused() -> None:
    weights = small_sam(torch.float32).state_dict()
    with pytest.raises(UserError, match=r"image_encoder\.0\.weight has no place"):
        sam.export({**weights, "image_encoder.0.weight": torch.zeros(1)})


def test_an_official_file_is_read_by_the_door(tmp_path: Path) -> None:
    from common.train import assembly

    weights = small_sam(torch.float32).state_dict()
    torch.save(sam.export(weights), tmp_path / "sam.pth")
    sizes = {
        "image_size": 48,
        "patch_size": 8,
        "width": 16,
        "mask_channels": 8,
        **{f"encoder.{k}": v for k, v in {"width": 24, "heads": 3, "layers": 3, "feedforward": 40}.items()},
        **{"encoder.window": 4, "encoder.global_layers": "[1]"},
        **{f"decoder.{k}": v for k, v in {"layers": 2, "heads": 2, "feedforward": 32, "iou_hidden": 24}.items()},
    }
    overrides = [f"model.{name}={value}" for name, value in sizes.items()]
    model, _ = assembly.load(tmp_path / "sam.pth", "model=sam_b", "trainer.device=cpu", *overrides)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())
