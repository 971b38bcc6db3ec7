"""The classifier with a distillation token against timm's distilled DeiT in float64, and published numbers."""

from typing import Any

import pytest
import torch
from parity import assert_same_gradients, gradients, images, randomised
from torch import Tensor, nn

from common.config import check as config
from common.config import compose
from common.errors import UserError
from vit.models.classifier import Classifier, PositionOptions, VitBlockOptions

timm_deit = pytest.importorskip("timm.models.deit")

EXACT = {"rtol": 0, "atol": 1e-10}  # float64, a few blocks with values of about a hundred
WIDTH, HEADS, LAYERS, HIDDEN, CLASSES, PATCH = 24, 3, 3, 40, 5, 4
BLOCKS: dict[str, Any] = {
    **{"dropout": 0.0, "attention_dropout": 0.0, "drop_path": 0.0, "layer_scale": None, "qk_norm": False},
    **{"norm_eps": 1e-6, "activation": "gelu"},
}
WORDS = {
    "patch_embed.proj": "patches",
    "blocks.": "encoder.blocks.",
    "norm1": "residuals.0.norm",
    "norm2": "residuals.1.norm",
    "attn.qkv": "attention.in_proj",
    "attn.proj": "attention.out_proj",
    "mlp.fc1": "feed_forward.expand",
    "mlp.fc2": "feed_forward.contract",
    "head_dist": "distillation_head",
}
COUNTS = {  # timm's deit_tiny|small|base_distilled_patch16_224
    "deit_ti_distilled": 5_910_800,
    "deit_s_distilled": 22_436_432,
    "deit_b_distilled": 87_338_192,
}


def classifier(*, on_token: bool = True, **keys: Any) -> Classifier:
    shape = {"classes": CLASSES, "channels": 3, "image_size": (16, 24), "patch_size": PATCH, "embedding": "convolution"}
    shape |= {"width": WIDTH, "heads": HEADS, "layers": LAYERS, "feedforward": HIDDEN, "pooling": "token"}
    shape |= {"registers": 0, "representation": None, "distillation_token": True, **keys}
    positions = PositionOptions(resample="bicubic_antialias", on_token=on_token)
    return Classifier(**shape, positions=positions, blocks=VitBlockOptions(**BLOCKS)).double()


def timms(**keys: Any) -> Any:
    """timm's model in float64 with all parameters redrawn."""
    shape = {"img_size": (16, 24), "patch_size": PATCH, "embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS}
    model = timm_deit.VisionTransformerDistilled(**shape, mlp_ratio=HIDDEN / WIDTH, num_classes=CLASSES, **keys)
    return randomised(model.double())


def renamed(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's tensors by our names; written without the project's importer."""
    ours = {"class_token": theirs["cls_token"].flatten(), "distillation_token": theirs["dist_token"].flatten()}
    table = theirs["pos_embed"][0]
    if len(table) == 2 + 24:
        ours |= {"positions.token": table[0], "distillation_position": table[1]}
    ours["positions.grid"] = table[-24:].unflatten(0, (4, 6))
    for name, tensor in theirs.items():
        if name in ("cls_token", "dist_token", "pos_embed"):
            continue
        for old, new in WORDS.items():
            name = name.replace(old, new)
        ours[f"encoder.{name}" if name.startswith("norm.") else name] = tensor
    return ours


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("on_token", [True, False], ids=["positions on tokens", "no positions on tokens"])
def test_logits_and_gradients_are_timms(training: bool, on_token: bool) -> None:
    """In training, those of both heads; in evaluation, their mean."""
    theirs, ours = timms(no_embed_class=not on_token), classifier(on_token=on_token)
    if not on_token:  # timm's table has two rows too many then
        theirs.pos_embed = nn.Parameter(theirs.pos_embed.detach()[:, 2:])
    theirs.set_distilled_training(True)
    ours.load_state_dict(renamed(dict(theirs.named_parameters())))
    pixels = images(16, 24).requires_grad_()
    outputs, expected = ours.train(training)(pixels), theirs.train(training)(pixels)
    if not training:
        outputs, expected = (outputs,), (expected,)
    assert isinstance(outputs, tuple) and len(outputs) == len(expected) == (2 if training else 1)
    for logits, their_logits in zip(outputs, expected, strict=True):
        assert logits.shape == (2, CLASSES)
        torch.testing.assert_close(logits, their_logits, **EXACT)
    of_pixels, by_name = gradients(outputs, pixels, ours)
    their_pixels, theirs_by_name = gradients(expected, pixels, theirs)
    torch.testing.assert_close(of_pixels, their_pixels, **EXACT)
    assert_same_gradients(by_name, renamed(theirs_by_name), **EXACT)


@torch.no_grad()
def test_evaluation_gives_the_mean_of_the_logits_of_training() -> None:
    model = classifier()
    model.load_state_dict(renamed(dict(timms().named_parameters())))
    both, mean = model.train()(images(16, 24)), model.eval()(images(16, 24))
    torch.testing.assert_close(mean, (both[0] + both[1]) / 2, **EXACT)
    assert (both[0] - both[1]).abs().max() > 0.1


@pytest.mark.parametrize("name", COUNTS)
def test_a_preset_has_the_published_number_of_parameters(name: str) -> None:
    configured = compose.configure("train", [f"model={name}"])
    with torch.device("meta"):
        model = config.build(configured["model"], classes=1000, channels=3, image_size=(224, 224))
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name]


@pytest.mark.parametrize("pooling", ["mean", "mean_then_norm"])
def test_a_distillation_token_needs_a_class_token(pooling: str) -> None:
    with pytest.raises(UserError, match=rf"needs a class token, and model\.pooling={pooling} has none"):
        classifier(pooling=pooling)


def test_tokens_are_class_distillation_registers_and_patches() -> None:
    model = classifier(registers=2)
    assert (model.before_patches, model.tokens) == (4, 4 + 24)
    tokens = model.embed(images(16, 24))
    assert tokens.shape == (2, 28, WIDTH)
    expected = [model.class_token + model.positions.token, model.distillation_token + model.distillation_position]
    torch.testing.assert_close(tokens[1, :4], torch.stack([*expected, *model.registers]), **EXACT)


def test_every_parameter_has_a_layer_and_only_matrices_decay() -> None:
    model = classifier(registers=2)
    prefixes = [prefix for layer in model.layers() for prefix in layer]
    for name, parameter in model.named_parameters():
        assert sum(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes) == 1, name
        if name.startswith(("distillation_token", "distillation_position")):
            assert parameter.ndim == 1, "vectors have no weight decay"


def test_both_heads_start_at_zero_and_the_tokens_differ() -> None:
    torch.manual_seed(0)
    model = classifier(on_token=False)
    assert model.head.weight.abs().sum() == model.distillation_head.weight.abs().sum() == 0
    assert not torch.equal(model.class_token, model.distillation_token)
