"""Files of other programs give the logits of their own models, with random tensors, or are refused and identified."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from foreign_files import HUB_VIT, replaced
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError
from common.files import checkpoint
from common.machine.seeds import generator
from common.task import Adopted
from common.train import assembly
from vit.importing.adopt import adopt, recognise, unwrap
from vit.models.classifier import Classifier, PositionOptions, VitBlockOptions

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn  # noqa: E402

WIDTH, LAYERS, HEADS, SIDE, PATCH, CLASSES = 48, 2, 3, 32, 8, 7
ROWS = (SIDE // PATCH) ** 2


def randomised(model: nn.Module) -> Any:
    """The model with all tensors sampled, so that none keeps initial zeros or ones."""
    random = generator("redrawn")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim > 1 and not name.endswith(("token", "tokens", "embed", "embedding", "embeddings")):
                tensor.normal_(std=1.5 * tensor[0].numel() ** -0.5, generator=random)  # keeps the scale of activations
            elif name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ln.weight", "gamma", "lambda1")):
                tensor.uniform_(0.5, 1.5, generator=random)
            else:
                tensor.normal_(std=0.5, generator=random)
    return model.eval()


def build_model(**changed: Any) -> Classifier:
    blocks = {
        **{"dropout": 0.0, "attention_dropout": 0.0, "drop_path": 0.0, "layer_scale": None, "qk_norm": False},
        **{"norm_eps": 1e-6, "activation": "gelu"},
    }
    blocks |= {key: changed.pop(key) for key in [*changed] if key in blocks}
    positions = PositionOptions(resample="bicubic_antialias", on_token=changed.pop("on_token", True))
    shape = {"width": WIDTH, "layers": LAYERS, "heads": HEADS, "feedforward": 4 * WIDTH, "patch_size": PATCH}
    rest = {"pooling": "token", "registers": 0, "representation": None, "embedding": "convolution"}
    data = {"classes": CLASSES, "channels": 3, "image_size": (SIDE, SIDE)}
    options = VitBlockOptions(**blocks)
    return Classifier(**{**data, **shape, **rest, **changed}, positions=positions, blocks=options).eval()


def loaded(adopted: Adopted, **changed: Any) -> Classifier:
    model = build_model(**changed)
    model.load_state_dict(adopted.weights)
    return model


def timm_model(**changed: Any) -> VisionTransformer:
    shape = {"embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS, "img_size": SIDE, "patch_size": PATCH}
    return randomised(VisionTransformer(**{**shape, "num_classes": CLASSES, **changed}))


def torchvision_model(representation: int | None = None) -> nn.Module:
    return randomised(
        torchvision.models.VisionTransformer(
            SIDE, PATCH, LAYERS, HEADS, WIDTH, 4 * WIDTH, num_classes=CLASSES, representation_size=representation
        )
    )


def hugging_face(kind: str = "ViT", name: str = "ForImageClassification", **changed: Any) -> nn.Module:
    shape = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    shape |= {"image_size": SIDE, "patch_size": PATCH, "num_labels": CLASSES, "layer_norm_eps": 1e-6}
    shape |= {"intermediate_size": 4 * WIDTH} if "Dinov2" not in kind else {"mlp_ratio": 4}
    config = getattr(transformers, f"{kind}Config")(**{**shape, **changed})
    return randomised(getattr(transformers, f"{kind}{name}")(config))


def images() -> Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=generator("images"))


def assert_same(
    model: Classifier, peer: nn.Module, pairs: dict[str, str], run_peer: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Compare logits, and the gradients of a loss by images and by `pairs` of parameters (ours, the peer's).

    Values are about one, and fp32 sums of some hundred terms in another order differ by less than 1e-5.
    """
    gradients = []
    for network, run in ((model, model), (peer, run_peer or peer)):
        network.zero_grad()
        pictures = images().requires_grad_()
        logits = run(pictures)
        assert logits.shape == (3, CLASSES)
        F.cross_entropy(logits, torch.tensor([0, 3, 6]), reduction="sum").backward()
        gradients.append((logits.detach(), pictures.grad, dict(network.named_parameters())))
    (logits, pixel_gradient, parameters), (expected, expected_pixel_gradient, peer_parameters) = gradients
    assert expected.std() > 0.5 and (expected - expected[:1]).abs().max() > 0.3, "the peer's logits vary"
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(pixel_gradient, expected_pixel_gradient, rtol=1e-4, atol=1e-5)
    for name, peer_name in pairs.items():
        gradient, expected_gradient = parameters[name].grad, peer_parameters[peer_name].grad
        assert expected_gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradient, expected_gradient.reshape(gradient.shape), rtol=1e-4, atol=1e-5)


TORCHVISION_PAIRS = {
    "patches.weight": "conv_proj.weight",
    "class_token": "class_token",
    "encoder.blocks.1.attention.in_proj.weight": "encoder.layers.encoder_layer_1.self_attention.in_proj_weight",
    "encoder.blocks.0.feed_forward.contract.bias": "encoder.layers.encoder_layer_0.mlp.3.bias",
    "encoder.blocks.1.residuals.1.norm.weight": "encoder.layers.encoder_layer_1.ln_2.weight",
}
TIMM_PAIRS = {
    "patches.weight": "patch_embed.proj.weight",
    "encoder.blocks.1.attention.in_proj.weight": "blocks.1.attn.qkv.weight",
    "encoder.blocks.0.feed_forward.expand.bias": "blocks.0.mlp.fc1.bias",
    "encoder.blocks.0.residuals.0.norm.weight": "blocks.0.norm1.weight",
    "head.weight": "head.weight",
}
HUGGING_PAIRS = {
    "patches.weight": "vit.embeddings.patch_embeddings.projection.weight",
    "class_token": "vit.embeddings.cls_token",
    "encoder.blocks.1.attention.out_proj.weight": "vit.layers.1.attention.o_proj.weight",
    "encoder.blocks.0.residuals.1.norm.weight": "vit.layers.0.layernorm_after.weight",
    "head.weight": "classifier.weight",
}


@pytest.mark.parametrize("representation", [None, 20], ids=["plain", "with a representation"])
def test_torchvisions_files_give_the_logits_of_torchvision(representation: int | None, tmp_path: Path) -> None:
    peer = torchvision_model(representation)
    torch.save(peer.state_dict(), tmp_path / "vit.pth")
    adopted = adopt(checkpoint.load(tmp_path / "vit.pth"), None)
    assert adopted.left_out == []
    assert_same(loaded(adopted, representation=representation), peer, TORCHVISION_PAIRS)


def test_torchvisions_older_names_give_the_logits_of_torchvision() -> None:
    peer = torchvision_model()
    older = {
        n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): t for n, t in peer.state_dict().items()
    }
    assert sum("linear_" in name for name in older) == 4 * LAYERS
    assert_same(loaded(adopt(older, None)), peer, TORCHVISION_PAIRS)
    reloaded = torchvision_model()
    reloaded.load_state_dict(older)  # torchvision also reads these names


TIMM: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "class token": ({}, {}),
    "tanh": ({"act_layer": "gelu_tanh"}, {"activation": "gelu_tanh"}),
    "mean, then norm": ({"class_token": False, "global_pool": "avg"}, {"pooling": "mean_then_norm"}),
    "norm, then mean": ({"class_token": False, "global_pool": "avg", "fc_norm": False}, {"pooling": "mean"}),
    "MAE's mean beside a class token": ({"global_pool": "avg"}, {"pooling": "mean_then_norm", "registers": 1}),
    "MAE's mean, tokens without positions": (
        {"global_pool": "avg", "reg_tokens": 2, "no_embed_class": True},
        {"pooling": "mean_then_norm", "registers": 3},
    ),
    "registers with positions": ({"reg_tokens": 4}, {"registers": 4}),
    "registers without": ({"reg_tokens": 4, "no_embed_class": True}, {"registers": 4, "on_token": False}),
    "registers and no class token": (
        {"reg_tokens": 4, "class_token": False, "global_pool": "avg", "fc_norm": False},
        {"registers": 4, "pooling": "mean"},
    ),
    "no position of the class token": ({"no_embed_class": True}, {"on_token": False}),
    "layer scale": ({"init_values": 0.1}, {"layer_scale": 0.1}),
    "norms of queries and keys": ({"qk_norm": True}, {"qk_norm": True}),
    "no biases of queries, keys and values": ({"qkv_bias": False}, {}),
}


@pytest.mark.parametrize("case", TIMM)
def test_timms_files_give_the_logits_of_timm(case: str, tmp_path: Path) -> None:
    their_options, options = TIMM[case]
    peer = timm_model(**their_options)
    safetensors.torch.save_file(peer.state_dict(), tmp_path / "model.safetensors")
    adopted = adopt(checkpoint.load(tmp_path / "model.safetensors"), None)
    assert adopted.left_out == []
    pairs = {**TIMM_PAIRS, **({"class_token": "cls_token"} if "class_token" in adopted.weights else {})}
    assert_same(loaded(adopted, **options), peer, pairs)


def test_deit_iiis_own_names_give_the_logits_of_timm() -> None:
    """The authors' files name layer scale gamma_1 and gamma_2, which timm translates."""
    peer = timm_model(no_embed_class=True, init_values=0.1)
    file = {n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for n, t in peer.state_dict().items()}
    read = timm_model(no_embed_class=True, init_values=0.1)
    read.load_state_dict(checkpoint_filter_fn(dict(file), read, adapt_layer_scale=True))
    adopted = adopt({"model": file}, None)
    assert_same(loaded(adopted, layer_scale=0.1, on_token=False), read, TIMM_PAIRS)


DISTILLED_PAIRS = {
    "distillation_token": "dist_token",
    "distillation_head.weight": "head_dist.weight",
    "class_token": "cls_token",
}


@pytest.mark.parametrize("wrapped", [False, True], ids=["timm", "DeiT's authors"])
@pytest.mark.parametrize("side", [SIDE, 40], ids=["square", "another size in the config"])
def test_distilled_deits_give_the_logits_of_timm(wrapped: bool, side: int) -> None:
    shape = {"embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS, "img_size": SIDE, "patch_size": PATCH}
    peer = randomised(VisionTransformerDistilled(**shape, num_classes=CLASSES))
    file = {"model": peer.state_dict()} if wrapped else peer.state_dict()
    adopted = adopt(file, list("abcdefg"), (side, side))
    assert adopted.left_out == [] and adopted.task_state == {"classes": list("abcdefg")}
    assert_same(loaded(adopted, distillation_token=True), peer, {**TIMM_PAIRS, **DISTILLED_PAIRS})


@pytest.mark.parametrize("published", [False, True], ids=["version 5", "hub"])
def test_distilled_deits_give_the_logits_of_transformers(published: bool) -> None:
    peer = hugging_face("DeiT", "ForImageClassificationWithTeacher")
    state = {name.replace("deit.", "vit."): tensor for name, tensor in peer.state_dict().items()}
    file = {name.replace("vit.", "deit."): t for name, t in (replaced(state, HUB_VIT) if published else state).items()}
    assert published == ("deit.encoder.layer.0.attention.attention.query.weight" in file)
    adopted = adopt(file, None)
    assert adopted.left_out == []
    pairs = {
        "distillation_token": "deit.embeddings.distillation_token",
        "distillation_head.weight": "distillation_classifier.weight",
        "head.bias": "cls_classifier.bias",
    }
    assert_same(loaded(adopted, distillation_token=True), peer, pairs, lambda x: peer(pixel_values=x).logits)


def test_a_distilled_file_starts_a_plain_vit_and_a_plain_file_a_distilled_one(tmp_path: Path) -> None:
    shape = {"embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS, "img_size": SIDE, "patch_size": PATCH}
    peers = {"two": VisionTransformerDistilled(**shape, num_classes=CLASSES), "one": timm_model()}
    lines = {}
    for name, peer in peers.items():
        torch.save(peer.state_dict(), tmp_path / f"{name}.pt")
        model = build_model(distillation_token=name == "one")
        lines[name] = assembly.load_initial_weights(model, SevenClasses(list("abcdefg")), tmp_path / f"{name}.pt")
    own = ("distillation_token", "distillation_position", "distillation_head.weight", "distillation_head.bias")
    assert "; unused: " in lines["two"] and "re-initialised" not in lines["two"]
    assert "re-initialised: " in lines["one"] and "unused" not in lines["one"]
    assert all(name in line for line in lines.values() for name in own)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("chunked", [False, True])
def test_dinov2s_own_files_give_the_logits_of_timm(registers: int, chunked: bool) -> None:
    """The class token has a position and the registers have none; large files also number chunks of blocks."""
    shape = {"init_values": 0.1, "reg_tokens": registers, "no_embed_class": registers > 0}
    base = timm_model(**{**shape, "num_classes": 0}).state_dict()
    random = generator("dino")
    file = {name: tensor for name, tensor in base.items() if name not in ("reg_token", "pos_embed")}
    file |= {"pos_embed": torch.randn(1, 1 + ROWS, WIDTH, generator=random), "mask_token": torch.randn(1, WIDTH)}
    file |= {"register_tokens": base["reg_token"]} if registers else {}
    peer = timm_model(**shape)
    peer.load_state_dict(checkpoint_filter_fn(dict(file), peer), strict=False)
    if chunked:
        file = {
            name.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): t for name, t in file.items()
        }
    adopted = adopt(file, None)
    assert adopted.left_out == ["mask_token"] and "head.weight" not in adopted.weights
    head = {f"head.{leaf}": peer.state_dict()[f"head.{leaf}"] for leaf in ("weight", "bias")}
    model = loaded(adopted._replace(weights={**adopted.weights, **head}), registers=registers, layer_scale=0.1)
    assert_same(model, peer, TIMM_PAIRS)


@pytest.mark.parametrize("published", [False, True], ids=["version 5", "hub"])
def test_transformers_files_give_the_logits_of_transformers(published: bool, tmp_path: Path) -> None:
    peer = hugging_face()
    file = replaced(peer.state_dict(), HUB_VIT) if published else peer.state_dict()
    assert published == ("vit.encoder.layer.0.attention.attention.query.weight" in file)
    safetensors.torch.save_file(file, tmp_path / "model.safetensors", metadata={"format": "pt"})
    adopted = adopt(checkpoint.load(tmp_path / "model.safetensors"), None)
    assert adopted.left_out == []
    assert_same(loaded(adopted), peer, HUGGING_PAIRS, lambda x: peer(pixel_values=x).logits)


def test_a_file_saved_by_transformers_gives_its_logits(tmp_path: Path) -> None:
    peer = hugging_face(qkv_bias=False)
    peer.save_pretrained(tmp_path)
    adopted = adopt(checkpoint.load(tmp_path / "model.safetensors"), None)
    pairs = {name: peer_name for name, peer_name in HUGGING_PAIRS.items() if "in_proj" not in name}
    assert_same(loaded(adopted), peer, pairs, lambda x: peer(pixel_values=x).logits)


def test_the_eps_of_transformers_default_config_can_be_set() -> None:
    peer = hugging_face(layer_norm_eps=1e-12)
    model = loaded(adopt(peer.state_dict(), None), norm_eps=1e-12)
    assert_same(model, peer, HUGGING_PAIRS, lambda x: peer(pixel_values=x).logits)


@pytest.mark.parametrize("published", [False, True], ids=["version 5", "hub"])
@torch.no_grad()
def test_the_pooler_of_a_base_model_of_transformers_becomes_the_representation(published: bool) -> None:
    peer = hugging_face(name="Model")
    file = {f"vit.{name}": tensor for name, tensor in peer.state_dict().items()}
    file = {name.removeprefix("vit."): t for name, t in (replaced(file, HUB_VIT) if published else file).items()}
    adopted = adopt(file, ["a", "b", "c"])
    assert adopted.task_state == {"classes": ["a", "b", "c"]} and adopted.left_out == []
    model = build_model(representation=WIDTH)
    gaps = model.load_state_dict(adopted.weights, strict=False)
    assert gaps.missing_keys == ["head.weight", "head.bias"] and gaps.unexpected_keys == []
    pooled = model.representation(model.features(images())).tanh()
    torch.testing.assert_close(pooled, peer(pixel_values=images()).pooler_output, rtol=0, atol=1e-5)


def test_a_pooler_beside_a_classifier_is_left_out() -> None:
    """transformers' classifier does not use it."""
    file = hugging_face().state_dict()
    unused = {"vit.pooler.dense.weight": torch.randn(WIDTH, WIDTH), "vit.pooler.dense.bias": torch.randn(WIDTH)}
    adopted = adopt({**file, **unused}, None)
    assert adopted.left_out == [*unused]
    loaded(adopted)


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
@pytest.mark.parametrize("published", [False, True], ids=["version 5", "hub"])
@torch.no_grad()
def test_dinov2_in_transformers_is_imported_without_its_head(kind: str, published: bool) -> None:
    """Its head takes the concatenated class token and mean of the patches, which no head here does."""
    peer = hugging_face(kind)
    file = replaced(peer.state_dict(), HUB_VIT) if published else peer.state_dict()
    adopted = adopt(file, None)
    assert sorted(adopted.left_out) == sorted(
        ["classifier.weight", "classifier.bias", *(name for name in file if name.endswith("mask_token"))]
    )
    model = build_model(layer_scale=0.1, registers=4 if "Registers" in kind else 0)
    assert model.load_state_dict(adopted.weights, strict=False).missing_keys == ["head.weight", "head.bias"]
    expected = peer.base_model(pixel_values=images()).last_hidden_state[:, 0]
    torch.testing.assert_close(model.features(images()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"model": weights, "epoch": 3},
        lambda weights: {"state_dict": weights, "arch": "vit"},
        lambda weights: {
            "model_ema": {f"module.{name}": t for name, t in weights.items()} | {"n_averaged": torch.ones(1)}
        },
        lambda weights: {f"module.{name}": tensor for name, tensor in weights.items()},
        lambda weights: {"model": {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}},
    ],
    ids=["model", "state_dict", "model_ema", "module.", "compiled"],
)
@pytest.mark.parametrize(
    "make", [torchvision_model, timm_model, hugging_face], ids=["torchvision", "timm", "transformers"]
)
def test_wrappers_and_prefixes_change_nothing(make: Callable[[], nn.Module], wrap: Callable[[Any], Any]) -> None:
    weights = make().state_dict()
    bare, adopted = adopt(weights, None), adopt(wrap(weights), None)
    assert adopted.weights.keys() == bare.weights.keys()
    assert all(torch.equal(adopted.weights[name], tensor) for name, tensor in bare.weights.items())
    assert adopted.left_out in ([], ["n_averaged"])


def test_of_two_sets_of_weights_the_raw_one_is_used_and_the_average_is_left_out() -> None:
    raw, averaged = timm_model().state_dict(), VisionTransformer(embed_dim=WIDTH).state_dict()
    adopted = adopt({"model_ema": averaged, "model": raw, "args": None}, None)
    assert adopted.left_out == ["model_ema"]
    assert torch.equal(adopted.weights["head.weight"], raw["head.weight"])


def test_half_precision_is_converted_before_tensors_are_added() -> None:
    """A register of a thousand and a position of an eighth have a sum that bfloat16 cannot represent."""
    file = {name: tensor.bfloat16() for name, tensor in timm_model(reg_tokens=1).state_dict().items()}
    file["reg_token"].fill_(1000), file["pos_embed"].fill_(0.125)
    weights = adopt(file, None).weights
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert (weights["registers"] == 1000.125).all()


def test_every_number_of_a_file_is_used_exactly_once() -> None:
    """The elements of a file are the numbers from 0 upwards; the imported elements must be the same numbers."""
    for model in (torchvision_model(20), timm_model(init_values=1.0, qk_norm=True), hugging_face()):
        file, count = {}, 0
        for name, tensor in model.state_dict().items():
            file[name] = torch.arange(count, count + tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
            count += tensor.numel()
        numbers = torch.cat([tensor.flatten() for tensor in adopt(file, None).weights.values()])
        assert torch.equal(numbers.sort().values, torch.arange(count, dtype=torch.float64))


def test_class_names_are_used_where_the_head_has_as_many_classes_and_numbered_otherwise() -> None:
    file, numbered = timm_model().state_dict(), [f"class {i}" for i in range(CLASSES)]
    names = list("abcdefg")
    assert adopt(file, names).task_state == {"classes": names}
    assert adopt(file, names).notes == (
        f"the file does not name its {len(names)} classes; they are taken to have the order of the data's: "
        f"{', '.join(names[:3])}, ...",
    )
    assert adopt(file, None).notes[0].endswith("the order of the data's, as data.class_order sorts them")
    assert adopt(file, names[:3]).notes == (), "the head is not kept"
    assert adopt(file, None).task_state == adopt(file, names[:3]).task_state == {"classes": numbered}


def test_a_file_without_a_head_is_imported_without_one_and_without_heads_of_training_methods() -> None:
    weights = timm_model(num_classes=0).state_dict()
    adopted = adopt(
        {**weights, "head.mlp.0.weight": torch.zeros(3, WIDTH), "head.last_layer.weight_g": torch.ones(1)}, None
    )
    assert not any(name.startswith("head") for name in adopted.weights)
    assert adopted.left_out == ["head.mlp.0.weight", "head.last_layer.weight_g"] and adopted.task_state == {
        "classes": []
    }


class SevenClasses:
    """The members of a task that loading initial weights uses."""

    def __init__(self, names: list[str] | None = None):
        self.names = names or [f"mine {i}" for i in range(CLASSES)]

    def state(self) -> dict[str, Any]:
        return {"classes": self.names}

    def adopt(self, content: dict[str, Any], folder: Path) -> Adopted:
        return adopt(content, self.names)


@torch.no_grad()
def test_a_head_of_a_thousand_classes_is_re_initialised_for_seven_and_the_rest_is_loaded(tmp_path: Path) -> None:
    peer = timm_model(num_classes=1000)
    torch.save({"state_dict": peer.state_dict()}, tmp_path / "vit.pt")
    model = build_model()
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    message = assembly.load_initial_weights(model, SevenClasses(), tmp_path / "vit.pt")
    assert message.endswith("; re-initialised: head.weight, head.bias") and f": {len(initial) - 2} tensors" in message
    assert all(torch.equal(model.state_dict()[name], initial[name]) for name in ("head.weight", "head.bias"))
    expected = peer.forward_head(peer.forward_features(images()), pre_logits=True)
    torch.testing.assert_close(model.features(images()), expected, rtol=0, atol=1e-5)


def test_the_head_is_re_initialised_for_a_file_without_a_head(tmp_path: Path) -> None:
    torch.save(timm_model(num_classes=0).state_dict(), tmp_path / "vit.pt")
    message = assembly.load_initial_weights(build_model(), SevenClasses(), tmp_path / "vit.pt")
    assert message.endswith("; re-initialised: head.weight, head.bias")


def test_a_larger_grid_is_resampled_to_that_of_the_model(tmp_path: Path) -> None:
    peer = timm_model(img_size=2 * SIDE)
    torch.save(peer.state_dict(), tmp_path / "vit.pt")
    model = build_model()
    message = assembly.load_initial_weights(model, SevenClasses(list("abcdefg")), tmp_path / "vit.pt")
    first, *notes = message.splitlines()
    assert first.endswith(f": {len(model.state_dict())} tensors"), "with the same classes the head is loaded"
    assert notes[0] == (
        "note      positions of 8 x 8 patches are resampled to 4 x 4 by model.positions.resample=bicubic_antialias"
    )
    peer.set_input_size(SIDE)  # timm's own resampling: bicubic, antialiased
    torch.testing.assert_close(model.positions.grid.flatten(0, 1), peer.pos_embed[0, 1:].detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "options"),
    [(1 + 12, {}), (12, {"class_token": False, "global_pool": "avg"}), (5 + 12, {"reg_tokens": 4})],
)
def test_positions_that_are_not_square_are_refused_with_their_number(rows: int, options: dict[str, Any]) -> None:
    file = {**timm_model(**options).state_dict(), "pos_embed": torch.zeros(1, rows, WIDTH)}
    if options.get("reg_tokens"):
        file["pos_embed"] = torch.zeros(1, 5 + 13, WIDTH)
    count = file["pos_embed"].shape[1]
    with pytest.raises(UserError, match=rf"has {count} positions and .*do not leave a square grid; .*data.image_size="):
        adopt(file, None)


def with_rows(rows: int, **options: Any) -> dict[str, Tensor]:
    table = torch.arange(float(rows * WIDTH)).reshape(1, rows, WIDTH)
    return {**timm_model(**options).state_dict(), "pos_embed": table}


def test_both_kinds_of_weights_of_a_foreign_file_are_within_reach(tmp_path: Path) -> None:
    raw = timm_model().state_dict()
    averaged = {name: tensor + 1 for name, tensor in raw.items()}
    torch.save({"model": raw, "model_ema": averaged}, tmp_path / "both.pt")
    torch.save(raw, tmp_path / "one.pt")
    shape = {"width": WIDTH, "layers": LAYERS, "heads": HEADS, "feedforward": 4 * WIDTH, "patch_size": PATCH}
    options = ["model=vit", "data=imagefolder", f"data.image_size=[{SIDE},{SIDE}]"]
    options += [f"model.{key}={value}" for key, value in shape.items()]
    for kind, tensors in {"auto": raw, "raw": raw, "ema": averaged}.items():
        model, _ = assembly.load(tmp_path / "both.pt", *options, f"weights={kind}")
        assert torch.equal(model.state_dict()["head.bias"].cpu(), tensors["head.bias"])
    with pytest.raises(UserError, match=r"one\.pt: weights=ema, but .* holds no averaged weights"):
        assembly.load(tmp_path / "one.pt", *options, "weights=ema")


MEAN_POOLING = {"class_token": False, "global_pool": "avg"}


@pytest.mark.parametrize(
    ("rows", "options", "configured", "note"),
    [
        (16, MEAN_POOLING, (2, 8), "16 positions are read as 2 x 8 patches, the grid of data.image_size, .* 4 x 4 pat"),
        (25, {}, (4, 6), "25 .* as 4 x 6 patches and the class token, .* not as 5 x 5 patches without a position of"),
        (25, {}, (5, 5), None),
        (16, MEAN_POOLING, (4, 4), None),
        (17, {}, (2, 8), "17 positions are read as 2 x 8 patches and the class token, .* and not as 4 x 4 patches"),
        (13, {}, (3, 4), None),
        (25, {}, (3, 3), "read as 5 x 5 patches without a position of the class token, since .* does not fit; if the"),
        (9, {"reg_tokens": 4}, (2, 2), "read as 2 x 2 patches and 5 tokens, .* and not as 3 x 3 patches without"),
    ],
)
def test_the_configured_image_size_decides_the_grid_where_it_fits(
    rows: int, options: dict[str, Any], configured: tuple[int, int], note: str | None
) -> None:
    """Otherwise a square is read; wherever two readings are possible, a note says which was taken."""
    adopted = adopt(with_rows(rows, **options), None, (configured[0] * PATCH, configured[1] * PATCH))
    height, width = configured if configured != (3, 3) else (5, 5)
    grid = adopted.weights["positions.grid"]
    assert grid.shape == (height, width, WIDTH)
    before = rows - height * width
    assert grid[0, 0, 0] == before * WIDTH and grid[1, 0, 0] == (before + width) * WIDTH, "row by row, after the tokens"
    if note is None:
        assert not any("read as" in note for note in adopted.notes)
    else:
        assert re.search(note, adopted.notes[0])


@pytest.mark.parametrize(
    ("file", "method"),
    [
        (lambda: with_rows(17), "timm resamples positions by model.positions.resample=bicubic_antialias; DINO's and"),
        (
            lambda: {**with_rows(17, init_values=1.0), "mask_token": torch.zeros(1, WIDTH)},
            "bicubic_offset, and this looks like a file of DINOv2",
        ),
        (
            lambda: {
                ("register_tokens" if name == "reg_token" else name): tensor
                for name, tensor in with_rows(17, reg_tokens=4, init_values=1.0).items()
            },
            "models with registers by bicubic_antialias",
        ),
    ],
)
def test_a_note_names_the_resampling_of_the_program_of_the_file(
    file: Callable[[], dict[str, Tensor]], method: str
) -> None:
    assert method in adopt(file(), None, (6 * PATCH, 6 * PATCH)).notes[1]
    notes = adopt(file(), None, (4 * PATCH, 4 * PATCH)).notes
    assert not any("resample" in note or "read as" in note for note in notes)


def test_positions_with_two_possible_grids_are_refused() -> None:
    """Nine rows and five tokens: three by three without positions of tokens, or two by two with them."""
    file = {**timm_model(reg_tokens=4).state_dict(), "pos_embed": torch.zeros(1, 9, WIDTH)}
    with pytest.raises(
        UserError, match="9 positions and a class token and 4 registers, which leave more than one square"
    ):
        adopt(file, None)


def published(name: str, **changed: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **changed)


def in_transformers(kind: str, name: str, **changed: Any) -> Callable[[], nn.Module]:
    config = getattr(transformers, f"{kind}Config")
    return lambda: getattr(transformers, f"{kind}{name}")(config(**changed))


STEM = [torchvision.models.vision_transformer.ConvStemConfig(out_channels=8, kernel_size=3, stride=8)]
REFUSED: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "timm's Swin V2": ("a Swin Transformer V2", published("swinv2_tiny_window8_256")),
    "torchvision's Swin V2": ("a Swin Transformer V2", torchvision.models.swin_v2_t),
    "transformers' Swin": ("a Swin Transformer", in_transformers("Swin", "ForImageClassification")),
    "transformers' DeiT": ("a distilled DeiT", in_transformers("DeiT", "ForImageClassification")),
    "SigLIP": ("a ViT that pools by attention", published("vit_base_patch16_siglip_224")),
    "transformers' SigLIP": ("a ViT that pools by attention", in_transformers("SiglipVision", "Model")),
    "CLIP": ("a CLIP", published("vit_base_patch32_clip_224")),
    "transformers' CLIP": ("a CLIP", in_transformers("CLIPVision", "Model")),
    "SwiGLU": ("a ViT with gated", published("vit_giant_patch14_dinov2")),
    "transformers' SwiGLU": ("a ViT with gated", in_transformers("Dinov2", "Model", use_swiglu_ffn=True)),
    "SimMIM": ("a masked autoencoder with another decoder", in_transformers("ViT", "ForMaskedImageModeling")),
    "hybrid": ("a hybrid of ResNet and ViT", published("vit_small_r26_s32_224")),
    "convolutional stem": (
        "a hybrid of ResNet and ViT",
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 3, 48, 96, conv_stem_configs=STEM),
    ),
    "ResNet": ("a ResNet", torchvision.models.resnet18),
    "timm's ResNet": ("a ResNet", published("resnet18")),
    "transformers' ResNet": ("a ResNet", in_transformers("ResNet", "ForImageClassification")),
    "BEiT": ("a BEiT", published("beit_base_patch16_224")),
    "transformers' BEiT": ("a BEiT", in_transformers("Beit", "Model", use_relative_position_bias=True)),
    "relative positions": ("a BEiT", published("vit_relpos_small_patch16_224")),
    "MLP-Mixer": ("an MLP-Mixer", published("mixer_s32_224")),
    "TNT": ("a TNT", published("tnt_s_patch16_224")),
    "parallel blocks": ("something else", published("vit_small_patch16_18x2_224")),
    "norm in the attention": ("something else", lambda: timm_model(scale_attn_norm=True)),
    "a gain alone for queries": ("something else", lambda: timm_model(qk_norm=True, norm_layer="rmsnorm")),
    "DETR": (
        "a DETR",
        in_transformers("Detr", "ForObjectDetection", backbone_config=transformers.ResNetConfig()),
    ),
    "torchvision's detector": (
        "a detector of torchvision",
        lambda: torchvision.models.detection.fcos_resnet50_fpn(weights=None, weights_backbone=None),
    ),
    "translator": (
        "a language model or a translator",
        in_transformers("Marian", "MTModel", vocab_size=50, decoder_vocab_size=50, pad_token_id=0),
    ),
    "language model": ("a language model or a translator", in_transformers("GPT2", "LMHeadModel")),
    "ours": ("bare weights of this program's own", build_model),
    "anything": ("something else", lambda: nn.Linear(2, 3)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_network_is_refused_and_identified(case: str) -> None:
    what, make = REFUSED[case]
    try:
        with torch.device("meta"):
            state = make().state_dict()
    except (NotImplementedError, RuntimeError):
        state = make().state_dict()  # a constructor that computes values
    with pytest.raises(
        UserError, match=rf"is {what}.*and not a plain ViT \(it.*\); give a ViT of torchvision, timm"
    ) as caught:
        adopt({"model": state}, None)
    assert str(caught.value).count(". ") == 0 and str(caught.value).endswith("."), "one sentence"


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("patch_embed.proj.bias", "nothing for patches.bias"),
        ("pos_embed", "no learned positions"),
        ("norm.bias", "nothing for encoder.norm.bias"),
        ("blocks.1.mlp.fc2.weight", "nothing for encoder.blocks.1.feed_forward.contract.weight"),
        ("blocks.0.ls1.gamma", "nothing for encoder.blocks.0.residuals.0.scale"),
        ("blocks.0.attn.k_norm.bias", "nothing for encoder.blocks.0.attention.k_norm.bias"),
    ],
)
def test_a_file_with_a_missing_tensor_is_refused_with_its_name(name: str, missing: str) -> None:
    """For example, a file that is one of several shards."""
    file = timm_model(init_values=0.1, qk_norm=True).state_dict()
    file.pop(name)
    with pytest.raises(UserError, match=rf"something else and not a plain ViT \(it has {missing}\)"):
        adopt(file, None)


def test_a_missing_block_in_the_middle_is_noticed() -> None:
    file = {name: t for name, t in timm_model(depth=3).state_dict().items() if not name.startswith("blocks.1.")}
    with pytest.raises(UserError, match=r"it has nothing for encoder\.blocks\.1\."):
        adopt(file, None)


def test_a_bias_of_queries_alone_is_refused() -> None:
    file = hugging_face().state_dict()
    for name in [name for name in file if name.endswith(("k_proj.bias", "v_proj.bias"))]:
        file.pop(name)
    with pytest.raises(UserError, match=r"nothing for encoder\.blocks\.0\.attention\.in_proj\.bias"):
        adopt(file, None)


@pytest.mark.parametrize("content", [{}, {"model": None}, {"epoch": 3}, {"student": {"a": torch.zeros(1)}}], ids=str)
def test_a_file_without_weights_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"holds no weights, bare or under .*; give a ViT of torchvision"):
        adopt(content, None)


def test_each_layout_is_recognised() -> None:
    builders = {"torchvision": torchvision_model, "timm": timm_model, "transformers": hugging_face}
    assert [recognise(unwrap({"model": make().state_dict()})[0]) for make in builders.values()] == [*builders]
