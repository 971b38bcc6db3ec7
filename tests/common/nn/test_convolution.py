"""The CPU's fused convolutions against torch's own, in both types, and what they may overwrite."""

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
    """A convolution, a norm that does something, a map, a shortcut and what is real, at random."""
    drawn = generator("convolution", kind)
    inputs, outputs, *_ = KINDS[kind]
    conv, norm = convolution(*KINDS[kind]), FrozenBatchNorm(outputs)
    with torch.no_grad():
        for tensor in norm.buffers():
            tensor.uniform_(0.5, 1.5, generator=drawn)
    x = torch.randn(2, inputs, 33, 21, generator=drawn).contiguous(memory_format=torch.channels_last)
    shape = conv(x).shape
    shortcut = torch.randn(shape, generator=drawn).contiguous(memory_format=torch.channels_last)
    return conv, norm, x, shortcut, torch.rand(shape[0], 1, *shape[2:], generator=drawn) < 0.8


def formula(conv: nn.Conv2d, norm: FrozenBatchNorm, x: Tensor, shortcut: Tensor | None, real: Tensor | None) -> Tensor:
    """The same in float64, from the definitions."""
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
    given = shortcut if with_shortcut else None, real if with_real else None
    with torch.no_grad():
        expected, before = formula(conv, norm, x, *given), x.clone()
        for again in range(2):  # the second time from packed weights that were kept
            now = conv_norm_relu(conv, norm, x, shortcut=shortcut.clone() if with_shortcut else None, real=given[1])
            torch.testing.assert_close(now.double(), expected, rtol=0, atol=2e-5, msg=f"time {again}")
        with torch.autocast("cpu", torch.bfloat16):
            half = conv_norm_relu(conv, norm, x, shortcut=shortcut.bfloat16() if with_shortcut else None, real=given[1])
        assert half.dtype == torch.bfloat16
        assert (half - expected).norm() < 0.01 * expected.norm()  # bf16 keeps 8 bits
        assert torch.equal(x, before)


def test_only_where_no_gradient_is_wanted_is_the_kernel_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, norm, x, shortcut, _ = parts("3x3")
    asked = []
    fused = kernels.convolution_relu
    monkeypatch.setattr(kernels, "convolution_relu", lambda *given: asked.append(1) or fused(*given))
    conv_norm_relu(conv, norm, x).sum().backward()
    assert not asked and conv.weight.grad is not None
    conv.requires_grad_(False)
    conv_norm_relu(conv, norm, x.clone().requires_grad_())
    conv_norm_relu(conv, norm, x, shortcut=shortcut.clone().requires_grad_() * 1)
    assert not asked
    conv_norm_relu(conv, norm, x, shortcut=shortcut.clone())
    assert len(asked) == 1, "a frozen layer on an image"
    with torch.backends.mkldnn.flags(enabled=False), torch.no_grad():
        conv_norm_relu(conv, norm, x)
    conv_norm_relu(conv.double(), norm.double(), x.double())
    assert len(asked) == 1


def test_gradients_flow_through_frozen_layers_into_those_that_learn() -> None:
    """A frozen block may overwrite its input, which the next, learning one must not have saved by then."""
    torch.manual_seed(0)
    options = BackboneOptions(name="resnet18", weights="none", dilation=False, frozen=2)
    model = Backbone(options, official_padding=False)
    images = torch.randn(1, 3, 64, 64)
    model(images, None)[0].square().sum().backward()
    fused = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    with torch.backends.mkldnn.flags(enabled=False):
        model(images, None)[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert (parameter.grad - fused[name]).norm() <= 1e-5 * parameter.grad.norm(), name


@pytest.mark.parametrize("kind", ["1x1", "3x3"])
def test_what_inference_kept_stands_in_the_way_of_no_gradient_and_of_no_copy(kind: str) -> None:
    conv, norm, x, _, _ = parts(kind)
    conv.requires_grad_(False)
    with torch.inference_mode():
        conv_norm_relu(conv, norm, x)
        convolutions.conv_norm(conv, norm, x)
    wanted = x.clone().requires_grad_()
    convolutions.conv_norm(conv, norm, wanted).sum().backward()
    assert wanted.grad is not None
    with torch.inference_mode():
        expected = conv_norm_relu(conv, norm, x)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(conv_norm_relu(conv, other, x), expected)


@pytest.mark.parametrize("kind", ["1x1", "3x3"])
def test_a_weight_and_a_statistic_changed_through_data_are_seen(kind: str) -> None:
    conv, norm, x, _, _ = parts(kind)
    with torch.no_grad():
        conv_norm_relu(conv, norm, x)
        for tensor in (conv.weight, *norm.buffers()):
            tensor.data.mul_(1.5)
            torch.testing.assert_close(
                conv_norm_relu(conv, norm, x).double(), formula(conv, norm, x, None, None), rtol=1e-5, atol=1e-4
            )
