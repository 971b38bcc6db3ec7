"""Files of MAE's authors and of transformers give the predictions of transformers' ViTMAE, or start classifiers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_files import HUB_VIT, MAE_DECODER, as_authors_mae, replaced
from foreign_files import MAE_HEADS as HEADS
from foreign_files import MAE_LAYERS as LAYERS
from foreign_files import MAE_PATCH as PATCH
from foreign_files import MAE_SIDE as SIDE
from foreign_files import MAE_WIDTH as WIDTH
from foreign_files import transformers_mae as peer
from torch import Tensor

from common.config.compose import configure
from common.errors import UserError
from common.machine.seeds import generator
from common.train import assembly
from vit.importing.adopt import adopt as adopt_classifier
from vit.importing.masked_autoencoder import adopt
from vit.models.masked_autoencoder import DecoderOptions, MaskedAutoencoder, sine_table

pytest.importorskip("transformers")

DECODER = DecoderOptions(**MAE_DECODER)


def model(**keys: Any) -> MaskedAutoencoder:
    shape = {"channels": 3, "image_size": (SIDE, SIDE), "patch_size": PATCH, "embedding": "convolution"}
    shape |= {"width": WIDTH, "heads": HEADS, "layers": LAYERS, "feedforward": 4 * WIDTH, "norm_eps": 1e-6}
    return MaskedAutoencoder(**{**shape, "decoder": DECODER, **keys}).eval()


LAYOUTS = {
    "version 5": lambda state: state,
    "hub": lambda state: replaced(state, HUB_VIT),
    "authors": lambda state: {"model": as_authors_mae(state), "epoch": 3},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_file_gives_the_predictions_of_transformers(layout: str) -> None:
    theirs, ours = peer(), model()
    adopted = adopt(LAYOUTS[layout](theirs.state_dict()), (SIDE, SIDE))
    assert adopted.left_out == [] and adopted.task_state == {}
    ours.load_state_dict(adopted.weights)
    images = torch.randn(3, 3, SIDE, SIDE, generator=generator("images"))
    noise = torch.rand(3, 16, generator=generator("noise"))
    expected = theirs(images, noise=noise).logits
    # fp32 sums of some hundred terms in another order; values are about one.
    torch.testing.assert_close(ours(images, noise.argsort(1)[:, :4]), expected, rtol=1e-5, atol=1e-5)


def test_the_authors_names_are_those_of_their_files() -> None:
    names = {*as_authors_mae(peer().state_dict())}
    for name in (
        "blocks.1.attn.qkv.weight",
        "decoder_blocks.0.norm1.bias",
        "decoder_pred.weight",
        "decoder_embed.bias",
    ):
        assert name in names
    assert {"cls_token", "mask_token", "pos_embed", "decoder_pos_embed", "norm.weight", "decoder_norm.bias"} <= names


def test_a_pre_trained_encoder_alone_is_imported_without_a_decoder() -> None:
    file = {n: t for n, t in as_authors_mae(peer().state_dict()).items() if not n.startswith(("decoder", "mask"))}
    gaps = model().load_state_dict(adopt({"model": file}).weights, strict=False)
    assert gaps.unexpected_keys == [] and "mask_token" in gaps.missing_keys
    assert all(name.startswith(("decoder", "mask_token", "pixels")) for name in gaps.missing_keys)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_encoder_of_a_file_starts_a_classifier(layout: str) -> None:
    state = peer().state_dict()
    adopted = adopt_classifier(LAYOUTS[layout](state), list("abc"))
    assert adopted.task_state == {"classes": list("abc")} and not any("decoder" in name for name in adopted.weights)
    assert len([name for name in adopted.left_out if "decoder" in name]) > 20
    assert torch.equal(adopted.weights["class_token"], state["vit.embeddings.cls_token"].flatten())
    ours = adopt(LAYOUTS[layout](state)).weights
    assert all(torch.equal(tensor, ours[name]) for name, tensor in adopted.weights.items())


def test_a_file_is_evaluated_by_name_of_the_model(tmp_path: Path) -> None:
    torch.save({"model": as_authors_mae(peer().state_dict())}, tmp_path / "mae.pth")
    sizes = [f"model.{key}={value}" for key, value in vars(DECODER).items()]
    keys = [key.replace("model.", "model.decoder.") for key in sizes]
    keys += [f"model.width={WIDTH}", f"model.heads={HEADS}", f"model.layers={LAYERS}", f"model.feedforward={4 * WIDTH}"]
    keys += [f"model.patch_size={PATCH}", f"data.image_size=[{SIDE},{SIDE}]", "trainer.device=cpu"]
    loaded, _ = assembly.load(tmp_path / "mae.pth", "model=mae_b16", *keys)
    assert torch.equal(loaded.mask_token, peer().decoder.mask_token.flatten())
    parts = assembly.assemble(configure("train", ["model=mae_b16", *keys, f"checkpoint={tmp_path / 'mae.pth'}"]))
    assert "re-initialised" not in parts.weights_line
    encoder = {n: t for n, t in as_authors_mae(peer().state_dict()).items() if not n.startswith(("decoder", "mask"))}
    torch.save({"model": encoder}, tmp_path / "encoder.pth")
    parts = assembly.assemble(configure("train", ["model=mae_b16", *keys, f"checkpoint={tmp_path / 'encoder.pth'}"]))
    assert "re-initialised: mask_token, decoder_embedding.weight" in parts.weights_line
    assert torch.equal(parts.model.decoder_positions.grid, sine_table(4, 4, DECODER.width)), "fixed, not random"
    assert not parts.model.decoder_positions.token.any()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}, "nothing for class_token"),
        ({"conv_proj.weight": torch.zeros(8, 3, 4, 4)}, "layout of torchvision"),
        ({"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4), "pixel_embed.weight": torch.zeros(3)}, "pixel_embed"),
    ],
)
def test_another_network_is_refused(content: dict[str, Tensor], reason: str) -> None:
    with pytest.raises(UserError, match=rf"is not a masked autoencoder \(it has .*{reason}.*\); give a file of"):
        adopt(content)
