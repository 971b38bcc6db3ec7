"""Observed ranges, and models with quantised maps against the same models in fp32."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from common.machine import device as devices
from common.machine.seeds import generator
from common.nn import int8, quantisation
from common.nn.blocks import BlockOptions, Memory, Stack
from common.nn.int8 import Int8Convolution, Int8Linear, Int8Projections
from common.nn.linear import Linear
from common.nn.observing import observing
from common.nn.quantisation import quantise, range_names
from common.nn.resnet import BackboneOptions, PyramidBackbone

pytestmark = pytest.mark.skipif(int8.unsupported() is not None, reason="this machine cannot compute in int8")
CPU = torch.device("cpu")


def perturbed(model: nn.Module) -> nn.Module:
    """Perturb every tensor at random, including norms, biases and tensors initialised with zeros."""
    rng = generator("quantisation")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=rng)
            elif tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=rng) * (0.02 if tensor.dim() > 1 else 0.2))
    return model.eval()


def detector() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model = build(configure("train", ["model=detr"])["model"], classes=5)
    images = torch.randn(3, 3, 64, 64, generator=generator("images"))
    images[1, :, 40:] = 0
    return model, [images, torch.tensor([[64, 64], [40, 64], [64, 64]])]


def classifier() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model = build(configure("train", ["model=vit"])["model"], classes=10, channels=1, image_size=(8, 8))
    return model, [torch.randn(16, 1, 8, 8, generator=generator("images"))]


def text_model(name: str) -> Callable[[], tuple[nn.Module, list[Any]]]:
    def make() -> tuple[nn.Module, list[Any]]:
        torch.manual_seed(0)
        model = build(configure("train", [f"model={name}"])["model"], vocabularies=(50, 50), joint=True)
        source, target = (torch.randint(4, 50, (8, n), generator=generator("text", n)) for n in (9, 7))
        return model, [source, torch.tensor([9, 9, 5, 9, 1, 2, 9, 9]), target]

    return make


def windows() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model = build(configure("train", ["model=swin"])["model"], classes=10, channels=1, image_size=(8, 8))
    return model, [torch.randn(4, 1, 8, 8, generator=generator("images"))]


MODELS = {
    "detr": detector,
    "vit": classifier,
    "seq2seq": text_model("seq2seq"),
    "gpt_translator": text_model("gpt_translator"),
    "swin": windows,
}


def outputs(model: nn.Module, inputs: list[Any], precision: str = "fp32") -> Tensor:
    with torch.inference_mode(), devices.autocast(CPU, precision):
        y = model(*inputs)
    return (y[-1]["logits"] if isinstance(y, list) else y).float()


@pytest.mark.parametrize("name", MODELS)
def test_quantised_models_agree_with_fp32(name: str) -> None:
    """One rounding to 8 bits is 0.2 % of a range off, all layers together 3 % of the norm; a wrong scale is more."""
    model, inputs = MODELS[name]()
    expected = outputs(perturbed(model), inputs)
    with observing(model) as ranges:
        assert torch.equal(outputs(model, inputs), expected), "observing changes nothing"
    assert ranges.keys() == {*range_names(model)}
    assert torch.equal(outputs(model, inputs), expected), "nothing remains of the observers"
    assert quantise(model, ranges) == sum(
        isinstance(module, Int8Linear | Int8Projections | Int8Convolution) for module in model.modules()
    )
    for precision in ("fp32", "int8"):
        y = outputs(model, inputs, precision)
        error = (y - expected).norm() / expected.norm()
        assert 0 < error < 0.05, (precision, error)


def test_observed_ranges_are_the_lowest_and_highest_inputs_of_each_map() -> None:
    options = BlockOptions(width=8, heads=2, feedforward=12, pre_norm=True)
    torch.manual_seed(0)
    model = Stack(options, layers=1, final_norm=True, cross=True).eval()
    memory = torch.randn(2, 5, 8)
    with torch.no_grad(), observing(model) as ranges:
        for x in (torch.randn(2, 3, 8), torch.randn(2, 4, 8) * 3):
            model(x, memory=Memory(memory + 7, memory))
        hidden = model.blocks[0].feed_forward.expand(model.blocks[0].residuals[2].norm(x))
    names = ["attention.in_proj", "attention.out_proj", "cross_attention.in_proj", "cross_attention.out_proj"]
    letters = [f"{name}.{letter}" for name in (names[0], names[2]) for letter in "qkv"]
    expected = {*letters, names[1], names[3], "feed_forward.expand", "feed_forward.contract"}
    assert {*ranges} == {f"blocks.0.{name}" for name in expected} == {*range_names(model)}
    cross = "blocks.0.cross_attention.in_proj"
    assert ranges[f"{cross}.v"] == pytest.approx((memory.min().item(), memory.max().item()))
    assert ranges[f"{cross}.k"] == pytest.approx((memory.min().item() + 7, memory.max().item() + 7))
    assert ranges["blocks.0.feed_forward.contract"][0] == 0 and hidden.min() < 0, "the input of contract is after ReLU"
    own = [ranges[f"blocks.0.attention.in_proj.{letter}"] for letter in "qkv"]
    assert own[0] == own[1] == own[2] != ranges[f"{cross}.q"]


def backbone() -> tuple[PyramidBackbone, Tensor, Tensor]:
    torch.manual_seed(0)
    options = BackboneOptions(name="resnet50", weights="none", dilation=False, frozen=0)
    model = perturbed(PyramidBackbone(options, official_padding=False, count=2))
    images = torch.randn(2, 3, 64, 96, generator=generator("images"))
    sizes = torch.tensor([[64, 96], [40, 70]])
    images[1, :, 40:] = 0
    images[1, :, :, 70:] = 0
    assert isinstance(model, PyramidBackbone)
    return model, images, sizes


def test_quantised_features_do_not_depend_on_padding_and_other_images() -> None:
    """Bit by bit, because all sums are of integers."""
    model, images, sizes = backbone()
    with torch.inference_mode():
        plain = model(images, sizes)
        with observing(model) as ranges:
            model(images, sizes)
        assert quantise(model, ranges) == 53
        both = model(images, sizes)
        (first, second), (low, high) = model(images[:1], sizes[:1]), model(images[1:, :, :40, :70], None)
    for whole, expected, alone, cropped in zip(both, plain, (first, second), (low, high), strict=True):
        assert torch.equal(whole.features[:1], alone.features)
        rows, columns = cropped.features.shape[2:]
        assert torch.equal(whole.features[1:, :, :rows, :columns], cropped.features)
        assert torch.equal(whole.real, expected.real)
        error = (whole.features - expected.features).norm() / expected.features.norm()
        assert 0 < error < 0.05


def test_maps_outside_attentions_feed_forwards_and_backbones_stay_in_floats() -> None:
    model, inputs = detector()
    with observing(perturbed(model)) as ranges:
        outputs(model, inputs)
    quantise(model, ranges)
    parts = {name: type(module).__name__ for name, module in model.named_modules()}
    quantised = {name for name, kind in parts.items() if kind.startswith("Int8")}
    assert {name.split(".")[0] for name in quantised} == {"backbone", "encoder"}
    floats = {name for name, kind in parts.items() if kind in ("Linear", "Projections", "Conv2d")}
    assert {"class_head", "project", "decoder.blocks.0.attention.in_proj", "box_head.4"} <= floats
    assert not [name for name in floats if name.startswith(("backbone.", "encoder."))]


def test_quantised_logits_of_a_translator_are_not_rounded_to_bf16() -> None:
    model, inputs = text_model("seq2seq")()
    with observing(model) as ranges:
        outputs(model, inputs)
    quantise(model, ranges)
    with torch.inference_mode(), devices.autocast(CPU, "bf16"):
        assert model(*inputs).dtype == torch.float32


def test_maps_without_a_range_stay_in_floats() -> None:
    model, inputs = classifier()
    expected = outputs(perturbed(model), inputs)
    with observing(model) as ranges:
        outputs(model, inputs)
    block, kept = model.encoder.blocks[0], model.encoder.blocks[0].feed_forward.expand
    del ranges["encoder.blocks.0.feed_forward.expand"], ranges["encoder.blocks.0.attention.in_proj.k"]
    assert quantise(model, ranges) == 4 * len(model.encoder.blocks) - 2
    assert block.feed_forward.expand is kept and isinstance(block.feed_forward.contract, Int8Linear)
    assert isinstance(block.attention.in_proj, Linear) and isinstance(block.attention.out_proj, Int8Linear)
    assert (outputs(model, inputs) - expected).norm() < 0.06 * expected.norm()


def test_an_input_beyond_the_calibrated_range_is_clamped() -> None:
    model, (images,) = classifier()
    with observing(perturbed(model)) as ranges:
        outputs(model, [images])
    quantise(model, ranges)
    assert outputs(model, [images * 1e6]).isfinite().all()


def test_what_cannot_be_quantised_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = classifier()
    with pytest.raises(
        UserError, match=r"is of another model, which has encoder\.blocks\.9\.feed_forward\.expand; cal"
    ):
        quantise(model, {"encoder.blocks.9.feed_forward.expand": (0.0, 1.0)})
    with pytest.raises(UserError, match=r"^trainer\.precision=int8 is for CPUs, and the device is cuda; give trainer"):
        quantisation.refuse_unsupported(torch.device("cuda"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    with pytest.raises(UserError, match=r"^trainer\.precision=int8, but this CPU lacks instructions for int8 \(VNNI"):
        quantise(model, {})
    monkeypatch.setattr(int8, "_OPERATORS", ("qlinear_of_the_future",))
    with pytest.raises(
        UserError, match=r"^trainer\.precision=int8, but this PyTorch lacks oneDNN's int8 operators; use"
    ):
        quantise(model, {})
