"""oneDNN's products against torch's, and packed weights, which must follow every change of a weight."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.nn import kernels
from common.nn.kernels import Parameter, linear
from common.nn.linear import Linear, Projections
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
# Sums of 48 products of unit normals in another order: a few units in the last place of values up to 30.
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
    """The product, and the gradients of all inputs for a fixed gradient of the product."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    out = call(*leaves)
    gradient = torch.linspace(-1, 1, out.numel()).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


@pytest.fixture
def onednn_calls(monkeypatch):
    """Shapes of the weights of all oneDNN products; skips if torch has no oneDNN."""
    if kernels._PRODUCT is None:
        pytest.skip("this torch has no oneDNN")
    shapes: list[tuple[int, ...]] = []
    product = kernels._PRODUCT

    def recorded_product(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
        shapes.append(tuple(weight.shape))
        return product(x, weight, *rest)

    monkeypatch.setattr(kernels, "_PRODUCT", recorded_product)
    monkeypatch.setattr(kernels, "_IS_FASTER_THAN_MKL", True)  # as on a CPU with AVX-512
    return shapes


@pytest.mark.parametrize(("is_faster", "is_zen_4"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("outputs", [20, 80])
@pytest.mark.parametrize("kind", INPUTS)
def test_values_and_gradients_are_those_of_torch(kind, outputs, biased, is_faster, is_zen_4, monkeypatch):
    monkeypatch.setattr(kernels, "_IS_FASTER_THAN_MKL", is_faster)
    monkeypatch.setattr(kernels, "_IS_SLOWER_FOR_LONG_SUMS", is_zen_4)
    monkeypatch.setattr(kernels, "MIN_LONG", 1)
    torch.manual_seed(0)
    x, weight, bias = INPUTS[kind](), torch.randn(outputs, 48), torch.randn(outputs) if biased else None
    for ours, theirs in zip(results(linear, x, weight, bias), results(F.linear, x, weight, bias), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_an_expanded_gradient_is_supported():
    torch.manual_seed(0)
    weight, x = torch.randn(20, 48, requires_grad=True), torch.randn(5, 48)
    linear(x, weight).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, x.sum(0).expand(20, -1), **CLOSE)


def test_only_the_required_gradients_are_computed(onednn_calls):
    weight, x = torch.randn(20, 48), torch.randn(5, 48, requires_grad=True)
    linear(x, weight).sum().backward()
    assert onednn_calls == [(20, 48), (48, 20)] and weight.grad is None


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "products"),
    [(5, 48, 80, 1), (5, 48, 48, 1), (5, 48, 20, 2), (5, 49, 80, 2), (4, 48, 80, 2)],
)
def test_on_zen_4_long_sums_for_narrow_weights_are_left_to_mkl(
    rows, inputs, outputs, products, onednn_calls, monkeypatch
):
    monkeypatch.setattr(kernels, "_IS_SLOWER_FOR_LONG_SUMS", True)
    monkeypatch.setattr(kernels, "MIN_LONG", 5)
    monkeypatch.setattr(kernels, "MAX_NARROW", 48)
    weight, x = torch.randn(outputs, inputs, requires_grad=True), torch.randn(rows, inputs)
    y = linear(x, weight)
    with torch.autocast("cpu", torch.bfloat16):  # must not change the gradient of a product in fp32
        [gradient] = torch.autograd.grad(y.sum(), weight)
    torch.testing.assert_close(gradient, x.sum(0).expand(outputs, -1), **CLOSE)
    assert len(onednn_calls) == products


@pytest.mark.parametrize("is_zen_4", [True, False])
@pytest.mark.parametrize("outputs", [20, 80])
def test_the_gradient_of_a_weight_is_laid_out_like_the_weight(outputs, is_zen_4, onednn_calls, monkeypatch):
    monkeypatch.setattr(kernels, "_IS_SLOWER_FOR_LONG_SUMS", is_zen_4)
    weight = torch.randn(outputs, 48, requires_grad=True)
    [gradient] = torch.autograd.grad(linear(torch.randn(5, 48), weight).sum(), weight)
    assert gradient.stride() == weight.stride() and onednn_calls


def test_single_precision_on_the_cpu_goes_to_onednn(onednn_calls):
    with torch.no_grad():
        Linear(48, 20)(torch.randn(5, 48))
    assert onednn_calls == [(20, 48)]


def test_where_mkl_is_faster_only_packed_weights_go_to_onednn(onednn_calls, monkeypatch):
    monkeypatch.setattr(kernels, "_IS_FASTER_THAN_MKL", False)
    torch.manual_seed(0)
    layer = Linear(48, 20)
    with torch.no_grad():
        few, many = layer(torch.randn(kernels.MAX_PACKED_ROWS, 48)), layer(torch.randn(kernels.MAX_PACKED_ROWS + 1, 48))
    layer(torch.randn(5, 48, requires_grad=True)).sum().backward()
    assert few.shape[0] + 1 == many.shape[0] and onednn_calls == [(20, 48)]


@pytest.mark.parametrize("kind", ["float64", "bfloat16", "autocast", "compiled", "disabled"])
def test_unsupported_cases_are_left_to_torch_and_agree_with_it(kind, onednn_calls):
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
        with torch.backends.mkldnn.flags(enabled=kind != "disabled"):
            ours, theirs = call(x), plain(x)
    assert ours.dtype == theirs.dtype and onednn_calls == []
    torch.testing.assert_close(ours, theirs)


PACKED_ROWS = 5


def check_outputs(layer: Linear) -> None:
    """Check outputs twice: with a newly packed weight, and with the cached one."""
    x = torch.randn(PACKED_ROWS, 48)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), **CLOSE)


def compute_gradients(layer: Linear) -> None:
    """Compute gradients by torch's own operations: a compiled forward pass does not call `kernels.linear` either."""
    layer.weight.grad = layer.bias.grad = None
    F.linear(torch.randn(PACKED_ROWS, 48), layer.weight, layer.bias).square().sum().backward()


CHANGES: dict[str, Callable[[Linear], object]] = {
    "in place": lambda layer: layer.weight.detach().mul_(2),
    "through data": lambda layer: layer.weight.data.mul_(2),
    "one element through data": lambda layer: layer.weight.data.__setitem__((3, 4), 7.0),
    "other data": lambda layer: setattr(layer.weight, "data", torch.randn(20, 48)),
    "through a state dict": lambda layer: layer.state_dict()["weight"].mul_(2),
    "a loaded state dict": lambda layer: layer.load_state_dict(Linear(48, 20).state_dict()),
    "an assigned state dict": lambda layer: layer.load_state_dict(Linear(48, 20).state_dict(), assign=True),
    "another parameter": lambda layer: setattr(layer, "weight", Parameter(torch.randn(20, 48))),
    "a plain parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(20, 48))),
    "another type and back": lambda layer: layer.double().float().weight.data.mul_(2),
    "swapped tensors": lambda layer: torch.utils.swap_tensors(layer.weight, Parameter(torch.randn(20, 48))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_packed_again(change: str) -> None:
    torch.manual_seed(0)
    layer = Linear(48, 20)
    before = layer.weight.detach().clone()
    check_outputs(layer)
    CHANGES[change](layer)
    assert not torch.equal(layer.weight.detach(), before)
    check_outputs(layer)


@pytest.mark.parametrize("implementation", ["fused", "foreach", "plain"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_a_weight_that_an_optimizer_changes_is_packed_again(
    kind: type[torch.optim.Optimizer], implementation: str
) -> None:
    """Fused optimizers do not count writes. Inference runs before each step, and between gradients and step."""
    torch.manual_seed(0)
    layer = Linear(48, 20)
    optimizer = kind(  # type: ignore[call-arg]
        layer.parameters(), lr=0.1, fused=implementation == "fused", foreach=implementation == "foreach"
    )
    for _ in range(3):
        compute_gradients(layer)
        check_outputs(layer)
        before = layer.weight.detach().clone()
        optimizer.step()
        assert not torch.equal(layer.weight.detach(), before)
        check_outputs(layer)


def test_a_step_of_our_optimizers_is_followed_by_packed_weights() -> None:
    torch.manual_seed(0)
    layer = Linear(48, 20)
    optimizer = optim.build(layer, OPTIONS)
    check_outputs(layer)
    compute_gradients(layer)
    optimizer.step()
    check_outputs(layer)


def test_reading_data_and_gradients_between_forward_and_backward_is_harmless() -> None:
    torch.manual_seed(0)
    layer, x = Linear(48, 20), torch.randn(PACKED_ROWS, 48)
    loss = layer(x).square().sum()
    assert layer.weight.data.shape == (20, 48) and layer.weight.grad is None
    loss.backward()
    assert layer.weight.grad is not None


def test_weights_are_packed_only_for_few_rows_and_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels._PACK is None:
        pytest.skip("this torch has no oneDNN")
    packed: list[int] = []
    pack = kernels._PACK
    monkeypatch.setattr(kernels, "_PACK", lambda weight: packed.append(len(weight)) or pack(weight))
    layer = Projections(48, 60)
    with torch.no_grad():
        for count in (1, kernels.MAX_PACKED_ROWS + 1):
            layer(torch.randn(count, 48))
        assert packed == []
        for count in (2, 5, kernels.MAX_PACKED_ROWS):
            layer(torch.randn(count, 48))
            layer(torch.randn(count, 48), rows=slice(0, 20))
        assert packed == [60, 20]
        layer.weight = nn.Parameter(layer.weight.detach())
        layer(torch.randn(5, 48))
    assert packed == [60, 20], "a plain parameter does not count its changes, so it is not packed"


def test_a_parameter_survives_copies_pickles_files_export_and_compilation() -> None:
    torch.manual_seed(0)
    layer, x = Linear(48, 20), torch.randn(PACKED_ROWS, 48)
    with torch.no_grad():
        expected = layer(x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied.weight_cache._entries == {}, "copies and pickles contain no packed weights"
        with torch.no_grad():
            assert torch.equal(copied(x), expected)
            copied.weight.data.mul_(0)
            torch.testing.assert_close(copied(x), layer.bias.detach().expand(PACKED_ROWS, -1))
            assert torch.equal(layer(x), expected)
    assert type(copy.deepcopy(layer).weight) is Parameter and type(copy.deepcopy(layer).double().weight) is Parameter

    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    tensors = torch.load(file, weights_only=True)
    assert {name: type(tensor) for name, tensor in tensors.items()} == {"weight": Tensor, "bias": Tensor}

    program = torch.export.export(layer, (x,)).module()
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    for call in (program, compiled):
        torch.testing.assert_close(call(x), F.linear(x, layer.weight, layer.bias), **CLOSE)
    compiled(x).sum().backward()


def test_tensor_subclasses_are_left_to_torch(onednn_calls: list[tuple[int, ...]]) -> None:
    class Subclass(Tensor):
        pass

    layer, x = Linear(48, 20), torch.randn(5, 48)
    with torch.no_grad():
        torch.testing.assert_close(
            layer(x.as_subclass(Subclass)).as_subclass(Tensor), F.linear(x, layer.weight, layer.bias)
        )
    assert onednn_calls == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_some_rows_are_those_of_the_whole_product(precision):
    torch.manual_seed(0)
    layer, x = Projections(48, 20), torch.randn(5, 48)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        whole = layer(x)
        for rows in (slice(0, 7), slice(7, 20), slice(None)):
            for _ in range(2):  # the second call uses the cached weight
                torch.testing.assert_close(layer(x, rows=rows), whole[:, rows])
        assert whole.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


def test_bf16_rounds_as_autocast_does():
    torch.manual_seed(0)
    layer, x = Linear(48, 20), torch.randn(5, 48)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            ours = layer(x)
        torch.testing.assert_close(ours, F.linear(x, layer.weight, layer.bias), rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.SiLU(), nn.Tanh()], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_activation_in_the_products_pass_is_as_exact_as_in_its_own(activation, rows, dtype, onednn_calls):
    """Against float64, with the roundings of bf16 to 8 bits, or those of fp32 and of oneDNN's GELU, 1e-6."""
    if dtype == torch.bfloat16 and not kernels._HAS_BF16:
        pytest.skip("oneDNN has no bf16 here")
    layer, x = Linear(48, 20), torch.randn(rows, 48)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        fused, separate = layer(x, activation=activation), activation(layer(x))
        weight, bias = (tensor.to(dtype).double() for tensor in (layer.weight, layer.bias))
        exact = activation(F.linear(x.to(dtype).double(), weight, bias))
    error, separate_error = ((each - exact).norm() / exact.norm() for each in (fused, separate))
    assert fused.dtype == dtype and error <= 1.05 * separate_error + 2e-6
    assert len(onednn_calls) == 2


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU(), nn.SiLU()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_activation_hides_a_weight_that_is_not_finite(activation, dtype):
    layer = Linear(48, 20)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        layer.weight[3, 5] = float("nan")
        assert layer(torch.randn(7, 48), activation=activation)[:, 3].isnan().all()


def test_an_activation_is_differentiable_and_its_hooks_are_called(onednn_calls):
    layer, x, activation = Linear(48, 20), torch.randn(5, 48), nn.GELU()
    with torch.no_grad():
        expected = layer(x, activation=activation)
    torch.testing.assert_close(layer(x, activation=activation), expected, **CLOSE)
    layer(x, activation=activation).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.any()
    inputs: list[Tensor] = []
    activation.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        torch.testing.assert_close(layer(x, activation=activation), expected, **CLOSE)
        torch.testing.assert_close(inputs, [layer(x)], **CLOSE)
