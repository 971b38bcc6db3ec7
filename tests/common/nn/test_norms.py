"""Norms against torch's own functions, with gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.machine.seeds import generator
from common.nn.norms import Norm, norm

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
