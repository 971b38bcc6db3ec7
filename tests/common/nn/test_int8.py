"""oneDNN's int8 operators against plain fp64 computations with the quantised values."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.machine.seeds import generator
from common.nn import int8, kernels
from common.nn.blocks import BlockOptions, Residual
from common.nn.convolution import FrozenBatchNorm, conv_norm, conv_norm_relu, convolution
from common.nn.int8 import (
    Int8Convolution,
    Int8Linear,
    Int8MaxPool,
    Int8Projections,
    Int8Residual,
    Quantisation,
    quantisation,
)
from common.nn.linear import Linear, Projections

pytestmark = pytest.mark.skipif(int8.unsupported() is not None, reason="this machine cannot compute in int8")
ACTIVATIONS = {
    "none": nn.Identity(),
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "swish": nn.SiLU(),
}


def numbers(x: Tensor, to: Quantisation) -> Tensor:
    """The numbers that the integers stand for, in fp64.

    The integers are those of `quantise_tensor`, which is tested by itself: it computes in fp32, and a number in the
    middle of two integers may be rounded to the other one than in fp64.
    """
    return (int8.quantise_tensor(x, to).double() - to.zero_point) * to.scale


def rounded_weight(weight: Tensor) -> Tensor:
    """A weight rounded to 255 levels for each output channel, in fp64.

    The levels are chosen in fp32: in fp64, a weight in the middle of two levels might be rounded to the other one.
    """
    weight = weight.detach()
    scales = (weight.flatten(1).abs().amax(1) / 127).view(-1, *[1] * (weight.ndim - 1))
    return (weight / scales).round().double() * scales.double()


def layer_and_input(*shape: int, outputs: int = 20) -> tuple[Linear, Tensor]:
    torch.manual_seed(0)
    return Linear(shape[-1], outputs), torch.randn(shape, generator=generator("int8", *shape)) * 2 + 0.5


@pytest.mark.parametrize("shape", [(48,), (1, 48), (5, 48), (2, 5, 48), (0, 48), (40, 512)])
def test_a_linear_map_is_exact_up_to_the_rounding_of_its_output(shape: tuple[int, ...]) -> None:
    layer, x = layer_and_input(*shape)
    source = quantisation((-4.0, 5.0))
    quantised = Int8Linear.of(layer, source)
    expected = F.linear(numbers(x, source), rounded_weight(layer.weight), layer.bias.double())
    with torch.no_grad():
        y = quantised(x)
        assert y.dtype == torch.float32 and y.shape == expected.shape
        # Sums of integers are exact; the scales and the bias are rounded to fp32, which has 24 bits.
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            half = quantised(x.bfloat16().float())
        expected = F.linear(numbers(x.bfloat16(), source), rounded_weight(layer.weight), layer.bias.double())
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.double(), expected, rtol=2**-8, atol=1e-5)  # bf16 has 8 bits


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_fused_activation_and_a_quantised_output_are_those_of_the_definitions(name: str) -> None:
    layer, x = layer_and_input(7, 48)
    source, target, activation = quantisation((-4.0, 5.0)), quantisation((-1.0, 3.0)), ACTIVATIONS[name]
    post = kernels.post_operation(activation)
    assert (post is None) == (name == "none")
    quantised = Int8Linear.of(layer, source, target=target, **({"post": post} if post else {}))
    product = F.linear(numbers(x, source), rounded_weight(layer.weight), layer.bias.double())
    with torch.no_grad():
        y = quantised(x)
    assert y.dtype == torch.uint8
    exact = activation(product) / target.scale + target.zero_point
    # Only a number very close to the middle of two integers may be rounded to the other one; the tolerance of tanh's
    # approximation is that of oneDNN's polynomials.
    assert (y.double() - exact.clamp(0, 255)).abs().max() < 0.5 + 1e-3


def test_rows_do_not_depend_on_other_rows() -> None:
    layer, x = layer_and_input(150, 48)
    quantised = Int8Linear.of(layer, quantisation((-4.0, 5.0)))
    with torch.no_grad():
        whole = quantised(x)
        for rows in (slice(0, 1), slice(3, 40), slice(17, 150)):
            # The sums are equal integers; oneDNN's kernels for different numbers of rows may differ in the order in
            # which they multiply by the two scales and add the bias: two units in the last place of values up to 4.
            torch.testing.assert_close(quantised(x[rows]), whole[rows], rtol=0, atol=1e-6)
            torch.testing.assert_close(quantised(x[rows].unsqueeze(1)).squeeze(1), whole[rows], rtol=0, atol=1e-6)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_the_last_map_adds_the_residual_and_does_not_overwrite_it(pre_norm: bool) -> None:
    residual = Residual(BlockOptions(width=24, heads=2, feedforward=36, pre_norm=pre_norm))
    layer, x = layer_and_input(2, 5, 24, outputs=24)
    last = Int8Linear.of(layer, quantisation((-4.0, 5.0)))
    fused = Int8Residual(residual, last)
    with torch.no_grad():
        for shortcut in (x, x.transpose(0, 1).contiguous().transpose(0, 1), x.bfloat16()):
            before = shortcut.clone()
            is_half = shortcut.dtype == torch.bfloat16
            with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
                y = fused(shortcut, last)
            expected = residual(shortcut.float(), last)  # `last` without a residual
            assert torch.equal(shortcut, before)
            tolerance = 0.02 if is_half else 1e-5  # bf16 has 8 bits, in the product and in the norm
            torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance)
    with pytest.raises(ZeroDivisionError):
        fused(x, lambda _: 1 / 0)
    assert last.residual is None, "nothing is added in later calls"


@pytest.mark.parametrize("way", ["view", "copy", "formula"])
def test_tensors_are_rounded_as_defined(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "MIN_VIEWED_ELEMENTS", 0 if way == "view" else 2**16)
    if way == "formula":
        monkeypatch.setattr(int8, "_ROUND", None)
    to = quantisation((-1.0, 2.0))
    x = torch.cat([torch.randn(3, 40, generator=generator("round")) * 2, torch.full((3, 1), 1e30)], 1)
    for view in (x, x.T, x[:, ::3], x[:1].expand(4, -1), x[:0], x.bfloat16()):
        assert_rounded(int8.quantise_tensor(view, to), view.double() / to.scale + to.zero_point)
    assert torch.equal(int8.quantise_tensor(torch.zeros(2), to), torch.full((2,), to.zero_point, dtype=torch.uint8))
    again = int8.dequantise_tensor(int8.quantise_tensor(x, to), to)
    assert (again - x.clamp(-1.0, 2.0)).abs().max() < to.scale * 0.501


def test_a_quantisation_represents_zero_exactly_and_covers_its_ranges() -> None:
    assert quantisation((0.5, 2.0)) == (2 / 255, 0) and quantisation((-2.0, -1.0)) == (2 / 255, 255)
    assert quantisation((-1.0, 1.0), (-2.0, 0.0)) == quantisation((-2.0, 1.0))
    assert quantisation((0.0, 0.0)) == (1.0, 0)
    weight, scales = int8.quantise_weight(torch.stack([torch.zeros(4), torch.tensor([1.0, -2.0, 0.5, 2.0])]))
    assert weight.tolist() == [[0, 0, 0, 0], [64, -127, 32, 127]]
    assert torch.equal(scales, torch.tensor([1.0, 2 / 127]))


def test_projections_use_the_ranges_of_the_inputs_of_their_rows() -> None:
    torch.manual_seed(0)
    joint, x = Projections(24, 36), torch.randn(5, 24)
    ranges = (-1.0, 1.0), (-2.0, 2.0), (0.0, 4.0)
    quantised = Int8Projections(joint, ranges)
    with torch.no_grad():
        for first, end in ((0, 3), (0, 2), (2, 3), (1, 3), (0, 1)):
            rows = slice(12 * first, 12 * end) if (first, end) != (0, 3) else slice(None)
            source = quantisation(*ranges[first:end])
            expected = F.linear(numbers(x, source), rounded_weight(joint.weight)[rows], joint.bias.double()[rows])
            for _ in range(2):  # the second call uses the packed rows of the first
                torch.testing.assert_close(quantised(x, rows=rows).double(), expected, rtol=1e-5, atol=1e-5)


KINDS = {"1x1": (8, 16, 1), "3x3": (16, 16, 3), "3x3, stride 2": (16, 24, 3, 2), "stem": (3, 8, 7, 2)}
KINDS |= {"dilated": (16, 16, 3, 1, 2), "1x1, stride 2": (8, 16, 1, 2)}


@pytest.mark.parametrize("with_real", [False, True])
@pytest.mark.parametrize("added", ["nothing", "a map", "a map with a zero point"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_convolution_is_the_definition_on_quantised_values(kind: str, added: str, with_real: bool) -> None:
    rng = generator("int8 convolution", kind)
    inputs, outputs, *_ = KINDS[kind]
    conv, norm = convolution(*KINDS[kind]), FrozenBatchNorm(outputs)
    for tensor in norm.buffers():
        tensor.uniform_(0.5, 1.5, generator=rng)
    x = torch.randn(2, inputs, 33, 21, generator=rng).contiguous(memory_format=torch.channels_last)
    source, target = quantisation((-2.5, 2.0)), quantisation((0.0, 6.0))
    other = quantisation((0.0, 3.0) if added == "a map" else (-1.5, 3.0))
    with torch.no_grad():
        scale, shift = norm.scale_and_shift()
        weight = rounded_weight(conv.weight * scale[:, None, None, None])
        # The padding is the number zero, not the integer zero.
        y = F.conv2d(numbers(x, source), weight, shift.double(), conv.stride, conv.padding, conv.dilation)
        quantised = Int8Convolution(conv, norm, source, target, None if added == "nothing" else other)
        plain = conv_norm(quantised, nn.Identity(), x)
        assert_rounded(plain, y / target.scale)
        shortcut = torch.randn(y.shape, generator=rng).contiguous(memory_format=torch.channels_last)
        real = torch.rand(2, 1, *y.shape[2:], generator=rng) < 0.8 if with_real else None
        if added != "nothing":
            y = y + numbers(shortcut, other)
        expected = y.relu() if real is None else y.relu() * real
        term = None if added == "nothing" else int8.quantise_tensor(shortcut, other)
        fused = conv_norm_relu(quantised, nn.Identity(), x, shortcut=term, real=real)
        assert_rounded(fused, expected / target.scale)
        assert fused.is_contiguous(memory_format=torch.channels_last)


def test_a_convolutions_weight_is_packed_once_for_maps_of_similar_sizes() -> None:
    rng = generator("maps")
    conv, norm = convolution(8, 16, 3), FrozenBatchNorm(16)
    source, target = quantisation((-2.5, 2.0)), quantisation((-6.0, 6.0))
    quantised = Int8Convolution(conv, norm, source, target)
    with torch.no_grad():
        scale, shift = norm.scale_and_shift()
        weight = rounded_weight(conv.weight * scale[:, None, None, None])
        for shape in [(1, 8, 64, 64), (2, 8, 50, 90), (3, 8, 5, 90), (1, 8, 1, 1), (1, 8, 64, 64)]:
            x = torch.randn(shape, generator=rng).contiguous(memory_format=torch.channels_last)
            y = F.conv2d(numbers(x, source), weight, shift.double(), padding=1)
            assert_rounded(quantised(x), y / target.scale + target.zero_point)
    assert len(quantised.packed_weights) == 3
    assert torch.equal(copy.deepcopy(quantised)(x), quantised(x))


def assert_rounded(y: Tensor, exact: Tensor) -> None:
    """Assert that uint8 values are rounded exact ones; only a number close to a middle may be rounded the other way."""
    assert y.dtype == torch.uint8 and y.shape == exact.shape
    assert ((y.double() - exact.clamp(0, 255)).abs() < 0.5 + 1e-3).all()


def test_max_pooling_of_integers_is_that_of_floats() -> None:
    x = torch.randint(0, 256, (2, 16, 13, 11), dtype=torch.uint8, generator=generator("pool"))
    x = x.contiguous(memory_format=torch.channels_last)
    pool = nn.MaxPool2d(3, 2, 1)
    assert torch.equal(Int8MaxPool(pool)(x).float(), pool(x.float()))
