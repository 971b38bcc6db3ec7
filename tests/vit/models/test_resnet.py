"""The ResNet classifier against torchvision's in float64, in training and evaluation mode."""

from typing import Any

import pytest
import torch
import torchvision
from foreign_files import randomised_resnet as randomised
from torch import Tensor

from common.config import check as config
from common.config import compose
from common.errors import UserError
from common.machine.seeds import generator
from common.train import optim
from common.train.optim import OptimizerOptions
from vit.models.resnet import ResNet

EXACT = {"rtol": 1e-10, "atol": 1e-10}  # float64, up to 53 convolutions
CLASSES = 5
COUNTS = {"resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032}  # torchvision's documentation
SMALL: dict[str, Any] = {
    **{"classes": CLASSES, "channels": 1, "image_size": (8, 12), "stem": "small", "block": "basic"},
    **{"blocks": [1, 2], "widths": [8, 16], "norm": "group"},
}


def preset(name: str, *keys: str, classes: int = CLASSES, size: int = 48) -> ResNet:
    section = compose.configure("train", [f"model={name}", *keys])["model"]
    model = config.build(section, classes=classes, channels=3, image_size=(size, size))
    assert isinstance(model, ResNet)
    return model


def small(**keys: Any) -> ResNet:
    torch.manual_seed(0)
    return ResNet(**{**SMALL, **keys})


def images(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=generator("images", *shape))


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("fc.", "head.") if name.startswith("fc.") else name: t for name, t in tensors.items()}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", COUNTS)
def test_logits_gradients_and_statistics_are_torchvisions(name: str, training: bool) -> None:
    """At a size that strides do not divide, with a batch whose statistics differ from the stored ones."""
    theirs = randomised(getattr(torchvision.models, name)(num_classes=CLASSES).double()).train(training)
    ours = preset(name).double().train(training)
    ours.load_state_dict(renamed(theirs.state_dict()))
    pixels = images(3, 3, 45, 52)
    direction = images(3, CLASSES)
    results = []
    for model in (ours, theirs):
        leaf = pixels.clone().requires_grad_()
        logits = model(leaf)
        logits.backward(direction)
        gradients = {n: p.grad for n, p in model.named_parameters()}
        results.append((logits.detach(), leaf.grad, gradients, model.state_dict()))
    (logits, of_pixels, gradients, state), (expected, of_their_pixels, their_gradients, their_state) = results
    torch.testing.assert_close(logits, expected, **EXACT)
    torch.testing.assert_close(of_pixels, of_their_pixels, **EXACT)
    for key, gradient in renamed(their_gradients).items():
        torch.testing.assert_close(gradients[key], gradient, **EXACT)
        assert gradient.any()
    for key, value in renamed(their_state).items():
        torch.testing.assert_close(state[key], value, **EXACT)


def test_logits_in_fp32_are_torchvisions() -> None:
    theirs = randomised(torchvision.models.resnet18(num_classes=CLASSES)).eval()
    ours = preset("resnet18").eval()
    ours.load_state_dict(renamed(theirs.state_dict()))
    pixels = images(2, 3, 64, 64, dtype=torch.float32)
    with torch.no_grad():
        logits, expected = ours(pixels), theirs(pixels)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max(), "fp32 rounds to 1e-7, in 20 layers"


@pytest.mark.parametrize("name", COUNTS)
def test_a_preset_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = preset(name, classes=1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name]


def test_the_small_cnn_has_three_basic_blocks_and_308_thousand_parameters() -> None:
    """3x3 convolutions, shortcuts of the last two blocks, pairs of a scale and a shift, and the head."""
    convolutions = 9 * (3 * 32 + 2 * 32 * 32 + 32 * 64 + 64 * 64 + 64 * 128 + 128 * 128) + 32 * 64 + 64 * 128
    norms = 2 * (3 * 32 + 3 * 64 + 3 * 128)
    model = preset("cnn", classes=10)
    assert sum(p.numel() for p in model.parameters()) == convolutions + norms + 128 * 10 + 10
    assert (model.conv1.stride, model.stride) == ((1, 1), 4) and model.grid(28, 8) == (7, 2)


@torch.no_grad()
def test_a_group_norm_is_that_of_each_image_alone() -> None:
    model = randomised(small()).double().train()
    pixels = images(3, 1, 8, 12)
    alone = torch.cat([model(pixels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(pixels), alone, **EXACT)


@torch.no_grad()
def test_features_are_the_mean_of_the_last_map_and_the_input_of_the_head() -> None:
    model, maps = randomised(small()).double(), []
    model.layer2[-1].register_forward_hook(lambda module, inputs, output: maps.append(output))
    pixels = images(2, 1, 9, 14)
    features = model.features(pixels)
    assert maps[0].shape == (2, 16, *model.grid(9, 14)) == (2, 16, 5, 7)
    torch.testing.assert_close(features, maps[0].flatten(2).sum(2) / 35, **EXACT)
    torch.testing.assert_close(model(pixels), features @ model.head.weight.T + model.head.bias, **EXACT)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_step_in_bf16_gives_finite_gradients_of_all_parameters(norm: str) -> None:
    model = small(norm=norm).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images(4, 1, 8, 12, dtype=torch.float32))
    assert logits.dtype == torch.float32
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_a_single_value_for_each_channel_of_a_batch_norm_is_refused() -> None:
    model = small(norm="batch", stem="large").train()
    assert model.grid(8, 8) == (1, 1)
    with pytest.raises(UserError, match=r"single image of 8 x 8 pixels, .* give trainer\.micro_batch of 2 or more"):
        model(images(1, 1, 8, 8, dtype=torch.float32))
    model(images(2, 1, 8, 8, dtype=torch.float32))
    model.eval()(images(1, 1, 8, 8, dtype=torch.float32))
    small(stem="large").train()(images(1, 1, 8, 8, dtype=torch.float32))


def test_stages_without_blocks_or_widths_are_refused() -> None:
    for blocks, widths in (([1, 1], [8]), ([], [])):
        with pytest.raises(UserError, match=r"^model\.blocks=.* must have one number for each stage\.$"):
            small(blocks=blocks, widths=widths)


def test_the_large_stem_is_warned_of_for_small_images_only() -> None:
    assert small().input_advice() == [] == small(stem="large", image_size=(64, 96)).input_advice()
    (advice,) = small(stem="large", image_size=(32, 96)).input_advice()
    assert "32 x 96 pixels" in advice and "model.stem=small" in advice
    assert small().input_summary() == ["the head reads the mean of 4 x 6 positions, with a stride of 2 pixels"]


def test_every_parameter_is_in_one_layer_and_the_rate_grows_from_stem_to_head() -> None:
    model = small()
    section = compose.configure("train", ["model=cnn", "optimizer.layer_decay=0.5"])["optimizer"]
    groups = optim.build(model, config.construct(OptimizerOptions, section)).param_groups
    depth = {name: round(-torch.log2(torch.tensor(g["lr"] / section["lr"])).item()) for g in groups
             for name in g["param_names"]}  # fmt: skip
    assert len(depth) == len([*model.parameters()])
    expected = {"head.bias": 0, "layer2.1.conv1.weight": 1, "layer2.0.downsample.1.bias": 2, "layer1.0.bn2.weight": 3}
    assert {name: depth[name] for name in expected} == expected and depth["conv1.weight"] == depth["bn1.bias"] == 4
    decayed = {name for g in groups if g["weight_decay"] for name in g["param_names"]}
    assert decayed == {name for name, p in model.named_parameters() if p.ndim > 1}
