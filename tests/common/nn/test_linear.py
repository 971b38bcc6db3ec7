import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.nn import linear as file
from common.nn.linear import Linear, linear
from common.train import optim
from common.train.optim import OptimizerOptions

OPTIONS = OptimizerOptions(
    name="adamw",
    lr=0.1,
    weight_decay=0.0,
    decay_norms=False,
    betas=(0.9, 0.999),
    eps=1e-8,
    momentum=0.0,
    rates={},
    layer_decay=1.0,
    reference_batch=None,
    scaling="linear",
)
# Sums of 48 products of unit normals in another order: some units in the last place of values up to 30.
CLOSE = {"rtol": 1e-5, "atol": 2e-5}

INPUTS: dict[str, Callable[[], Tensor]] = {
    "a vector": lambda: torch.randn(48),
    "a matrix": lambda: torch.randn(5, 48),
    "a batch": lambda: torch.randn(2, 5, 48),
    "four axes": lambda: torch.randn(2, 3, 5, 48),
    "a swapped view": lambda: torch.randn(5, 2, 48).transpose(0, 1),
    "a strided view": lambda: torch.randn(2, 48, 10).transpose(1, 2)[:, ::2],
    "one row for all": lambda: torch.randn(1, 48).expand(5, 48),
    "nothing": lambda: torch.randn(0, 48),
}


def results(call: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """The product, and the gradients of everything by a gradient that is the same for all who call."""
    leaves = [part.detach().clone().requires_grad_() for part in (x, weight, bias) if part is not None]
    out = call(*leaves)
    gradient = torch.linspace(-1, 1, out.numel()).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


@pytest.fixture
def asked(monkeypatch):
    """Shapes of the weights with which oneDNN was asked; skips where torch comes without it."""
    if file._PRODUCT is None:
        pytest.skip("this torch has no oneDNN")
    shapes: list[tuple[int, ...]] = []
    product = file._PRODUCT

    def spied(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
        shapes.append(tuple(weight.shape))
        return product(x, weight, *rest)

    monkeypatch.setattr(file, "_PRODUCT", spied)
    return shapes


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("outputs", [20, 80])
@pytest.mark.parametrize("kind", INPUTS)
def test_values_and_gradients_are_those_of_torch(kind, outputs, biased):
    torch.manual_seed(0)
    x, weight, bias = INPUTS[kind](), torch.randn(outputs, 48), torch.randn(outputs) if biased else None
    for ours, theirs in zip(results(linear, x, weight, bias), results(F.linear, x, weight, bias), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_a_gradient_that_is_one_number_for_all_is_taken():
    torch.manual_seed(0)
    weight, x = torch.randn(20, 48, requires_grad=True), torch.randn(5, 48)
    linear(x, weight).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, x.sum(0).expand(20, -1), **CLOSE)


def test_only_the_gradients_that_are_wanted_are_computed(asked):
    weight, x = torch.randn(20, 48), torch.randn(5, 48, requires_grad=True)
    linear(x, weight).sum().backward()
    assert asked == [(20, 48), (48, 20)] and weight.grad is None


def test_single_precision_on_the_cpu_goes_to_onednn(asked):
    with torch.no_grad():
        Linear(48, 20)(torch.randn(5, 48))
    assert asked == [(20, 48)]


@pytest.mark.parametrize("kind", ["float64", "bfloat16", "autocast", "compiled", "switched off"])
def test_what_does_not_suit_goes_the_plain_way_and_is_right(kind, asked):
    torch.manual_seed(0)
    layer, x = Linear(48, 20), torch.randn(5, 48)
    plain = nn.Linear(48, 20)
    plain.load_state_dict(layer.state_dict())
    call: Callable[[Tensor], Tensor] = layer
    if kind in ("float64", "bfloat16"):
        dtype = getattr(torch, kind)
        layer, plain, x = layer.to(dtype), plain.to(dtype), x.to(dtype)
    if kind == "compiled":
        call = torch.compile(copy.deepcopy(layer), backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        with torch.backends.mkldnn.flags(enabled=kind != "switched off"):
            ours, theirs = call(x), plain(x)
    assert ours.dtype == theirs.dtype and asked == []
    torch.testing.assert_close(ours, theirs)


def test_a_checkpoint_of_plain_linear_maps_fits():
    assert Linear(3, 2).state_dict().keys() == nn.Linear(3, 2).state_dict().keys()


def test_a_weight_that_changes_is_packed_anew(asked):
    """By the optimizer's kernels, by what `state_dict` hands out, and by another tensor in its place."""
    torch.manual_seed(0)
    layer, x = Linear(48, 20), torch.randn(5, 48)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)

    def check() -> None:
        with torch.no_grad():
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), **CLOSE)

    check()
    layer(x).square().sum().backward()
    optimizer.step()
    check()
    layer.state_dict()["bias"].add_(1)
    check()
    with torch.no_grad():
        layer.weight[3] = 7
    check()
    layer.load_state_dict({"weight": torch.randn(20, 48), "bias": torch.randn(20)})
    check()
    layer.weight.data = torch.randn(20, 48)
    check()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_some_rows_are_those_of_the_whole(precision):
    torch.manual_seed(0)
    layer, x = Linear(48, 20), torch.randn(5, 48)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        whole = layer(x)
        for rows in (slice(0, 7), slice(7, 20), slice(None)):
            torch.testing.assert_close(linear(x, layer.weight, layer.bias, rows), whole[:, rows])
        assert whole.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


def test_bf16_rounds_as_autocast_does():
    torch.manual_seed(0)
    layer, x = Linear(48, 20), torch.randn(5, 48)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            ours = layer(x)
        torch.testing.assert_close(ours, F.linear(x, layer.weight, layer.bias), rtol=8e-3, atol=8e-3)


def test_our_optimizers_count_what_they_change():
    """Also where nothing else would tell: a compiled forward pass does not come by `linear`."""
    torch.manual_seed(0)
    layer, x = Linear(48, 20), torch.randn(5, 48)
    optimizer = optim.build(layer, OPTIONS)
    with torch.no_grad():
        layer(x)
    F.linear(x, layer.weight, layer.bias).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), **CLOSE)
