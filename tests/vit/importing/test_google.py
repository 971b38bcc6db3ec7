"""Google's .npz files, written here by the documented layout, give the same logits here as by timm's loader."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError
from common.files import checkpoint
from common.machine.seeds import generator
from vit.importing import google
from vit.importing.adopt import adopt
from vit.models.classifier import Classifier, PositionOptions, VitBlockOptions

WIDTH, LAYERS, HEADS, SIDE, PATCH, CLASSES = 48, 2, 3, 32, 8, 7
ROWS = (SIDE // PATCH) ** 2
Tree = dict[str, np.ndarray]


def build_model(**changed: Any) -> Classifier:
    """A small ViT with all parameters sampled."""
    positions = PositionOptions(resample="bicubic_antialias", on_token=changed.pop("on_token", True))
    options = {"dropout": 0.0, "attention_dropout": 0.0, "drop_path": 0.0, "layer_scale": None, "qk_norm": False}
    blocks = VitBlockOptions(**options, norm_eps=1e-6, activation="gelu_tanh")
    shape = {"width": WIDTH, "layers": LAYERS, "heads": HEADS, "feedforward": 4 * WIDTH, "patch_size": PATCH}
    rest = {"pooling": "token", "registers": 0, "representation": None, "embedding": "convolution"}
    data = {"classes": CLASSES, "channels": 3, "image_size": (SIDE, SIDE)}
    model = Classifier(**{**data, **shape, **rest, **changed}, positions=positions, blocks=blocks).eval()
    random = generator("google")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim in (2, 4):
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5, generator=random)
            else:
                parameter.normal_(mean=0.5, std=0.3, generator=random)
    return model


def flax_tree(model: Classifier, *, jax: bool) -> Tree:
    """The arrays of a Flax model: patches (p, p, channels, C), Dense (in, out), attention (C, h, C/h), (h, C/h, C).

    `jax`: vit_jax's names, with the modules of a block numbered consecutively; otherwise big_vision's.
    """
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    per_head = (HEADS, WIDTH // HEADS)
    arrays: Tree = {"embedding/bias": state["patches.bias"]}
    arrays["embedding/kernel"] = np.einsum("oihw->hwio", state["patches.weight"])
    rows = state["positions.grid"].reshape(1, -1, WIDTH)
    if "class_token" in state:
        arrays["cls"] = state["class_token"].reshape(1, 1, WIDTH)
    if "positions.token" in state:
        rows = np.concatenate([state["positions.token"].reshape(1, 1, WIDTH), rows], axis=1)
    arrays["Transformer/posembed_input/pos_embedding" if jax else "pos_embedding"] = rows
    attention, second, feed = ("_1", "_2", "_3") if jax else ("_0", "_1", "_0")
    for i in range(LAYERS):
        block, ours = f"Transformer/encoderblock_{i}/", f"encoder.blocks.{i}."
        for norm, number in (("_0", 0), (second, 1)):
            for leaf, ours_leaf in (("scale", "weight"), ("bias", "bias")):
                arrays[f"{block}LayerNorm{norm}/{leaf}"] = state[f"{ours}residuals.{number}.norm.{ours_leaf}"]
        multi = f"{block}MultiHeadDotProductAttention{attention}/"
        matrices, biases = state[f"{ours}attention.in_proj.weight"], state[f"{ours}attention.in_proj.bias"]
        for number, name in enumerate(("query", "key", "value")):
            part = slice(number * WIDTH, (number + 1) * WIDTH)
            arrays[f"{multi}{name}/kernel"] = matrices[part].T.reshape(WIDTH, *per_head)
            arrays[f"{multi}{name}/bias"] = biases[part].reshape(per_head)
        arrays[f"{multi}out/kernel"] = state[f"{ours}attention.out_proj.weight"].T.reshape(*per_head, WIDTH)
        arrays[f"{multi}out/bias"] = state[f"{ours}attention.out_proj.bias"]
        for number, name in enumerate(("expand", "contract")):
            arrays[f"{block}MlpBlock{feed}/Dense_{number}/kernel"] = state[f"{ours}feed_forward.{name}.weight"].T
            arrays[f"{block}MlpBlock{feed}/Dense_{number}/bias"] = state[f"{ours}feed_forward.{name}.bias"]
    for name, ours in (("Transformer/encoder_norm", "encoder.norm"),):
        arrays[f"{name}/scale"], arrays[f"{name}/bias"] = state[f"{ours}.weight"], state[f"{ours}.bias"]
    for name, ours in (("pre_logits", "representation"), ("head", "head")):
        if f"{ours}.weight" in state:
            arrays[f"{name}/kernel"], arrays[f"{name}/bias"] = state[f"{ours}.weight"].T, state[f"{ours}.bias"]
    return arrays


def stacked(arrays: Tree) -> Tree:
    """The tree of a big_vision model that scans over its blocks."""
    first = "Transformer/encoderblock_0/"
    names = [name.removeprefix(first) for name in arrays if name.startswith(first)]
    result = {name: array for name, array in arrays.items() if "encoderblock_" not in name}
    for name in names:
        blocks = [arrays[f"Transformer/encoderblock_{i}/{name}"] for i in range(LAYERS)]
        result[f"Transformer/encoderblock/{name}"] = np.stack(blocks)
    return result


def prefixed(arrays: Tree, prefix: str) -> Tree:
    return {f"{prefix}{name}": array for name, array in arrays.items()}


def write_npz(path: Path, arrays: Tree) -> dict[str, Any]:
    np.savez(path, **arrays)
    return checkpoint.load(path)


def images() -> Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=generator("images"))


TOKEN, MEAN = {"class_token": True}, {"class_token": False, "global_pool": "avg", "fc_norm": False}
BIG = {"no_embed_class": True}
# (options of our model, whether names are vit_jax's, a change of the tree, timm's options for the same model)
CASES: dict[str, Any] = {
    "vit_jax": ({}, True, lambda t: t, TOKEN),
    "vit_jax, mean": ({"pooling": "mean"}, True, lambda t: t, MEAN),
    "vit_jax with its optimizer": (
        {},
        True,
        lambda t: {**prefixed(t, "opt/target/"), **prefixed(t, "opt/state/param_states/"), "step": np.array(3)},
        TOKEN,
    ),
    "big_vision": ({"on_token": False}, False, lambda t: t, {**TOKEN, **BIG}),
    "big_vision, mean": ({"pooling": "mean"}, False, lambda t: t, MEAN),
    "big_vision, params": ({"pooling": "mean"}, False, lambda t: prefixed(t, "params/"), MEAN),
    "big_vision, scanned": ({"pooling": "mean"}, False, stacked, MEAN),
    "big_vision, scanned, params": (
        {"on_token": False},
        False,
        lambda t: prefixed(stacked(t), "params/"),
        {**TOKEN, **BIG},
    ),
    "big_vision, a tower": (
        {"pooling": "mean"},
        False,
        lambda t: {**prefixed(t, "params/img/"), "params/txt/head/kernel": np.zeros((2, 2)), "params/t": np.zeros(1)},
        MEAN,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_imported_npz_gives_the_logits_and_gradients_of_timms_loader(case: str, tmp_path: Path) -> None:
    """The model from which the file was written is a third reference."""
    timm = pytest.importorskip("timm")
    options, jax, change, their_options = CASES[case]
    original = build_model(**options)
    content = write_npz(tmp_path / "vit.npz", change(flax_tree(original, jax=jax)))
    adopted = adopt(content, None)
    tower = case == "big_vision, a tower"
    head = {name: t for name, t in original.state_dict().items() if name.startswith("head.")}
    model = build_model(**options)
    torch.nn.init.zeros_(model.patches.weight)
    model.load_state_dict({**adopted.weights, **(head if tower else {})})

    shape = {"embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS, "img_size": SIDE, "patch_size": PATCH}
    peer = timm.models.VisionTransformer(
        num_classes=CLASSES, act_layer="gelu_tanh", **{**shape, **their_options}
    ).eval()
    peer.load_pretrained(str(tmp_path / "vit.npz"))
    gradients = []
    for network in (model, peer, original):
        pictures = images().requires_grad_()
        logits = network(pictures)
        F.cross_entropy(logits, torch.tensor([0, 3, 6]), reduction="sum").backward()
        gradients.append((logits.detach(), pictures.grad, dict(network.named_parameters())))
    (
        (logits, pixel_gradient, parameters),
        (expected, expected_pixel_gradient, their_parameters),
        (original_logits, _, _),
    ) = gradients
    assert expected.std() > 0.5 and (expected - expected[:1]).abs().max() > 0.1
    # fp32 values of about one, summed in another order.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits, original_logits, rtol=0, atol=0)
    torch.testing.assert_close(pixel_gradient, expected_pixel_gradient, rtol=1e-4, atol=1e-5)
    for name, their_name in (
        ("attention.in_proj.weight", "attn.qkv.weight"),
        ("attention.out_proj.weight", "attn.proj.weight"),
    ):
        gradient, expected_gradient = (
            parameters[f"encoder.blocks.1.{name}"].grad,
            their_parameters[f"blocks.1.{their_name}"].grad,
        )
        assert expected_gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_other_content_of_a_file_is_listed_as_left_out(tmp_path: Path) -> None:
    original = build_model(pooling="mean")
    for case in ("vit_jax with its optimizer", "big_vision, a tower"):
        _, jax, change, _ = CASES[case]
        content = write_npz(tmp_path / "vit.npz", change(flax_tree(original, jax=jax)))
        prefix = google.find_prefix(content)
        expected = {name for name in content if not name.startswith(prefix)}
        # A tower's head maps to a space shared with texts, and not to classes.
        expected |= {"params/img/head/kernel", "params/img/head/bias"} & content.keys()
        assert expected and set(adopt(content, None).left_out) == expected


# Layouts that timm does not read: the reference is the original model; the layouts above verify its tree.
OTHER_TREES: dict[str, Any] = {
    "vit_jax with a representation": ({"representation": 20}, True, lambda t: t),
    "vit_jax numbered as Flax does today": (
        {},
        True,
        lambda t: {
            name.replace("Attention_1", "Attention_0").replace("Norm_2", "Norm_1").replace("Block_3", "Block_0"): array
            for name, array in t.items()
        },
    ),
    "big_vision before 2022": (
        {"pooling": "mean"},
        False,
        lambda t: {name.replace("pos_embedding", "Transformer/pos_embedding"): array for name, array in t.items()},
    ),
    "big_vision with the class token's position": ({}, False, lambda t: t),
}


@pytest.mark.parametrize("case", OTHER_TREES)
@torch.no_grad()
def test_other_trees_give_the_model_from_which_they_were_written(case: str, tmp_path: Path) -> None:
    options, jax, change = OTHER_TREES[case]
    original = build_model(**options)
    adopted = adopt(write_npz(tmp_path / "vit.npz", change(flax_tree(original, jax=jax))), None)
    assert adopted.left_out == [] and adopted.task_state == {"classes": [f"class {i}" for i in range(CLASSES)]}
    assert adopted.weights.keys() == original.state_dict().keys()
    assert all(torch.equal(adopted.weights[name], tensor) for name, tensor in original.state_dict().items())


def test_bfloat16_becomes_fp32_with_the_same_values(tmp_path: Path) -> None:
    original = build_model(pooling="mean")
    halves = {
        name: torch.tensor(array).bfloat16().view(torch.int16).numpy().view("V2")
        for name, array in flax_tree(original, jax=False).items()
    }
    adopted = adopt(write_npz(tmp_path / "vit.npz", prefixed(stacked(halves), "params/")), None)
    for name, tensor in original.state_dict().items():
        assert adopted.weights[name].dtype == torch.float32
        assert torch.equal(adopted.weights[name], tensor.bfloat16().float())


def test_the_number_of_heads_is_read_from_every_layout() -> None:
    for change in (dict, stacked, lambda t: prefixed(t, "params/"), lambda t: prefixed(stacked(t), "params/img/")):
        content = {name: torch.tensor(array) for name, array in change(flax_tree(build_model(), jax=False)).items()}
        assert google.head_count(content) == HEADS


def test_fixed_positions_are_those_of_big_vision() -> None:
    """Column 2 of row 1 at width 8, computed by hand for the frequencies 1 and 1/10000."""
    table = google.sine_positions(3, 4, 8)
    assert table.shape == (3, 4, 8)
    x, y = torch.tensor([2.0, 0.0002]), torch.tensor([1.0, 0.0001])
    torch.testing.assert_close(table[1, 2], torch.cat([x.sin(), x.cos(), y.sin(), y.cos()]), rtol=0, atol=1e-7)
    three = google.sine_positions(1, 2, 12)[0, 1, :3]  # the second of three frequencies is 1/100
    torch.testing.assert_close(three, torch.tensor([1.0, 0.01, 0.0001]).sin(), rtol=0, atol=1e-7)


def test_a_file_without_positions_gets_big_visions_fixed_positions_for_the_image_size(tmp_path: Path) -> None:
    arrays = flax_tree(build_model(pooling="mean"), jax=False)
    arrays.pop("pos_embedding")
    content = write_npz(tmp_path / "vit.npz", prefixed(arrays, "params/"))
    with pytest.raises(UserError, match=r"not a plain ViT \(it has no learned positions\)"):
        adopt(content, None)
    weights = adopt(content, None, image_size=(SIDE, 2 * SIDE)).weights
    assert torch.equal(weights["positions.grid"], google.sine_positions(SIDE // PATCH, 2 * SIDE // PATCH, WIDTH))
    build_model(pooling="mean", image_size=(SIDE, 2 * SIDE)).load_state_dict(weights)


REFUSED = {
    "a ViT that pools by attention": {"MAPHead_0/probe": (1, 1, WIDTH)},
    "a hybrid of ResNet and ViT": {"conv_root/kernel": (7, 7, 3, 64)},
    "a ViT with rotary positions": {"Transformer/encoderblock_0/rope/freqs": (4,)},
    "something else": {"Transformer/encoderblock_0/MlpBlock_0/Dense_2/kernel": (4, 4)},
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("prefix", ["", "params/"])
def test_another_network_is_refused_and_identified(what: str, prefix: str, tmp_path: Path) -> None:
    more = {name: np.zeros(shape, dtype=np.float32) for name, shape in REFUSED[what].items()}
    content = write_npz(tmp_path / "vit.npz", prefixed({**flax_tree(build_model(), jax=False), **more}, prefix))
    with pytest.raises(UserError, match=rf"is {what}.*and not a plain ViT \(it has {prefix}{next(iter(more))} \("):
        adopt(content, None)


@pytest.mark.parametrize("name", ["resnet/root_block/conv2d/kernel", "root_block/standardized_conv2d/kernel"])
def test_a_resnet_of_google_is_refused_as_a_resnet(name: str) -> None:
    with pytest.raises(UserError, match="is a ResNet and not a plain ViT"):
        adopt({name: torch.zeros(7, 7, 3, 64), "head/kernel": torch.zeros(2, 2)}, None)


def test_a_mixer_is_refused_as_a_mixer() -> None:
    with pytest.raises(UserError, match="is an MLP-Mixer and not a plain ViT"):
        adopt({"MixerBlock_0/token_mixing/Dense_0/kernel": torch.zeros(7, 7), "stem/kernel": torch.zeros(2, 2)}, None)


def test_a_patch_matrix_without_the_axes_of_patches_is_refused() -> None:
    """NaFlex's models of big_vision multiply flattened patches."""
    content = {name: torch.tensor(array) for name, array in flax_tree(build_model(), jax=False).items()}
    content["embedding/kernel"] = content["embedding/kernel"].flatten(0, 2)
    with pytest.raises(UserError, match=r"something else and not a plain ViT \(it has embedding/kernel \(192, 48\),"):
        adopt(content, None)
