"""TNT against timm's in float64, and the invariances of words and tokens."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from parity import assert_same_gradients, gradients, images, randomised
from torch import Tensor, nn

from common.config import check as config
from common.config import compose
from common.errors import UserError
from common.machine.seeds import generator
from common.nn.attention import record_attention
from common.train import optim
from common.train.optim import OptimizerOptions
from vit.models.classifier import PositionOptions, VitBlockOptions
from vit.models.tnt import InnerOptions, Tnt

Tensors = dict[str, Tensor]
EXACT = {"rtol": 0, "atol": 1e-10}  # float64, a few blocks with values of about ten
WIDTH, HEADS, LAYERS, HIDDEN, CLASSES, PATCH = 24, 3, 3, 96, 5, 8
SIZE = (16, 24)
INNER = InnerOptions(width=12, heads=4, feedforward=48)
BLOCKS = VitBlockOptions(
    dropout=0.0,
    attention_dropout=0.0,
    drop_path=0.0,
    layer_scale=None,
    qk_norm=False,
    norm_eps=1e-5,
    activation="gelu",
)
SMALL: dict[str, Any] = {
    **{"classes": CLASSES, "channels": 3, "image_size": (16, 24), "patch_size": PATCH, "word_stride": 4},
    **{"width": WIDTH, "heads": HEADS, "layers": LAYERS, "feedforward": HIDDEN, "inner": INNER, "pooling": "token"},
    **{"positions": PositionOptions(resample="bicubic_antialias", on_token=True), "blocks": BLOCKS},
}
COUNTS = {"tnt_s": 23_768_584, "tnt_b": 65_428_680}  # of timm 1.0.31


def tnt(**keys: Any) -> Tnt:
    """A small TNT in float64."""
    return Tnt(**{**SMALL, **keys}).double()


def timm_tnt(**keys: Any) -> Any:
    module = pytest.importorskip("timm.models.tnt")
    shape = {"img_size": (16, 24), "patch_size": PATCH, "embed_dim": WIDTH, "inner_dim": 12, "depth": LAYERS}
    shape |= {"num_heads_inner": 4, "num_heads_outer": HEADS, "num_classes": CLASSES}
    return randomised(module.TNT(**{**shape, **keys}).double())


def from_timm(theirs: Tensors, grid: tuple[int, int]) -> Tensors:
    """timm's tensors under our names; written without the project's importer, by slicing and joining only."""
    ours = {
        "class_token": theirs["cls_token"].flatten(),
        "positions.token": theirs["patch_pos"][0, 0],
        "positions.grid": theirs["patch_pos"][0, 1:].unflatten(0, grid),
        "word_positions": theirs["pixel_pos"][0].flatten(1).T,
    }
    words = {
        "pixel_embed.proj": "patches.convolution",
        "norm1_proj": "word_norm",
        "norm2_proj": "norm",
        "attn_in.proj": "attention.out_proj",
        "attn_out.proj": "attention.out_proj",
        "norm_mlp_in": "residuals.1.norm",
        "norm_in": "residuals.0.norm",
        "norm_mlp": "residuals.1.norm",
        "norm_out": "residuals.0.norm",
        "mlp_in.fc1": "feed_forward.expand",
        "mlp_in.fc2": "feed_forward.contract",
        "mlp.fc1": "feed_forward.expand",
        "mlp.fc2": "feed_forward.contract",
    }
    for name, tensor in theirs.items():
        if name in ("cls_token", "patch_pos", "pixel_pos") or name.endswith((".qk.weight", ".v.weight")):
            continue
        new = name
        for old, word in words.items():
            new = new.replace(old, word)
        if name.startswith("blocks."):
            number, part = name.split(".")[1:3]
            stack = f"inner.blocks.{number}" if part.endswith("_in") else f"encoder.blocks.{number}"
            is_update = part in ("norm1_proj", "proj", "norm2_proj")
            stack = f"updates.{number}" if is_update else stack
            rest = new.split(".", 2)[2]
            new = f"{stack}.{rest.replace('proj.', 'projection.') if is_update else rest}"
        elif name.startswith("norm."):
            new = f"encoder.{name}"
        elif name.startswith(("norm1_proj", "proj", "norm2_proj")):
            new = f"embedding.{new.replace('proj.', 'projection.')}"
        ours[new] = tensor
    for name in [name for name in theirs if name.endswith(".qk.weight")]:
        number, part = name.split(".")[1:3]
        stack = {"attn_in": "inner", "attn_out": "encoder"}[part]
        joined = torch.cat([theirs[name], theirs[name.replace(".qk.", ".v.")]])
        ours[f"{stack}.blocks.{number}.attention.in_proj.weight"] = joined
    return ours


TIMM: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "token": ({}, {}),
    "words that strides do not fill": ({"first_stride": 3}, {"word_stride": 3}),
    "grey, in small patches": (
        {"in_chans": 1, "patch_size": 4, "first_stride": 1},
        {"channels": 1, "patch_size": 4, "word_stride": 1},
    ),
}


@pytest.mark.parametrize("variant", TIMM)
def test_logits_and_gradients_are_timms(variant: str) -> None:
    their_keys, keys = TIMM[variant]
    theirs, ours = timm_tnt(**their_keys), tnt(**keys)
    grid = ours.patches.grid(16, 24)
    ours.load_state_dict(from_timm(dict(theirs.named_parameters()), grid))
    results = []
    for model in (ours.eval(), theirs):
        pixels = images(*SIZE, channels=keys.get("channels", 3)).requires_grad_()
        logits = model(pixels)
        results.append((logits, *gradients(logits, pixels, model)))
    (logits, of_pixels, by_name), (expected, of_their_pixels, theirs_by_name) = results
    torch.testing.assert_close(logits, expected, **EXACT)
    torch.testing.assert_close(of_pixels, of_their_pixels, **EXACT)
    assert_same_gradients(by_name, from_timm(theirs_by_name, grid), **EXACT)


@pytest.mark.slow
def test_logits_in_fp32_are_those_of_timms_tnt_s() -> None:
    """With initial values that give activations of about one; fp32 rounds to 1e-7, in twelve layers."""
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("tnt_s_patch16_224", img_size=64).eval()
    for name, parameter in theirs.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        nn.init.normal_(parameter, mean, 0.05, generator=generator(name))
    section = compose.configure("train", ["model=tnt_s"])["model"]
    ours = config.build(section, classes=1000, channels=3, image_size=(64, 64)).eval()
    ours.load_state_dict(from_timm(dict(theirs.named_parameters()), (4, 4)))
    pixels = images(64, 64).float()
    with torch.no_grad():
        logits, expected = ours(pixels), theirs(pixels)
    assert expected.std() > 0.3
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", COUNTS)
def test_a_preset_has_the_published_number_of_parameters(name: str) -> None:
    section = compose.configure("train", [f"model={name}"])["model"]
    with torch.device("meta"):
        model = config.build(section, classes=1000, channels=3, image_size=(224, 224))
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name]


def test_every_preset_is_checked() -> None:
    assert {*COUNTS} == {name for name in compose.choices_of("model") if name.startswith("tnt_")}


# Invariances.


def test_words_see_nothing_outside_their_patch() -> None:
    """The words of patch 2 of 6, after all inner blocks, as a function of the other patches' pixels."""
    model, pixels = randomised(tnt()), images(*SIZE)
    changed = torch.randn_like(pixels)
    changed[:, :, :8, 16:] = pixels[:, :, :8, 16:]  # the last patch of the first row

    def words_of(pixels: Tensor) -> Tensor:
        words, _ = model.embed(pixels)
        return model.inner(words).unflatten(0, (2, 6))

    words, others = words_of(pixels), words_of(changed)
    assert torch.equal(words[:, 2], others[:, 2])
    assert (words - others).abs().amax((0, 2, 3)).gt(1e-3).sum() == 5, "the other patches have changed"
    leaf = pixels.requires_grad_()
    (gradient,) = torch.autograd.grad(words_of(leaf)[:, 2].sum(), leaf)
    assert gradient[:, :, :8, 16:].any() and not gradient[:, :, 8:].any() and not gradient[:, :, :, :16].any()


def test_each_word_sees_all_words_of_its_patch_and_the_class_token_none_directly() -> None:
    model = randomised(tnt())
    with record_attention(model) as maps:
        model(images(*SIZE))
    assert {*maps} == {f"{stack}.blocks.{i}.attention" for stack in ("inner", "encoder") for i in range(LAYERS)}
    assert maps["inner.blocks.1.attention"][0].shape == (2 * 6, 4, 4, 4)
    assert maps["encoder.blocks.1.attention"][0].shape == (2, HEADS, 7, 7)
    assert (maps["inner.blocks.1.attention"][0] > 0).all()
    words, _ = model.embed(images(*SIZE))
    update = model.updates[0](model.inner.blocks[0](words), 2)
    assert update.shape == (2, 6, WIDTH)
    features = model.features(images(*SIZE))
    for block in model.encoder.blocks:  # without the update of a layer, only the patches' tokens change
        block.attention.out_proj.weight.data.zero_()
    token = model.features(images(*SIZE))
    model.updates[0].norm.bias.data.add_(1.0)
    torch.testing.assert_close(model.features(images(*SIZE)), token, **EXACT)
    assert not torch.allclose(features, token)


def test_without_positions_the_order_of_patches_is_the_order_of_outputs() -> None:
    model, pixels = randomised(tnt(pooling="mean")), images(*SIZE)
    rows = [row.split(PATCH, 3) for row in pixels.split(PATCH, 2)]
    moved = torch.cat([torch.cat([rows[1][2], rows[0][0], rows[1][0]], 3),
                       torch.cat([rows[0][2], rows[1][1], rows[0][1]], 3)], 2)  # fmt: skip
    assert not torch.allclose(model(moved), model(pixels), atol=1e-3), "positions distinguish patches"
    model.positions.grid.data.zero_()
    torch.testing.assert_close(model(moved), model(pixels), **EXACT)


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_a_batch_is_its_images_one_by_one(pooling: str) -> None:
    model, pixels = randomised(tnt(pooling=pooling)), images(*SIZE, count=3)
    alone = torch.cat([model(pixels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(pixels), alone, **EXACT)


@pytest.mark.parametrize(("height", "width"), [(24, 16), (8, 8), (32, 40)])
def test_another_image_size_gives_the_logits_of_a_model_built_for_it(height: int, width: int) -> None:
    """(24, 16) has as many patches as the trained (16, 24), in another grid; positions of words never change."""
    trained, resized = randomised(tnt()), tnt(image_size=(height, width)).eval()
    tensors = trained.state_dict()
    assert "2 x 3 patches are resampled to" in resized.adaptations(tensors)[0]
    resized.load_state_dict(resized.adapt(tensors))
    torch.testing.assert_close(trained(images(height, width)), resized(images(height, width)), **EXACT)


def test_drop_path_skips_inner_sub_layers_patch_by_patch_and_outer_ones_image_by_image() -> None:
    model = tnt(blocks=replace(BLOCKS, drop_path=0.5)).train()
    for stack in (model.inner, model.encoder):
        assert [block.residuals[1].drop_path for block in stack.blocks] == [0.0, 0.25, 0.5]
    torch.manual_seed(0)
    words = torch.ones(40, 4, 12, dtype=torch.float64)
    skipped = (model.inner.blocks[2].residuals[0](words, torch.ones_like) == words).all((1, 2))
    assert 8 < skipped.sum() < 32, "of 40 patches about a half"


# Parts.


def test_initial_values_are_the_authors() -> None:
    """trunc_normal(0.02) for linear maps and tables, and zero biases; 0.02 is estimated from ten thousand values."""
    torch.manual_seed(0)
    model = tnt(width=96, classes=100)
    for tensor in (
        model.head.weight,
        model.encoder.blocks[0].attention.in_proj.weight,
        model.updates[0].projection.weight,
    ):
        assert tensor.std().item() == pytest.approx(0.02, rel=0.1)
    tables = torch.cat([model.positions.grid.flatten(), model.class_token, model.word_positions.flatten()])
    assert tables.std().item() == pytest.approx(0.02, rel=0.2)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias") and "convolution" not in name]
    assert not any(bias.any() for bias in biases)


def test_queries_keys_and_values_have_no_bias_and_only_the_embedding_of_tokens_has_one() -> None:
    names = {*tnt().state_dict()}
    assert not any("in_proj.bias" in name for name in names)
    assert {"embedding.projection.bias", "encoder.blocks.0.attention.out_proj.bias"} <= names
    assert "updates.0.projection.bias" not in names and "updates.0.projection.weight" in names
    assert names - {*tnt(pooling="mean").state_dict()} == {"class_token", "positions.token"}


def test_every_parameter_is_in_one_layer_and_tables_do_not_decay() -> None:
    model = tnt()
    section = compose.configure("train", ["model=tnt", "optimizer.layer_decay=0.5"])["optimizer"]
    groups = optim.build(model, config.construct(OptimizerOptions, section)).param_groups
    depth = {name: round(-torch.log2(torch.tensor(g["lr"] / section["lr"])).item()) for g in groups
             for name in g["param_names"]}  # fmt: skip
    expected = {"encoder.norm.weight": 0, "head.bias": 0, "inner.blocks.2.attention.in_proj.weight": 1}
    expected |= {"updates.0.norm.bias": 3, "encoder.blocks.0.feed_forward.expand.bias": 3}
    expected |= {"word_positions": 4, "patches.convolution.weight": 4, "embedding.norm.bias": 4, "positions.grid": 4}
    assert {name: depth[name] for name in expected} == expected and len(depth) == len([*model.parameters()])
    undecayed = {name for g in groups if not g["weight_decay"] for name in g["param_names"]}
    matrices = {name for name, p in model.named_parameters() if p.ndim > 1}
    assert undecayed & matrices == {"positions.grid", "word_positions"}


def test_widths_that_heads_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match=r"^model\.width=24 must be divisible by model\.heads=5\.$"):
        tnt(heads=5)
    with pytest.raises(UserError, match=r"^model\.inner\.width=12 must be divisible by model\.inner\.heads=5\.$"):
        tnt(inner=replace(INNER, heads=5))
    with pytest.raises(UserError, match="cannot be split into patches of 8 x 8"):
        tnt(image_size=(16, 20))


def test_the_tokens_and_words_of_an_image_are_counted_and_too_many_give_a_warning() -> None:
    model = tnt(word_stride=3)
    assert model.words == (3, 3) and model.input_summary() == [
        "7 tokens an image: 2 x 3 patches of 8 x 8 pixels with 3 x 3 words each"
    ]
    assert model.input_advice() == []
    (advice,) = tnt(image_size=(320, 640), patch_size=8, inner=INNER).input_advice()
    assert "3,201 tokens" in advice and "model.patch_size" in advice


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_all_options_together_train_in_bf16(pooling: str) -> None:
    torch.manual_seed(0)
    options = replace(BLOCKS, layer_scale=0.3, qk_norm=True, dropout=0.1, attention_dropout=0.1, drop_path=0.2)
    model = Tnt(**{**SMALL, "pooling": pooling, "blocks": options}).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images(*SIZE, count=16).float())
    assert logits.dtype == torch.float32
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
