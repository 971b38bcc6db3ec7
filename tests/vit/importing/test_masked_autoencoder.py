"""Files of MAE's authors and of transformers give the predictions of transformers' ViTMAE, or start classifiers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.config.compose import configure
from common.errors import UserError
from common.machine.seeds import generator
from common.train import assembly
from vit.importing.adopt import adopt as adopt_classifier
from vit.importing.masked_autoencoder import adopt
from vit.models.masked_autoencoder import DecoderOptions, MaskedAutoencoder

transformers = pytest.importorskip("transformers")

WIDTH, HEADS, LAYERS, PATCH, SIDE = 24, 3, 2, 4, 16
DECODER = DecoderOptions(width=16, heads=2, layers=2, feedforward=64)
HUB = {
    "vit.layers.": "vit.encoder.layer.",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
AUTHORS = {
    "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "vit.embeddings.cls_token": "cls_token",
    "vit.embeddings.position_embeddings": "pos_embed",
    "vit.layernorm.": "norm.",
    "vit.layers.": "blocks.",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_pos_embed": "decoder_pos_embed",
    "decoder.decoder_layers.": "decoder_blocks.",
    "decoder.decoder_": "decoder_",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.o_proj": "attn.proj",
}


def peer() -> Any:
    """transformers' model with all parameters redrawn."""
    shape = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "image_size": SIDE}
    shape |= {"intermediate_size": 4 * WIDTH, "patch_size": PATCH, "layer_norm_eps": 1e-6, "mask_ratio": 0.75}
    shape |= {"decoder_hidden_size": DECODER.width, "decoder_num_attention_heads": DECODER.heads}
    shape |= {"decoder_num_hidden_layers": DECODER.layers, "decoder_intermediate_size": DECODER.feedforward}
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**shape))
    random = generator("file")
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2, generator=random)
    return model.eval()


def replaced(state: dict[str, Tensor], words: dict[str, str]) -> dict[str, Tensor]:
    for old, new in words.items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    return state


def by_the_authors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in the layout of facebookresearch/mae: q, k and v are one matrix."""
    file = {}
    for name, tensor in replaced(state, AUTHORS).items():
        if "q_proj" in name:
            others = [replaced(state, AUTHORS)[name.replace("q_proj", f"{part}_proj")] for part in "kv"]
            file[name.replace("attention.q_proj", "attn.qkv")] = torch.cat([tensor, *others])
        elif "k_proj" not in name and "v_proj" not in name:
            file[name] = tensor
    return file


def model(**keys: Any) -> MaskedAutoencoder:
    shape = {"channels": 3, "image_size": (SIDE, SIDE), "patch_size": PATCH, "embedding": "convolution"}
    shape |= {"width": WIDTH, "heads": HEADS, "layers": LAYERS, "feedforward": 4 * WIDTH, "norm_eps": 1e-6}
    return MaskedAutoencoder(**{**shape, "decoder": DECODER, **keys}).eval()


LAYOUTS = {
    "version 5": lambda state: state,
    "hub": lambda state: replaced(state, HUB),
    "authors": lambda state: {"model": by_the_authors(state), "epoch": 3},
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
    names = {*by_the_authors(peer().state_dict())}
    for name in (
        "blocks.1.attn.qkv.weight",
        "decoder_blocks.0.norm1.bias",
        "decoder_pred.weight",
        "decoder_embed.bias",
    ):
        assert name in names
    assert {"cls_token", "mask_token", "pos_embed", "decoder_pos_embed", "norm.weight", "decoder_norm.bias"} <= names


def test_a_pre_trained_encoder_alone_is_imported_without_a_decoder() -> None:
    file = {n: t for n, t in by_the_authors(peer().state_dict()).items() if not n.startswith(("decoder", "mask"))}
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
    torch.save({"model": by_the_authors(peer().state_dict())}, tmp_path / "mae.pth")
    sizes = [f"model.{key}={value}" for key, value in vars(DECODER).items()]
    keys = [key.replace("model.", "model.decoder.") for key in sizes]
    keys += [f"model.width={WIDTH}", f"model.heads={HEADS}", f"model.layers={LAYERS}", f"model.feedforward={4 * WIDTH}"]
    keys += [f"model.patch_size={PATCH}", f"data.image_size=[{SIDE},{SIDE}]", "trainer.device=cpu"]
    loaded, _ = assembly.load(tmp_path / "mae.pth", "model=mae_b16", *keys)
    assert torch.equal(loaded.mask_token, peer().decoder.mask_token.flatten())
    parts = assembly.assemble(configure("train", ["model=mae_b16", *keys, f"checkpoint={tmp_path / 'mae.pth'}"]))
    assert "re-initialised" not in parts.weights_line


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
