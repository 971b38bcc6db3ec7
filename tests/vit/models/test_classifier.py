"""The classifier against those of torchvision, timm and transformers in float64, and against published numbers."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import assert_same_gradients, gradients, images, randomised
from scipy import stats
from torch import Tensor, nn
from torchvision.models import vision_transformer as torchvision_vit

from common.config import check as config
from common.config import compose
from common.errors import UserError
from common.files import checkpoint
from common.machine.seeds import generator
from common.nn.attention import record_attention
from common.nn.blocks import Residual
from common.train import assembly, optim
from common.train.optim import OptimizerOptions
from vit.criterion.cross_entropy import LossOptions, cross_entropy
from vit.models.classifier import Classifier, PositionOptions, VitBlockOptions

Tensors = dict[str, Tensor]
EXACT = {"rtol": 0, "atol": 1e-10}  # float64, a few blocks with values of about a hundred
WIDTH, HEADS, LAYERS, HIDDEN, CLASSES, PATCH = 24, 3, 3, 40, 5, 4
BLOCKS = VitBlockOptions(
    dropout=0.0,
    attention_dropout=0.0,
    drop_path=0.0,
    layer_scale=None,
    qk_norm=False,
    norm_eps=1e-6,
    activation="gelu",
)
POSITIONS = PositionOptions(resample="bicubic_antialias", on_token=True)
SMALL: dict[str, Any] = {
    **{"classes": CLASSES, "channels": 3, "image_size": (16, 16), "patch_size": PATCH, "embedding": "convolution"},
    **{"width": WIDTH, "heads": HEADS, "layers": LAYERS, "feedforward": HIDDEN, "pooling": "token", "registers": 0},
    **{"positions": POSITIONS, "representation": None, "blocks": BLOCKS},
}
EVERYTHING: dict[str, Any] = {
    **{"registers": 2, "representation": 9, "image_size": (16, 24)},
    "blocks": replace(BLOCKS, layer_scale=0.3, qk_norm=True, dropout=0.1, attention_dropout=0.1, drop_path=0.2),
}
POOLINGS = ["token", "mean", "mean_then_norm"]


def classifier(**keys: Any) -> Classifier:
    """A small classifier in float64."""
    return Classifier(**{**SMALL, **keys}).double()


def assert_same(
    ours: Classifier,
    theirs: nn.Module,
    renamed: Callable[[Tensors], Tensors],
    pixels: Tensor,
    run: Callable[[Tensor], Tensor] | None = None,
    **tolerance: float,
) -> None:
    """Equal logits, and equal gradients of the pixels and of every parameter.

    `renamed` maps their tensors to ours by slicing and joining only, so it also maps gradients.
    """
    tolerance = tolerance or EXACT
    ours.load_state_dict(renamed(dict(theirs.named_parameters())))
    pixels = pixels.requires_grad_()
    logits, expected = ours.eval()(pixels), (run or theirs)(pixels)
    torch.testing.assert_close(logits, expected, **tolerance)
    pixel_gradient, ours_by_name = gradients(logits, pixels, ours)
    their_pixels, theirs_by_name = gradients(expected, pixels, theirs)
    torch.testing.assert_close(pixel_gradient, their_pixels, **tolerance)
    assert_same_gradients(ours_by_name, renamed(theirs_by_name), **tolerance)


# Parity. Names are mapped here, without the project's importer.


def from_torchvision(theirs: Tensors, grid: tuple[int, int]) -> Tensors:
    table = theirs["encoder.pos_embedding"][0]
    ours = {
        "patches.weight": theirs["conv_proj.weight"],
        "patches.bias": theirs["conv_proj.bias"],
        "class_token": theirs["class_token"].flatten(),
        "positions.token": table[0],
        "positions.grid": table[1:].unflatten(0, grid),
    }
    words = {
        "encoder.layers.encoder_layer_": "encoder.blocks.",
        "ln_1": "residuals.0.norm",
        "ln_2": "residuals.1.norm",
        "self_attention.in_proj_": "attention.in_proj.",
        "self_attention": "attention",
        "mlp.0": "feed_forward.expand",
        "mlp.3": "feed_forward.contract",
        "encoder.ln": "encoder.norm",
        "heads.pre_logits": "representation",
        "heads.head": "head",
    }
    return ours | renamed_by(
        words, {k: v for k, v in theirs.items() if not k.startswith(("conv", "class")) and v.ndim < 3}
    )


def renamed_by(words: dict[str, str], tensors: Tensors) -> Tensors:
    result = {}
    for name, tensor in tensors.items():
        for old, new in words.items():
            name = name.replace(old, new)
        result[name] = tensor
    return result


def from_timm(theirs: Tensors, grid: tuple[int, int]) -> Tensors:
    ours, table = {}, theirs["pos_embed"][0]
    if "cls_token" in theirs:
        ours["class_token"] = theirs["cls_token"].flatten()
        if len(table) > grid[0] * grid[1]:
            ours["positions.token"], table = table[0], table[1:]
    if "reg_token" in theirs:
        ours["registers"] = theirs["reg_token"][0]
    ours["positions.grid"] = table.unflatten(0, grid)
    words = {
        "patch_embed.proj": "patches",
        "blocks.": "encoder.blocks.",
        "norm1": "residuals.0.norm",
        "norm2": "residuals.1.norm",
        "ls1.gamma": "residuals.0.scale",
        "ls2.gamma": "residuals.1.scale",
        "attn.qkv": "attention.in_proj",
        "attn.proj": "attention.out_proj",
        "attn.": "attention.",
        "mlp.fc1": "feed_forward.expand",
        "mlp.fc2": "feed_forward.contract",
        "fc_norm": "pooled_norm",
    }
    rest = {k: v for k, v in theirs.items() if k not in ("cls_token", "reg_token", "pos_embed")}
    return ours | {k if not k.startswith("norm.") else f"encoder.{k}": v for k, v in renamed_by(words, rest).items()}


def from_transformers(theirs: Tensors, grid: tuple[int, int]) -> Tensors:
    table = theirs["vit.embeddings.position_embeddings"][0]
    ours = {
        "class_token": theirs["vit.embeddings.cls_token"].flatten(),
        "positions.token": table[0],
        "positions.grid": table[1:].unflatten(0, grid),
    }
    for i in range(LAYERS):
        for part in ("weight", "bias"):
            attention = f"vit.layers.{i}.attention"
            joined = [theirs[f"{attention}.{which}_proj.{part}"] for which in "qkv"]
            ours[f"encoder.blocks.{i}.attention.in_proj.{part}"] = torch.cat(joined)
    words = {
        "vit.embeddings.patch_embeddings.projection": "patches",
        "vit.layers": "encoder.blocks",
        "attention.o_proj": "attention.out_proj",
        "layernorm_before": "residuals.0.norm",
        "layernorm_after": "residuals.1.norm",
        "mlp.fc1": "feed_forward.expand",
        "mlp.fc2": "feed_forward.contract",
        "vit.layernorm": "encoder.norm",
        "classifier": "head",
    }
    handled = (
        "cls_token",
        "position_embeddings",
        *(f".{which}_proj.{part}" for which in "qkv" for part in ("weight", "bias")),
    )
    return ours | renamed_by(words, {k: v for k, v in theirs.items() if not k.endswith(handled)})


@pytest.mark.parametrize("representation", [None, 9])
@pytest.mark.parametrize("embedding", ["convolution", "multiply"])
def test_logits_and_gradients_are_torchvisions(representation: int | None, embedding: str) -> None:
    theirs = torchvision_vit.VisionTransformer(
        16, PATCH, LAYERS, HEADS, WIDTH, HIDDEN, num_classes=CLASSES, representation_size=representation
    )
    ours = classifier(representation=representation, embedding=embedding)
    assert_same(ours, randomised(theirs.double()), lambda t: from_torchvision(t, (4, 4)), images())


@pytest.mark.slow
def test_logits_and_gradients_are_those_of_torchvisions_vit_b_16() -> None:
    """At its published width, with initial values that give activations of about one, as trained weights do.

    In float64 both agree. In fp32 they multiply by different libraries and round differently, so the fp32 gradients
    are compared with those in float64.
    """
    theirs = torchvision_vit.vit_b_16(image_size=32, num_classes=CLASSES).eval()
    for name, parameter in theirs.named_parameters():
        mean = 1.0 if "ln" in name and name.endswith("weight") else 0.0
        nn.init.normal_(parameter, mean, 0.02, generator=generator(name))
    shape = {"patch_size": 16, "width": 768, "heads": 12, "layers": 12, "feedforward": 3072, "image_size": (32, 32)}
    with torch.device("meta"):
        ours = Classifier(**{**SMALL, **shape})
    renamed = from_torchvision(dict(theirs.named_parameters()), (2, 2))
    ours.load_state_dict({k: v.detach().clone() for k, v in renamed.items()}, assign=True)
    pixels = images(32, 32, dtype=torch.float32)
    exact = copy.deepcopy(ours).double()
    logits, expected, exact_logits = ours.eval()(pixels), theirs(pixels), exact.eval()(pixels.double())
    # fp32 rounds to 1e-7; in between are twelve blocks, with logits of about one and gradients of up to seven.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    rounded = torch.autograd.grad(logits.sum(), list(ours.parameters()))
    exact_gradients = torch.autograd.grad(exact_logits.sum(), list(exact.parameters()))
    for gradient, exact_gradient in zip(rounded, exact_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=0, atol=1e-5)
    assert_same(exact, theirs.double(), lambda t: from_torchvision(t, (2, 2)), pixels.double())


TIMM: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "token": ({}, {}),
    "a class token without a position": (
        {"no_embed_class": True},
        {"positions": replace(POSITIONS, on_token=False)},
    ),
    "mean, then norm": ({"global_pool": "avg", "class_token": False}, {"pooling": "mean_then_norm"}),
    "norm, then mean": ({"global_pool": "avg", "class_token": False, "fc_norm": False}, {"pooling": "mean"}),
    "registers": (
        {"reg_tokens": 3, "no_embed_class": True},
        {"registers": 3, "positions": replace(POSITIONS, on_token=False)},
    ),
    "registers and mean": (
        {"reg_tokens": 2, "no_embed_class": True, "global_pool": "avg", "class_token": False},
        {"registers": 2, "pooling": "mean_then_norm"},
    ),
    "layer scale": ({"init_values": 0.1}, {"blocks": replace(BLOCKS, layer_scale=0.1)}),
    "qk-norm": ({"qk_norm": True}, {"blocks": replace(BLOCKS, qk_norm=True)}),
    "tanh in GELU": ({"act_layer": "gelu_tanh"}, {"blocks": replace(BLOCKS, activation="gelu_tanh")}),
    "grey and not square": ({"in_chans": 1, "img_size": (8, 20)}, {"channels": 1, "image_size": (8, 20)}),
}


@pytest.mark.parametrize("variant", TIMM)
def test_logits_and_gradients_are_timms(variant: str) -> None:
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    their_keys, keys = TIMM[variant]
    shape = {"img_size": 16, "patch_size": PATCH, "embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS}
    theirs = timm_vit.VisionTransformer(**{**shape, "mlp_ratio": HIDDEN / WIDTH, "num_classes": CLASSES, **their_keys})
    ours = classifier(**keys)
    height, width = keys.get("image_size", (16, 16))
    pixels = images(height, width, channels=keys.get("channels", 3))
    grid = (height // PATCH, width // PATCH)
    assert_same(ours, randomised(theirs.double()), lambda t: from_timm(t, grid), pixels)


@pytest.mark.parametrize(("height", "width"), [(24, 24), (8, 32), (12, 20)])
def test_logits_and_gradients_at_other_sizes_are_timms(height: int, width: int) -> None:
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    shape = {"img_size": (16, 24), "patch_size": PATCH, "embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS}
    theirs = timm_vit.VisionTransformer(
        **shape, mlp_ratio=HIDDEN / WIDTH, num_classes=CLASSES, dynamic_img_size=True
    ).double()
    ours = classifier(image_size=(16, 24))
    # timm resamples in fp32 for any type of the model
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    assert_same(ours, randomised(theirs), lambda t: from_timm(t, (4, 6)), images(height, width), **tolerance)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (24, 24), (8, 32)])
def test_logits_and_gradients_are_transformers_at_any_size(height: int, width: int) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "patch_size": PATCH}
    options = transformers.ViTConfig(**shape, intermediate_size=HIDDEN, image_size=16, num_labels=CLASSES)
    theirs = transformers.ViTForImageClassification(options).double()
    assert options.layer_norm_eps == 1e-12
    ours = classifier(
        blocks=replace(BLOCKS, norm_eps=1e-12), positions=PositionOptions(resample="bicubic", on_token=True)
    )

    def run(pixels: Tensor) -> Tensor:
        return theirs(pixels, interpolate_pos_encoding=True).logits

    assert_same(ours, randomised(theirs), lambda t: from_transformers(t, (4, 4)), images(height, width), run)


# The paper's sizes.

COUNTS = {  # google-research/vision_transformer, models_test.py
    "vit_ti16": 5_717_416,
    "vit_s16": 22_050_664,
    "vit_s32": 22_878_952,
    "vit_b8": 86_576_872,
    "vit_b16": 86_567_656,
    "vit_b32": 88_224_232,
    "vit_l16": 304_326_632,
    "vit_l32": 306_535_400,
    "vit_h14": 632_045_800,
    # Not in that file: 384 x 3 x (16^2 - 14^2) weights of patches fewer and 384 x (257 - 197) positions more than S/16.
    "vit_s14": 22_050_664 - 69_120 + 23_040,
}


def parameter_count(*arguments: str) -> int:
    """Number of parameters of a preset with 1,000 classes at 224 pixels, built without allocating them."""
    configured = compose.configure("train", arguments)
    with torch.device("meta"):
        model = config.build(configured["model"], classes=1000, channels=3, image_size=(224, 224))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", COUNTS)
def test_a_preset_has_the_published_number_of_parameters(name: str) -> None:
    assert parameter_count(f"model={name}") == COUNTS[name]


def test_mean_pooling_has_no_parameters_of_a_class_token() -> None:
    assert parameter_count("model=vit_b16", "model.pooling=mean") == 86_566_120


def test_every_preset_is_checked() -> None:
    own = {"vit_photo"}  # its size is not published
    assert {*COUNTS} | own == {name for name in compose.choices_of("model") if name.startswith("vit_")}


# Invariances.


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_batch_is_its_images_one_by_one(pooling: str) -> None:
    model = randomised(classifier(**{**EVERYTHING, "pooling": pooling}))
    pixels = images(16, 24, count=3)
    alone = torch.cat([model(pixels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(pixels), alone, **EXACT)


def shuffled(pixels: Tensor, order: Tensor, grid: tuple[int, int]) -> Tensor:
    """An image with patch order[i] of `pixels` as its patch i."""
    patches = [row.split(PATCH, dim=3) for row in pixels.split(PATCH, dim=2)]
    flat = [patch for row in patches for patch in row]
    moved = [flat[i] for i in order.tolist()]
    return torch.cat([torch.cat(moved[r * grid[1] : (r + 1) * grid[1]], dim=3) for r in range(grid[0])], dim=2)


@pytest.mark.parametrize("embedding", ["convolution", "multiply"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_without_positions_the_order_of_patches_is_the_order_of_outputs(pooling: str, embedding: str) -> None:
    model = randomised(classifier(**{**EVERYTHING, "pooling": pooling, "embedding": embedding}))
    pixels, order = images(16, 24), torch.randperm(24, generator=generator("order"))
    shuffled_pixels, before = shuffled(pixels, order, (4, 6)), model.before_patches
    assert not torch.allclose(model(shuffled_pixels), model(pixels), atol=1e-3), "positions distinguish patches"

    model.positions.grid.data.zero_()
    tokens, moved = (model.encoder(model.embed(x)) for x in (pixels, shuffled_pixels))
    torch.testing.assert_close(moved[:, before:], tokens[:, before:][:, order], **EXACT)
    torch.testing.assert_close(moved[:, :before], tokens[:, :before], **EXACT)
    torch.testing.assert_close(model(shuffled_pixels), model(pixels), **EXACT)


def test_the_same_patch_at_another_row_or_column_changes_the_logits() -> None:
    """One bright patch in a black image; only its position changes."""
    model = randomised(classifier())
    results = []
    for row, column in ((0, 1), (1, 0), (2, 3), (3, 2)):
        pixels = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
        pixels[..., row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] = 1
        results.append(model(pixels))
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(results) for b in results[:i])


@pytest.mark.parametrize(
    "resampling", ["bicubic_antialias", "bilinear_antialias", "bicubic", "bicubic_corners", "bilinear_corners"]
)
@pytest.mark.parametrize(("height", "width"), [(24, 24), (12, 32), (4, 4), (36, 16)])
def test_another_image_size_gives_the_logits_of_a_model_built_for_it(resampling: Any, height: int, width: int) -> None:
    """(36, 16) has as many patches as the trained (24, 24), in another grid."""
    positions = PositionOptions(resample=resampling, on_token=True)
    trained = randomised(classifier(positions=positions, image_size=(24, 24)))
    resized = classifier(positions=positions, image_size=(height, width)).eval()
    resized.load_state_dict(resized.adapt(trained.state_dict()))
    pixels = images(height, width)
    assert resized.positions.grid.shape == (height // 4, width // 4, WIDTH)
    torch.testing.assert_close(trained(pixels), resized(pixels), **EXACT)
    if (height, width) == (36, 16):
        reshaped = {**trained.state_dict(), "positions.grid": trained.positions.grid.reshape(9, 4, WIDTH)}
        resized.load_state_dict(reshaped)
        assert not torch.allclose(trained(pixels), resized(pixels), atol=1e-3), "a reshaped table is not resampled"


def test_a_checkpoint_with_the_same_grid_is_not_changed() -> None:
    model = classifier()
    tensors = dict(randomised(classifier(), 1).state_dict())
    adapted = model.adapt(tensors)
    assert all(adapted[name] is tensors[name] for name in tensors)
    assert model.adapt({"conv1.weight": torch.zeros(3)}).keys() == {"conv1.weight"}, "a file of another model"


@pytest.mark.parametrize(("height", "width"), [(18, 16), (16, 18), (3, 4)])
def test_a_size_that_patches_do_not_fill_is_refused_at_construction_and_in_forward(height: int, width: int) -> None:
    sentence = f"Images of {height} x {width} pixels cannot be split into patches of 4 x 4"
    with pytest.raises(UserError, match=sentence):
        classifier(image_size=(height, width))
    with pytest.raises(UserError, match=sentence):
        classifier()(images(height, width))


# Checkpoints.


class FixedClasses:
    """The members of a task that loading initial weights uses."""

    def __init__(self, classes: list[str]):
        self.classes = classes

    def state(self) -> dict[str, Any]:
        return {"classes": self.classes}


def saved(model: Classifier, path: Path, classes: list[str]) -> Path:
    content = {"model": model.state_dict(), "average": None, "task": {"classes": classes}, "config": {}, "step": 3}
    checkpoint.save(path, content)
    return path


def test_a_run_can_start_from_weights_of_another_resolution(tmp_path: Path) -> None:
    file, classes = tmp_path / "a.pt", list("abcde")
    trained = randomised(classifier())
    fresh = classifier(image_size=(24, 12))
    message = assembly.load_initial_weights(fresh, FixedClasses(classes), saved(trained, file, classes))
    weights_line, note = message.split("\n")
    assert weights_line == f"weights   {file}: {len(trained.state_dict())} tensors", (
        "nothing is re-initialised or unused"
    )
    assert "4 x 4 patches are resampled to 6 x 3" in note
    pixels = images(24, 12)
    torch.testing.assert_close(fresh.eval()(pixels), trained(pixels), **EXACT)


def test_for_other_classes_the_head_is_re_initialised_and_the_rest_resampled(tmp_path: Path) -> None:
    file = saved(randomised(classifier()), tmp_path / "a.pt", list("abcde"))
    fresh = classifier(image_size=(24, 12))
    message = assembly.load_initial_weights(fresh, FixedClasses(list("vwxyz")), file)
    assert message.partition("\n")[0].endswith("re-initialised: head.weight, head.bias")
    assert not fresh.head.weight.any() and fresh.positions.grid.any() and fresh.class_token.any()


def test_evaluation_at_another_size_gives_the_logits_of_the_trained_model(tmp_path: Path) -> None:
    configured = compose.configure("train", ["model=vit", "data.image_size=[12,8]", "trainer.device=cpu"])
    trained = config.build(configured["model"], classes=10, channels=1, image_size=(8, 8))
    file = saved(randomised(trained), tmp_path / "a.pt", list("0123456789"))
    parts = assembly.restore({**configured, "checkpoint": str(file), "weights": "auto"})
    pixels = images(12, 8, channels=1, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(parts.model(pixels), trained(pixels))
    with pytest.raises(UserError, match=r"class_token \(64 in the file, missing in the model\)"):
        changed = {**configured, "model": {**configured["model"], "pooling": "mean"}}
        assembly.restore({**changed, "checkpoint": str(file), "weights": "auto"})


NAMES = {
    "patches.weight": (24, 3, 4, 4),
    "patches.bias": (24,),
    "class_token": (24,),
    "registers": (2, 24),
    "positions.grid": (4, 6, 24),
    "positions.token": (24,),
    "encoder.norm.weight": (24,),
    "encoder.norm.bias": (24,),
    "representation.weight": (9, 24),
    "representation.bias": (9,),
    "head.weight": (5, 9),
    "head.bias": (5,),
}
BLOCK_NAMES = {
    "attention.in_proj.weight": (72, 24),
    "attention.in_proj.bias": (72,),
    "attention.out_proj.weight": (24, 24),
    "attention.out_proj.bias": (24,),
    **{f"attention.{which}_norm.{part}": (8,) for which in "qk" for part in ("weight", "bias")},
    "feed_forward.expand.weight": (40, 24),
    "feed_forward.expand.bias": (40,),
    "feed_forward.contract.weight": (24, 40),
    "feed_forward.contract.bias": (24,),
    **{f"residuals.{i}.norm.{part}": (24,) for i in range(2) for part in ("weight", "bias")},
    **{f"residuals.{i}.scale": (24,) for i in range(2)},
}


def test_the_names_in_a_checkpoint_are_fixed() -> None:
    """Users' checkpoints and the import of other layouts depend on them."""
    blocks = {f"encoder.blocks.{i}.{name}": shape for i in range(LAYERS) for name, shape in BLOCK_NAMES.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in classifier(**EVERYTHING).state_dict().items()}
    assert shapes == NAMES | blocks
    plain = {*classifier().state_dict()}
    extra = {name for name in blocks if "scale" in name or "q_norm" in name or "k_norm" in name}
    assert plain == ({*NAMES} | {*blocks}) - extra - {"registers", "representation.weight", "representation.bias"}
    assert plain - {*classifier(pooling="mean").state_dict()} == {"class_token", "positions.token"}
    moved = {*classifier(pooling="mean_then_norm").state_dict()} ^ {*classifier(pooling="mean").state_dict()}
    assert moved == {f"{where}.{part}" for where in ("encoder.norm", "pooled_norm") for part in ("weight", "bias")}
    without = classifier(positions=replace(POSITIONS, on_token=False)).state_dict()
    assert plain - {*without} == {"positions.token"}


# Parts.


def test_features_are_the_input_of_the_representation() -> None:
    model = randomised(classifier(**EVERYTHING))
    pixels = images(16, 24)
    features = model.features(pixels)
    assert features.shape == (2, WIDTH)
    hidden = torch.tanh(features @ model.representation.weight.T + model.representation.bias)
    torch.testing.assert_close(model(pixels), hidden @ model.head.weight.T + model.head.bias, **EXACT)


def test_each_pooling_is_its_formula() -> None:
    pixels = images(16, 24)
    for pooling in POOLINGS:
        model = randomised(classifier(**{**EVERYTHING, "pooling": pooling}))
        sums = model.embed(pixels)
        for block in model.encoder.blocks:
            sums = block(sums)
        norm = model.pooled_norm if pooling == "mean_then_norm" else model.encoder.norm
        assert isinstance(norm, nn.LayerNorm)
        if pooling == "token":
            expected = norm(sums)[:, 0]
        elif pooling == "mean":
            expected = norm(sums)[:, 2:].sum(dim=1) / 24
        else:
            expected = norm(sums[:, 2:].sum(dim=1) / 24)
        torch.testing.assert_close(model.features(pixels), expected, **EXACT)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("registers", [0, 2])
def test_tokens_are_class_token_registers_and_patches_and_registers_have_no_position(
    pooling: str, registers: int
) -> None:
    model = randomised(classifier(pooling=pooling, registers=registers))
    tokens = model.embed(images())
    before = [] if pooling != "token" else [model.class_token + model.positions.token]
    before += [] if not registers else [*model.registers]
    assert model.before_patches == len(before) and tokens.shape == (2, len(before) + 16, WIDTH)
    for number, token in enumerate(before):
        assert torch.equal(tokens[:, number], token.expand(2, -1))
    patches = model.patches(images()) + model.positions.grid.flatten(0, 1)
    assert torch.equal(tokens[:, len(before) :], patches)


def test_dropout_of_the_embeddings_acts_in_training_only() -> None:
    model = randomised(classifier(blocks=replace(BLOCKS, dropout=1.0)))
    assert model.embed(images()).any()
    assert not model.train().embed(images()).any()


def test_every_option_of_the_blocks_reaches_them() -> None:
    options = VitBlockOptions(
        **{"dropout": 0.1, "attention_dropout": 0.2, "drop_path": 0.4, "layer_scale": 0.3, "qk_norm": True},
        **{"norm_eps": 0.01, "activation": "gelu_tanh"},
    )
    model = classifier(blocks=options, layers=3, pooling="mean_then_norm")
    assert [block.residuals[0].drop_path for block in model.encoder.blocks] == [0.0, 0.2, 0.4]
    block = model.encoder.blocks[1]
    assert (block.residuals[0].dropout.p, block.feed_forward.dropout.p, model.dropout.p) == (0.1, 0.1, 0.1)
    assert block.attention.dropout == 0.2 and block.attention.heads == HEADS
    assert {part.eps for part in model.modules() if isinstance(part, nn.LayerNorm)} == {0.01}
    assert block.feed_forward.activation.approximate == "tanh"
    assert classifier().encoder.blocks[0].feed_forward.activation.approximate == "none"


def test_attention_is_recorded_under_the_names_of_the_blocks() -> None:
    model = randomised(classifier(registers=2))
    with record_attention(model) as maps:
        model(images())
    assert {*maps} == {f"encoder.blocks.{i}.attention" for i in range(LAYERS)}
    for (attention,) in maps.values():
        assert attention.shape == (2, HEADS, 19, 19)
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(2, HEADS, 19, dtype=torch.float64))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UserError, match=r"^model\.width=24 must be divisible by model\.heads=5\.$"):
        classifier(heads=5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_all_options_together_train_in_bf16(pooling: str) -> None:
    """QK-norm, layer scale, drop path and registers under autocast: all gradients are finite."""
    torch.manual_seed(0)
    model = Classifier(**{**SMALL, **EVERYTHING, "pooling": pooling}).train()
    nn.init.normal_(model.head.weight)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images(16, 24, count=32, dtype=torch.float32))
    logits.float().square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


# Initial values.


def fresh(**keys: Any) -> Classifier:
    """A classifier with the shapes of ViT-S's blocks, so that standard deviations are estimated to a percent."""
    torch.manual_seed(0)
    shape = {"width": 384, "heads": 6, "feedforward": 1536, "layers": 2, "patch_size": 8, "image_size": (64, 64)}
    return Classifier(**{**SMALL, **shape, **keys})


def matrices(model: Classifier) -> Iterator[tuple[str, Tensor]]:
    """Each matrix of the blocks, with the three of in_proj separate."""
    for name, parameter in model.encoder.named_parameters():
        if name.endswith("in_proj.weight"):
            yield from ((f"{name}[{which}]", part) for which, part in zip("qkv", parameter.chunk(3), strict=True))
        elif parameter.ndim == 2:
            yield name, parameter


def test_each_matrix_of_the_blocks_starts_within_its_own_bound_of_xavier() -> None:
    """The bound of q, k and v is that of a (C, C) matrix; that of the joint matrix is smaller by sqrt(2)."""
    by_name = dict(matrices(fresh()))
    assert len(by_name) == 2 * 6
    for name, matrix in by_name.items():
        bound = math.sqrt(6 / sum(matrix.shape))
        assert matrix.abs().max().item() == pytest.approx(bound, rel=1e-3), name
        values = matrix.detach().flatten().double()
        assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01), name
        uniform = stats.uniform(-bound, 2 * bound)
        assert stats.kstest(values[:: len(values) // 2000].numpy(), uniform.cdf).pvalue > 1e-3, name


def test_biases_and_norms_start_as_in_the_authors_code() -> None:
    model = fresh(blocks=replace(BLOCKS, qk_norm=True))
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif "feed_forward" in name and name.endswith("bias"):
            # Estimated to 4 percent from 384 values.
            assert parameter.std().item() == pytest.approx(1e-6, rel=0.15), name
            assert parameter.abs().max() < 6e-6, name
        elif name.endswith("bias"):
            assert not parameter.any(), name


def test_tables_and_tokens_start_as_in_the_authors_code() -> None:
    model = fresh(registers=4)
    assert not model.class_token.any()
    for table, count in ((model.positions.grid, 24576), (model.positions.token, 384), (model.registers, 1536)):
        assert table.numel() == count
        spread = 4 / math.sqrt(2 * count)  # four standard errors of the estimate
        assert table.std().item() == pytest.approx(0.02, rel=spread)
        assert abs(table.mean().item()) < 4 * 0.02 / math.sqrt(count)


def test_the_representation_starts_with_flax_default_values() -> None:
    """LeCun normal truncated at two standard deviations, and zero bias, which the authors' code does not change."""
    layer = fresh(representation=512).representation
    assert not layer.bias.any()
    values = layer.weight.detach().flatten().double()
    assert values.std().item() == pytest.approx(1 / math.sqrt(384), rel=0.01)
    bound = 2 / math.sqrt(384) / stats.truncnorm(-2, 2).std()
    assert values.abs().max().item() == pytest.approx(bound, rel=1e-3)


@pytest.mark.parametrize("keys", [{}, {"representation": 64}, {"pooling": "mean"}], ids=["plain", "hidden", "mean"])
def test_the_first_loss_is_the_logarithm_of_the_number_of_classes(keys: dict[str, Any]) -> None:
    model = fresh(classes=37, **keys)
    logits = model(images(64, 64, count=4, dtype=torch.float32))
    assert torch.equal(logits, torch.zeros(4, 37))
    for smoothing in (0.0, 0.1):
        loss = cross_entropy(LossOptions(smoothing=smoothing), logits, torch.tensor([0, 36, 5, 5]))
        assert loss.item() == pytest.approx(4 * math.log(37), rel=1e-6)


def test_layer_scale_starts_with_its_configured_value() -> None:
    model = fresh(blocks=replace(BLOCKS, layer_scale=1e-5))
    residuals = [part for part in model.modules() if isinstance(part, Residual)]
    assert len(residuals) == 4 and all(torch.equal(r.scale, torch.full((384,), 1e-5)) for r in residuals)


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second = fresh(registers=2).state_dict(), fresh(registers=2).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


# Rates and decay.

OPTIMIZER = OptimizerOptions(
    **{"name": "adamw", "lr": 1.0, "weight_decay": 0.3, "decay_norms": False, "betas": (0.9, 0.999), "eps": 1e-8},
    **{"momentum": 0.9, "rates": {}, "layer_decay": 0.5, "reference_batch": None, "scaling": "linear"},
)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_rates_decay_from_the_head_to_the_patches(pooling: str) -> None:
    """As in BEiT: 1 for the head and the norm before it, 1/2 for the last of twelve blocks, 2^-13 for embeddings."""
    model = classifier(**{**EVERYTHING, "pooling": pooling, "layers": 12})
    rates = {name: g["base_lr"] for g in optim.build(model, OPTIMIZER).param_groups for name in g["param_names"]}
    assert {*rates} == {name for name, _ in model.named_parameters()}
    for name, rate in rates.items():
        words = name.split(".")
        depth = 13 if words[0] in ("patches", "class_token", "registers", "positions") else 0
        expected = 0.5 ** (12 - int(words[2]) if words[1:2] == ["blocks"] else depth)
        assert rate == expected, name


@pytest.mark.parametrize("pooling", POOLINGS)
def test_only_matrices_decay(pooling: str) -> None:
    model = classifier(**{**EVERYTHING, "pooling": pooling})
    groups = optim.build(model, replace(OPTIMIZER, layer_decay=1.0)).param_groups
    decayed = {name for g in groups for name in g["param_names"] if g["weight_decay"]}
    parts = ("attention.in_proj", "attention.out_proj", "feed_forward.expand", "feed_forward.contract")
    expected = {f"encoder.blocks.{i}.{part}.weight" for i in range(LAYERS) for part in parts}
    assert decayed == expected | {"patches.weight", "representation.weight", "head.weight"}


def test_activations_are_exact_gelu_and_its_approximation() -> None:
    """x Phi(x), and its approximation by tanh (Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2)."""
    x = torch.linspace(-4, 4, 81, dtype=torch.float64)
    exact = x * torch.from_numpy(stats.norm.cdf(x.numpy()))
    by_tanh = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    for name, expected in (("gelu", exact), ("gelu_tanh", by_tanh)):
        activation = classifier(blocks=replace(BLOCKS, activation=name)).encoder.blocks[0].feed_forward.activation
        torch.testing.assert_close(activation(x), expected, rtol=0, atol=1e-12)
    assert F.gelu(x).sub(by_tanh).abs().max() > 1e-4, "the two formulas differ"


# What a user is told of the length of the input.


@pytest.mark.parametrize(
    ("image_size", "patch_size", "registers", "line", "warns"),
    [
        ((224, 224), 16, 0, "197 tokens an image: 14 x 14 patches of 16 x 16 pixels", False),
        ((224, 224), 2, 0, "12,545 tokens an image: 112 x 112 patches of 2 x 2 pixels", True),
        ((46, 89), 1, 1, "4,096 tokens an image: 46 x 89 patches of 1 x 1 pixels", True),
        ((23, 89), 1, 0, "2,048 tokens an image: 23 x 89 patches of 1 x 1 pixels", False),
    ],
)
def test_the_tokens_of_an_image_are_counted_and_too_many_give_a_warning(
    image_size: tuple[int, int], patch_size: int, registers: int, line: str, warns: bool
) -> None:
    """Rows times columns, the class token and the registers; 2,048 is the largest number without a warning."""
    model = classifier(image_size=image_size, patch_size=patch_size, registers=registers)
    assert list(model.input_summary()) == [line]
    assert bool(model.input_advice()) == warns
    assert all("model.patch_size" in text and "data.image_size" in text for text in model.input_advice())
