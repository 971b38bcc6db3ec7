"""The masked autoencoder against transformers' ViTMAE in float64 with the same noise, and published numbers."""

from typing import Any

import parity
import pytest
import torch
from parity import images
from torch import Tensor

from common.config import check as config
from common.config import compose
from common.errors import UserError
from common.machine.seeds import generator
from vit.criterion.masked_pixels import MaskOptions, masked_error, masked_patches
from vit.models.masked_autoencoder import DecoderOptions, MaskedAutoencoder, sine_table

EXACT = {"rtol": 0, "atol": 1e-10}  # float64, a few blocks with values of about a hundred
WIDTH, HEADS, LAYERS, HIDDEN, PATCH, SIDE = 24, 3, 2, 40, 4, 16
DECODER = DecoderOptions(width=16, heads=2, layers=2, feedforward=28)
SMALL: dict[str, Any] = {
    **{"channels": 3, "image_size": (SIDE, SIDE), "patch_size": PATCH, "embedding": "convolution", "width": WIDTH},
    **{"heads": HEADS, "layers": LAYERS, "feedforward": HIDDEN, "decoder": DECODER, "norm_eps": 1e-6},
}
PATCHES = (SIDE // PATCH) ** 2
WORDS = {
    "vit.embeddings.patch_embeddings.projection": "patches",
    "vit.layernorm": "encoder.norm",
    "vit.layers": "encoder.blocks",
    "decoder.decoder_layers": "decoder.blocks",
    "decoder.decoder_norm": "decoder.norm",
    "decoder.decoder_embed": "decoder_embedding",
    "decoder.decoder_pred": "pixels",
    "layernorm_before": "residuals.0.norm",
    "layernorm_after": "residuals.1.norm",
    "attention.o_proj": "attention.out_proj",
    "mlp.fc1": "feed_forward.expand",
    "mlp.fc2": "feed_forward.contract",
}
TABLES = {"vit.embeddings.position_embeddings": "positions", "decoder.decoder_pos_embed": "decoder_positions"}
TOKENS = {"vit.embeddings.cls_token": "class_token", "decoder.mask_token": "mask_token"}


def autoencoder(**keys: Any) -> MaskedAutoencoder:
    return MaskedAutoencoder(**{**SMALL, **keys}).double().eval()


def transformers_model(**changed: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "image_size": SIDE}
    shape |= {"intermediate_size": HIDDEN, "patch_size": PATCH, "layer_norm_eps": 1e-6}
    shape |= {"decoder_hidden_size": DECODER.width, "decoder_num_attention_heads": DECODER.heads}
    shape |= {"decoder_num_hidden_layers": DECODER.layers, "decoder_intermediate_size": DECODER.feedforward}
    return transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**{**shape, **changed})).eval()


def randomised(model: Any) -> Any:
    """The model in float64 with all parameters redrawn, the fixed positions, too."""
    return parity.randomised(model.double(), std=0.3)


def renamed(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' tensors by our names, by slicing and joining only; written without the project's importer."""
    ours = {}
    for name, tensor in theirs.items():
        if name in TABLES:
            ours[f"{TABLES[name]}.token"] = tensor[0, 0]
            ours[f"{TABLES[name]}.grid"] = tensor[0, 1:].unflatten(0, (SIDE // PATCH, -1))
        elif name in TOKENS:
            ours[TOKENS[name]] = tensor.flatten()
        elif ".q_proj." in name:
            joined = torch.cat([theirs[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            ours[_by_words(name.replace("q_proj", "in_proj"))] = joined
        elif ".k_proj." not in name and ".v_proj." not in name:
            ours[_by_words(name)] = tensor
    return ours


def _by_words(name: str) -> str:
    for old, new in WORDS.items():
        name = name.replace(old, new)
    return name


def noise(count: int = 3, patches: int = PATCHES) -> Tensor:
    return torch.rand(count, patches, dtype=torch.float64, generator=generator("noise"))


def visible(options: MaskOptions, random: Tensor) -> Tensor:
    return random.argsort(dim=1)[:, : options.visible_count(random.shape[1])]


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("share", [0.75, 0.6])
@pytest.mark.parametrize("embedding", ["convolution", "multiply"])
def test_predictions_loss_and_gradients_are_those_of_transformers(
    normalise: bool, share: float, embedding: str
) -> None:
    theirs = randomised(transformers_model(norm_pix_loss=normalise, mask_ratio=share))
    ours, options = autoencoder(embedding=embedding), MaskOptions(share=share, normalise=normalise)
    ours.load_state_dict(renamed(dict(theirs.named_parameters())))
    pixels, random = images(count=3).requires_grad_(), noise()
    expected = theirs(pixels, noise=random)
    kept = visible(options, random)
    predicted = ours(pixels, kept)
    masked = masked_patches(kept, PATCHES)
    assert torch.equal(masked, expected.mask.bool())
    torch.testing.assert_close(predicted, expected.logits, **EXACT)
    loss = masked_error(options, predicted, pixels, masked, PATCH).mean()
    torch.testing.assert_close(loss, expected.loss, **EXACT)
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    assert {*theirs.state_dict()} - {*trained} == {*TABLES}
    their_gradients = torch.autograd.grad(expected.loss, [pixels, *trained.values()])
    parameters = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, [pixels, *parameters.values()])
    torch.testing.assert_close(gradients[0], their_gradients[0], **EXACT)
    expected_by_name = renamed(dict(zip(trained, their_gradients[1:], strict=True)))
    assert expected_by_name.keys() == parameters.keys()
    for name, gradient in zip(parameters, gradients[1:], strict=True):
        torch.testing.assert_close(gradient, expected_by_name[name].view_as(gradient), **EXACT)
        assert gradient.any(), f"{name} does not affect the loss"


def test_in_fp32_the_loss_is_that_of_transformers() -> None:
    theirs = randomised(transformers_model()).float()
    ours, options = autoencoder().float(), MaskOptions(share=0.75, normalise=False)
    ours.load_state_dict(renamed(dict(theirs.named_parameters())))
    pixels, kept = images(count=3).float(), visible(options, noise())
    expected = theirs(pixels, noise=noise())
    # fp32 rounds to 1e-7; values are about one.
    torch.testing.assert_close(ours(pixels, kept), expected.logits, rtol=0, atol=1e-5)


def test_the_fixed_positions_are_those_of_transformers() -> None:
    """Its function puts the row first, and its models exchange the halves, as the published weights have them."""
    pytest.importorskip("transformers")
    from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

    rows, columns = build_2d_sinusoidal_position_embedding(height=3, width=5, embed_dim=WIDTH).chunk(2, dim=1)
    expected = torch.cat([columns, rows], dim=1).unflatten(0, (3, 5))
    torch.testing.assert_close(sine_table(3, 5, WIDTH), expected, rtol=0, atol=1e-6)  # rounded to fp32
    model = autoencoder(image_size=(3 * PATCH, 5 * PATCH)).float()
    assert torch.equal(model.positions.grid, sine_table(3, 5, WIDTH)) and not model.positions.token.any()
    assert torch.equal(model.decoder_positions.grid, sine_table(3, 5, DECODER.width))


def test_fixed_positions_by_hand() -> None:
    """Width 8: i = 0, 1 with the frequencies 1 and 1/100; the column comes first, sines before cosines."""
    table = sine_table(3, 5, 8)
    assert table.shape == (3, 5, 8)
    expected = [torch.tensor(x).mul(f) for x in (4.0, 2.0) for f in (1.0, 0.01)]
    waves = [expected[0].sin(), expected[1].sin(), expected[0].cos(), expected[1].cos()]
    waves += [expected[2].sin(), expected[3].sin(), expected[2].cos(), expected[3].cos()]
    torch.testing.assert_close(table[2, 4], torch.stack(waves), rtol=0, atol=1e-6)


COUNTS = {  # of the authors' models; He et al. 2022, appendix A.1
    "mae_b16": 111_907_840,
    "mae_l16": 329_541_888,
    "mae_h14": 657_074_508,
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_preset_has_the_number_of_parameters_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    configured = compose.configure("train", [f"model={name}"])
    keys = configured["model"]
    with torch.device("meta"):
        model = config.build(keys, channels=3, image_size=(224, 224))
        shape = {"hidden_size": keys["width"], "num_hidden_layers": keys["layers"], "patch_size": keys["patch_size"]}
        shape |= {"num_attention_heads": keys["heads"], "intermediate_size": keys["feedforward"]}
        theirs = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**shape))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == COUNTS[name] == sum(parameter.numel() for parameter in theirs.parameters())


def test_the_order_of_the_visible_patches_changes_nothing() -> None:
    model, kept = randomised(autoencoder()), visible(MaskOptions(share=0.6, normalise=False), noise())
    shuffled = kept[:, torch.randperm(kept.shape[1], generator=generator("order"))]
    assert not torch.equal(shuffled, kept)
    torch.testing.assert_close(model(images(count=3), shuffled), model(images(count=3), kept), **EXACT)


def test_masked_pixels_change_nothing_and_visible_ones_do() -> None:
    model = randomised(autoencoder())
    kept = torch.tensor([[5, 6, 9]])
    pixels = images(count=1)
    other = pixels + 1.0
    for patch in kept[0].tolist():
        row, column = divmod(patch, SIDE // PATCH)
        box = (slice(row * PATCH, (row + 1) * PATCH), slice(column * PATCH, (column + 1) * PATCH))
        other[0, :, *box] = pixels[0, :, *box]
    torch.testing.assert_close(model(other, kept), model(pixels, kept), **EXACT)
    assert (model(pixels + 1.0, kept) - model(pixels, kept)).abs().max() > 0.01


def test_an_image_does_not_depend_on_the_rest_of_the_batch() -> None:
    model, kept = randomised(autoencoder()), visible(MaskOptions(share=0.75, normalise=False), noise())
    whole = model(images(count=3), kept)
    for i in range(3):
        torch.testing.assert_close(model(images(count=3)[i : i + 1], kept[i : i + 1])[0], whole[i], **EXACT)


def test_weights_of_another_grid_are_loaded_with_positions_of_this_grid() -> None:
    small, large = autoencoder().state_dict(), autoencoder(image_size=(SIDE, 2 * SIDE))
    adapted = large.adapt(small)
    large.load_state_dict(adapted)
    assert torch.equal(large.positions.grid, sine_table(4, 8, WIDTH).double())
    assert large.adaptations(small) == ["the fixed positions of 4 x 4 patches become those of 4 x 8"]
    assert large.adaptations(large.state_dict()) == []
    assert all(torch.equal(tensor, small[name]) for name, tensor in adapted.items() if not name.endswith(".grid"))


@pytest.mark.parametrize(
    "keys",
    [{"heads": 5}, {"width": 30}, {"decoder": DecoderOptions(width=18, heads=2, layers=1, feedforward=8)}],
    ids=str,
)
def test_widths_that_do_not_fit_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"^model\.(decoder\.)?width=\d+ must be divisible by model\.(decoder\.)?heads="
    ):
        autoencoder(**keys)


def test_initial_values_are_those_of_the_authors_code() -> None:
    torch.manual_seed(0)
    model = autoencoder(width=96, heads=3)
    weight = model.encoder.blocks[0].attention.in_proj.weight
    bound = (6 / (4 * 96)) ** 0.5
    assert bound * 0.99 < weight.abs().max().item() <= bound, "Xavier's bound of the joint matrix"
    assert model.class_token.std().item() == pytest.approx(0.02, rel=0.3) and not model.pixels.bias.any()
    assert not any(
        table.requires_grad for table in (*model.positions.parameters(), *model.decoder_positions.parameters())
    )
