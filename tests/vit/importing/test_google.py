"""Google's .npz: written here from the documented layout, read by timm's own loader and by ours, with equal answers."""

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


def ours(**changed: Any) -> Classifier:
    """A small ViT of ours with every tensor drawn at random."""
    positions = PositionOptions(resample="bicubic_antialias", on_token=changed.pop("on_token", True))
    options = {"dropout": 0.0, "attention_dropout": 0.0, "drop_path": 0.0, "layer_scale": None, "qk_norm": False}
    blocks = VitBlockOptions(**options, norm_eps=1e-6, activation="gelu_tanh")
    sizes = {"width": WIDTH, "layers": LAYERS, "heads": HEADS, "feedforward": 4 * WIDTH, "patch_size": PATCH}
    rest = {"pooling": "token", "registers": 0, "representation": None, "embedding": "convolution"}
    data = {"classes": CLASSES, "channels": 3, "image_size": (SIDE, SIDE)}
    model = Classifier(**{**data, **sizes, **rest, **changed}, positions=positions, blocks=blocks).eval()
    drawn = generator("google")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim in (2, 4):
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5, generator=drawn)
            else:
                parameter.normal_(mean=0.5, std=0.3, generator=drawn)
    return model


def tree(model: Classifier, *, jax: bool) -> Tree:
    """The arrays as Flax holds them: patches (p, p, channels, C), Dense (in, out), attention (C, h, C/h), (h, C/h, C).

    `jax`: vit_jax's names, which number modules by their place in the block; otherwise big_vision's.
    """
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    split = (HEADS, WIDTH // HEADS)
    found: Tree = {"embedding/bias": state["patches.bias"]}
    found["embedding/kernel"] = np.einsum("oihw->hwio", state["patches.weight"])
    rows = state["positions.grid"].reshape(1, -1, WIDTH)
    if "class_token" in state:
        found["cls"] = state["class_token"].reshape(1, 1, WIDTH)
    if "positions.token" in state:
        rows = np.concatenate([state["positions.token"].reshape(1, 1, WIDTH), rows], axis=1)
    found["Transformer/posembed_input/pos_embedding" if jax else "pos_embedding"] = rows
    attention, second, feed = ("_1", "_2", "_3") if jax else ("_0", "_1", "_0")
    for i in range(LAYERS):
        block, mine = f"Transformer/encoderblock_{i}/", f"encoder.blocks.{i}."
        for norm, number in (("_0", 0), (second, 1)):
            for leaf, other in (("scale", "weight"), ("bias", "bias")):
                found[f"{block}LayerNorm{norm}/{leaf}"] = state[f"{mine}residuals.{number}.norm.{other}"]
        multi = f"{block}MultiHeadDotProductAttention{attention}/"
        weights, biases = state[f"{mine}attention.in_proj.weight"], state[f"{mine}attention.in_proj.bias"]
        for number, name in enumerate(("query", "key", "value")):
            part = slice(number * WIDTH, (number + 1) * WIDTH)
            found[f"{multi}{name}/kernel"] = weights[part].T.reshape(WIDTH, *split)
            found[f"{multi}{name}/bias"] = biases[part].reshape(split)
        found[f"{multi}out/kernel"] = state[f"{mine}attention.out_proj.weight"].T.reshape(*split, WIDTH)
        found[f"{multi}out/bias"] = state[f"{mine}attention.out_proj.bias"]
        for number, name in enumerate(("expand", "contract")):
            found[f"{block}MlpBlock{feed}/Dense_{number}/kernel"] = state[f"{mine}feed_forward.{name}.weight"].T
            found[f"{block}MlpBlock{feed}/Dense_{number}/bias"] = state[f"{mine}feed_forward.{name}.bias"]
    for name, mine in (("Transformer/encoder_norm", "encoder.norm"),):
        found[f"{name}/scale"], found[f"{name}/bias"] = state[f"{mine}.weight"], state[f"{mine}.bias"]
    for name, mine in (("pre_logits", "representation"), ("head", "head")):
        if f"{mine}.weight" in state:
            found[f"{name}/kernel"], found[f"{name}/bias"] = state[f"{mine}.weight"].T, state[f"{mine}.bias"]
    return found


def stacked(arrays: Tree) -> Tree:
    """As a big_vision model that scans over its blocks."""
    first = "Transformer/encoderblock_0/"
    inside = [name.removeprefix(first) for name in arrays if name.startswith(first)]
    found = {name: array for name, array in arrays.items() if "encoderblock_" not in name}
    for name in inside:
        layers = [arrays[f"Transformer/encoderblock_{i}/{name}"] for i in range(LAYERS)]
        found[f"Transformer/encoderblock/{name}"] = np.stack(layers)
    return found


def prefixed(arrays: Tree, prefix: str) -> Tree:
    return {f"{prefix}{name}": array for name, array in arrays.items()}


def written(path: Path, arrays: Tree) -> dict[str, Any]:
    np.savez(path, **arrays)
    return checkpoint.load(path)


def images() -> Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=generator("images"))


TOKEN, MEAN = {"class_token": True}, {"class_token": False, "global_pool": "avg", "fc_norm": False}
BIG = {"no_embed_class": True}
# (our model, whether vit_jax's names, what is done to its tree, timm's options for the same)
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
def test_timms_reading_of_an_npz_answers_as_ours(case: str, tmp_path: Path) -> None:
    """Logits and gradients; the original, which the file was written from, is a third witness."""
    timm = pytest.importorskip("timm")
    mine, jax, change, theirs = CASES[case]
    original = ours(**mine)
    content = written(tmp_path / "vit.npz", change(tree(original, jax=jax)))
    adopted = adopt(content, None)
    tower = case == "big_vision, a tower"
    head = {name: t for name, t in original.state_dict().items() if name.startswith("head.")}
    model = ours(**mine)
    torch.nn.init.zeros_(model.patches.weight)
    model.load_state_dict({**adopted.weights, **(head if tower else {})})

    sizes = {"embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS, "img_size": SIDE, "patch_size": PATCH}
    peer = timm.models.VisionTransformer(num_classes=CLASSES, act_layer="gelu_tanh", **{**sizes, **theirs}).eval()
    peer.load_pretrained(str(tmp_path / "vit.npz"))
    gradients = []
    for network in (model, peer, original):
        pictures = images().requires_grad_()
        logits = network(pictures)
        F.cross_entropy(logits, torch.tensor([0, 3, 6]), reduction="sum").backward()
        gradients.append((logits.detach(), pictures.grad, dict(network.named_parameters())))
    (logits, seen, mapped), (expected, theirs_seen, others), (written_from, _, _) = gradients
    assert expected.std() > 0.5 and (expected - expected[:1]).abs().max() > 0.1
    # Numbers of size one in fp32, summed in another order.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits, written_from, rtol=0, atol=0)
    torch.testing.assert_close(seen, theirs_seen, rtol=1e-4, atol=1e-5)
    for name, other in (
        ("attention.in_proj.weight", "attn.qkv.weight"),
        ("attention.out_proj.weight", "attn.proj.weight"),
    ):
        one, two = mapped[f"encoder.blocks.1.{name}"].grad, others[f"blocks.1.{other}"].grad
        assert two.abs().max() > 1e-3
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_what_lies_beside_the_weights_is_listed(tmp_path: Path) -> None:
    original = ours(pooling="mean")
    for case in ("vit_jax with its optimizer", "big_vision, a tower"):
        _, jax, change, _ = CASES[case]
        content = written(tmp_path / "vit.npz", change(tree(original, jax=jax)))
        inside = google.find_prefix(content)
        expected = {name for name in content if not name.startswith(inside)}
        # A tower's head maps to the space of texts: as a classifier it would answer with nonsense.
        expected |= {"params/img/head/kernel", "params/img/head/bias"} & content.keys()
        assert expected and set(adopt(content, None).left_out) == expected


# Layouts that timm does not read; the original is the witness, and the layouts above show that its tree is right.
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
def test_other_trees_give_the_model_that_they_were_written_from(case: str, tmp_path: Path) -> None:
    mine, jax, change = OTHER_TREES[case]
    original = ours(**mine)
    adopted = adopt(written(tmp_path / "vit.npz", change(tree(original, jax=jax))), None)
    assert adopted.left_out == [] and adopted.task_state == {"classes": [f"class {i}" for i in range(CLASSES)]}
    assert adopted.weights.keys() == original.state_dict().keys()
    assert all(torch.equal(adopted.weights[name], tensor) for name, tensor in original.state_dict().items())


def test_bfloat16_comes_out_as_the_nearest_numbers(tmp_path: Path) -> None:
    original = ours(pooling="mean")
    halves = {
        name: torch.tensor(array).bfloat16().view(torch.int16).numpy().view("V2")
        for name, array in tree(original, jax=False).items()
    }
    adopted = adopt(written(tmp_path / "vit.npz", prefixed(stacked(halves), "params/")), None)
    for name, tensor in original.state_dict().items():
        assert adopted.weights[name].dtype == torch.float32
        assert torch.equal(adopted.weights[name], tensor.bfloat16().float())


def test_the_number_of_heads_is_read_from_every_tree() -> None:
    for change in (dict, stacked, lambda t: prefixed(t, "params/"), lambda t: prefixed(stacked(t), "params/img/")):
        content = {name: torch.tensor(array) for name, array in change(tree(ours(), jax=False)).items()}
        assert google.head_count(content) == HEADS


def test_fixed_positions_are_those_of_big_vision() -> None:
    """Column 2 of row 1 at width 8: two frequencies, 1 and 1/10000, worked out by hand."""
    table = google.sine_positions(3, 4, 8)
    assert table.shape == (3, 4, 8)
    x, y = torch.tensor([2.0, 0.0002]), torch.tensor([1.0, 0.0001])
    torch.testing.assert_close(table[1, 2], torch.cat([x.sin(), x.cos(), y.sin(), y.cos()]), rtol=0, atol=1e-7)
    three = google.sine_positions(1, 2, 12)[0, 1, :3]  # the middle one of three lies between them: 1/100
    torch.testing.assert_close(three, torch.tensor([1.0, 0.01, 0.0001]).sin(), rtol=0, atol=1e-7)


def test_a_file_without_positions_gets_big_visions_for_the_size_of_the_images(tmp_path: Path) -> None:
    arrays = tree(ours(pooling="mean"), jax=False)
    arrays.pop("pos_embedding")
    content = written(tmp_path / "vit.npz", prefixed(arrays, "params/"))
    with pytest.raises(UserError, match=r"not a plain ViT \(it has no learned positions\)"):
        adopt(content, None)
    weights = adopt(content, None, image_size=(SIDE, 2 * SIDE)).weights
    assert torch.equal(weights["positions.grid"], google.sine_positions(SIDE // PATCH, 2 * SIDE // PATCH, WIDTH))
    ours(pooling="mean", image_size=(SIDE, 2 * SIDE)).load_state_dict(weights)


REFUSED = {
    "a ViT that pools by attention": {"MAPHead_0/probe": (1, 1, WIDTH)},
    "a hybrid of ResNet and ViT": {"conv_root/kernel": (7, 7, 3, 64)},
    "a ViT with rotary positions": {"Transformer/encoderblock_0/rope/freqs": (4,)},
    "something else": {"Transformer/encoderblock_0/MlpBlock_0/Dense_2/kernel": (4, 4)},
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("prefix", ["", "params/"])
def test_another_network_is_refused_by_what_it_is(what: str, prefix: str, tmp_path: Path) -> None:
    more = {name: np.zeros(shape, dtype=np.float32) for name, shape in REFUSED[what].items()}
    content = written(tmp_path / "vit.npz", prefixed({**tree(ours(), jax=False), **more}, prefix))
    with pytest.raises(UserError, match=rf"is {what}.*and not a plain ViT \(it has {prefix}{next(iter(more))} \("):
        adopt(content, None)


@pytest.mark.parametrize("name", ["resnet/root_block/conv2d/kernel", "root_block/standardized_conv2d/kernel"])
def test_a_resnet_of_google_is_refused_as_one(name: str) -> None:
    with pytest.raises(UserError, match="is a ResNet and not a plain ViT"):
        adopt({name: torch.zeros(7, 7, 3, 64), "head/kernel": torch.zeros(2, 2)}, None)


def test_a_mixer_is_refused_as_one() -> None:
    with pytest.raises(UserError, match="is an MLP-Mixer and not a plain ViT"):
        adopt({"MixerBlock_0/token_mixing/Dense_0/kernel": torch.zeros(7, 7), "stem/kernel": torch.zeros(2, 2)}, None)


def test_a_patch_matrix_without_the_squares_axes_is_refused() -> None:
    """NaFlex's models of big_vision multiply flattened squares."""
    content = {name: torch.tensor(array) for name, array in tree(ours(), jax=False).items()}
    content["embedding/kernel"] = content["embedding/kernel"].flatten(0, 2)
    with pytest.raises(UserError, match=r"something else and not a plain ViT \(it has embedding/kernel \(192, 48\),"):
        adopt(content, None)
