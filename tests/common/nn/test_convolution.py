"""The CPU's fused convolutions against the definitions, in fp32 and bf16, and which inputs they overwrite."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from common.machine.seeds import generator
from common.nn import convolution as convolutions
from common.nn import kernels
from common.nn.convolution import FrozenBatchNorm, conv_norm_relu, convolution
from common.nn.resnet import Backbone, BackboneOptions

pytestmark = pytest.mark.skipif(kernels._CONVOLUTION is None, reason="this PyTorch has no oneDNN")
KINDS = {
    "1x1": (8, 16, 1),
    "3x3": (16, 16, 3),
    "3x3, stride 2": (16, 24, 3, 2),
    "dilated": (16, 16, 3, 1, 2),
    "stem": (3, 8, 7, 2),
}


def parts(kind: str) -> tuple[nn.Conv2d, FrozenBatchNorm, Tensor, Tensor, Tensor]:
    """A convolution, a norm, a map, a shortcut and a mask of real positions, all random."""
    rng = generator("convolution", kind)
    inputs, outputs, *_ = KINDS[kind]
    conv, norm = convolution(*KINDS[kind]), FrozenBatchNorm(outputs)
    with torch.no_grad():
        for tensor in norm.buffers():
            tensor.uniform_(0.5, 1.5, generator=rng)
    x = torch.randn(2, inputs, 33, 21, generator=rng).contiguous(memory_format=torch.channels_last)
    shape = conv(x).shape
    shortcut = torch.randn(shape, generator=rng).contiguous(memory_format=torch.channels_last)
    return conv, norm, x, shortcut, torch.rand(shape[0], 1, *shape[2:], generator=rng) < 0.8


def formula(conv: nn.Conv2d, norm: FrozenBatchNorm, x: Tensor, shortcut: Tensor | None, real: Tensor | None) -> Tensor:
    """conv_norm_relu in float64, from the definitions."""
    y = nn.functional.conv2d(x.double(), conv.weight.double(), None, conv.stride, conv.padding, conv.dilation)
    columns = [
        tensor.double()[:, None, None] for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    ]
    weight, bias, mean, variance = columns
    y = (y - mean) / (variance + 1e-5).sqrt() * weight + bias
    y = (y if shortcut is None else y + shortcut).relu()
    return y if real is None else y * real


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize("with_real", [False, True])
def test_the_fused_kernel_computes_what_the_definitions_say(kind: str, with_shortcut: bool, with_real: bool) -> None:
    conv, norm, x, shortcut, real = parts(kind)
    real = real if with_real else None
    with torch.no_grad():
        expected, before = formula(conv, norm, x, shortcut if with_shortcut else None, real), x.clone()
        for call in range(2):  # the second call uses cached packed weights
            y = conv_norm_relu(conv, norm, x, shortcut=shortcut.clone() if with_shortcut else None, real=real)
            torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-5, msg=f"call {call}")
        with torch.autocast("cpu", torch.bfloat16):
            half = conv_norm_relu(conv, norm, x, shortcut=shortcut.bfloat16() if with_shortcut else None, real=real)
        assert half.dtype == torch.bfloat16
        assert (half - expected).norm() < 0.01 * expected.norm()  # bf16 has 8 bits
        assert torch.equal(x, before)


def test_a_weight_is_packed_once_for_maps_of_similar_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN repacks a weight in each call if the layout is that of maps of another size."""
    conv, norm, *_ = parts("3x3")
    pack, shapes = kernels.pack_convolution, []
    monkeypatch.setattr(
        kernels, "pack_convolution", lambda weight, conv, x: shapes.append([*x.shape]) or pack(weight, conv, x)
    )
    for size in [(33, 21), (2, 3), (30, 30), (2, 1), (16, 32)]:
        x = torch.randn(1, 16, *size).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            y = conv_norm_relu(conv, norm, x)
        torch.testing.assert_close(y.double(), formula(conv, norm, x, None, None), rtol=0, atol=2e-5)
    assert shapes == [[1, 16, 33, 21], [1, 16, 2, 3], [1, 16, 2, 1]]


def test_the_fused_kernel_runs_only_where_no_gradient_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, norm, x, shortcut, _ = parts("3x3")
    calls = []
    fused = kernels.convolution_relu
    monkeypatch.setattr(kernels, "convolution_relu", lambda *arguments: calls.append(1) or fused(*arguments))
    conv_norm_relu(conv, norm, x).sum().backward()
    assert not calls and conv.weight.grad is not None
    conv.requires_grad_(False)
    conv_norm_relu(conv, norm, x.clone().requires_grad_())
    conv_norm_relu(conv, norm, x, shortcut=shortcut.clone().requires_grad_() * 1)
    assert not calls
    conv_norm_relu(conv, norm, x, shortcut=shortcut.clone())
    assert len(calls) == 1, "a frozen layer on an image"
    with torch.backends.mkldnn.flags(enabled=False), torch.no_grad():
        conv_norm_relu(conv, norm, x)
    conv_norm_relu(conv.double(), norm.double(), x.double())
    assert len(calls) == 1


def test_gradients_of_trained_layers_are_right_after_frozen_ones() -> None:
    """A frozen block may overwrite its input, but not a tensor that a trained block has saved for its gradients."""
    torch.manual_seed(0)
    options = BackboneOptions(name="resnet18", weights="none", dilation=False, frozen=2)
    model = Backbone(options, official_padding=False)
    images = torch.randn(1, 3, 64, 64)
    model(images, None)[0].square().sum().backward()
    fused_gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    with torch.backends.mkldnn.flags(enabled=False):
        model(images, None)[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert (parameter.grad - fused_gradients[name]).norm() <= 1e-5 * parameter.grad.norm(), name


@pytest.mark.parametrize("kind", ["1x1", "3x3"])
def test_weights_cached_in_inference_mode_do_not_prevent_gradients_or_copies(kind: str) -> None:
    conv, norm, x, _, _ = parts(kind)
    conv.requires_grad_(False)
    with torch.inference_mode():
        conv_norm_relu(conv, norm, x)
        convolutions.conv_norm(conv, norm, x)
    leaf = x.clone().requires_grad_()
    convolutions.conv_norm(conv, norm, leaf).sum().backward()
    assert leaf.grad is not None
    with torch.inference_mode():
        expected = conv_norm_relu(conv, norm, x)
    for copied in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(conv_norm_relu(conv, copied, x), expected)


@pytest.mark.parametrize("kind", ["1x1", "3x3"])
def test_changes_of_weights_and_statistics_through_data_take_effect(kind: str) -> None:
    conv, norm, x, _, _ = parts(kind)
    with torch.no_grad():
        conv_norm_relu(conv, norm, x)
        for tensor in (conv.weight, *norm.buffers()):
            tensor.data.mul_(1.5)
            torch.testing.assert_close(
                conv_norm_relu(conv, norm, x).double(), formula(conv, norm, x, None, None), rtol=1e-5, atol=1e-4
            )
