"""Norms against torch's own functions, with gradients, and a GroupNorm that ignores padding."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.machine.seeds import generator
from common.nn.norms import LayerNorm2d, MaskedGroupNorm, Norm, norm

EXACT = {"rtol": 0, "atol": 1e-12}  # float64, means of a dozen terms of size one


def formula(name: Norm, x: Tensor, module: nn.Module, eps: float) -> Tensor:
    if name == "layer":
        return F.layer_norm(x, (12,), module.weight, module.bias, eps)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * module.weight  # equation 4 of the paper


@pytest.mark.parametrize("eps", [1e-6, 0.3])
@pytest.mark.parametrize("name", ["layer", "rms"])
def test_a_norm_is_what_its_name_says_with_its_gradients(name: Norm, eps: float) -> None:
    module, rng = norm(name, 12, eps).double(), generator("norm", name)
    for parameter in module.parameters():
        nn.init.normal_(parameter, generator=rng)
    x = torch.randn(2, 5, 12, dtype=torch.float64, generator=rng, requires_grad=True)
    direction = torch.randn(2, 5, 12, dtype=torch.float64, generator=rng)
    results = []
    for y in (module(x), formula(name, x, module, eps)):
        results.append([y, *torch.autograd.grad(y, [x, *module.parameters()], direction)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_an_rms_norm_has_no_shift_and_subtracts_no_mean() -> None:
    assert {*norm("rms", 12, 1e-6).state_dict()} == {"weight"}
    x = torch.randn(3, 12, generator=generator("shift"))
    assert not torch.allclose(norm("rms", 12, 1e-6)(x + 5), norm("rms", 12, 1e-6)(x))
    torch.testing.assert_close(norm("layer", 12, 1e-6)(x + 5), norm("layer", 12, 1e-6)(x), rtol=0, atol=1e-5)


def masked_norm() -> MaskedGroupNorm:
    module, rng = MaskedGroupNorm(4, 12), generator("masked norm")
    for parameter in module.parameters():
        nn.init.normal_(parameter, generator=rng)
    return module


@pytest.mark.parametrize("shape", [(5, 7), (1, 3), (1, 1)])
def test_a_group_norm_gives_an_image_the_same_result_with_and_without_padding(shape: tuple[int, int]) -> None:
    module, (height, width) = masked_norm().double(), shape
    x = torch.randn(1, 12, height, width, dtype=torch.float64, generator=generator("masked", shape))
    padded = 9 * torch.ones(1, 12, height + 2, width + 3, dtype=torch.float64)
    padded[..., :height, :width] = x
    real = torch.zeros(1, 1, height + 2, width + 3, dtype=torch.bool)
    real[..., :height, :width] = True
    y = module(padded, real)
    torch.testing.assert_close(y[..., :height, :width], module(x), **EXACT)
    torch.testing.assert_close(module(x), F.group_norm(torch.cat([x, x]), 4, module.weight, module.bias)[:1], **EXACT)
    assert (y * ~real).count_nonzero() == 0


def test_a_group_norm_of_one_value_in_each_group_is_its_bias() -> None:
    module = MaskedGroupNorm(12, 12)
    nn.init.normal_(module.bias, generator=generator("bias"))
    x = torch.randn(1, 12, 1, 1, generator=generator("one value"))
    for real in (None, torch.ones(1, 1, 1, 1, dtype=torch.bool)):
        torch.testing.assert_close(module(x, real)[0, :, 0, 0], module.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_group_norm_is_in_fp32_with_and_without_padding(dtype: torch.dtype) -> None:
    module, x = masked_norm(), torch.randn(2, 12, 5, 7, generator=generator("half")).to(dtype)
    with torch.autocast("cpu", dtype):
        for real in (None, torch.ones(2, 1, 5, 7, dtype=torch.bool)):
            torch.testing.assert_close(module(x, real), module(x.float(), real), rtol=0, atol=1e-6)


def test_a_layer_norm_of_a_map_normalises_the_channels_of_each_position() -> None:
    module, rng = LayerNorm2d(6, eps=1e-3).double(), generator("maps")
    for parameter in module.parameters():
        nn.init.normal_(parameter, generator=rng)
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64, generator=rng)
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    expected = (x - mean) / (variance + 1e-3).sqrt() * module.weight[:, None, None] + module.bias[:, None, None]
    torch.testing.assert_close(module(x), expected, **EXACT)
