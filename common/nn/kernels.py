"""oneDNN's CPU kernels: linear maps, fused convolutions, and weights packed into the layout that these kernels read.

For fp32 products on the CPU, PyTorch calls MKL, which does not use AVX-512 on AMD's processors (96 GFLOP/s on one Zen 5
core, torch 2.15). oneDNN, which is also part of PyTorch, uses AVX-512 there (214 GFLOP/s). On Zen 4, whose AVX-512 is
no faster than AVX2, it takes 0.7 to 1 of MKL's time. MKL is faster on Intel's processors, where the products of a
backward pass took oneDNN up to 3 times as long, and on a CPU with AVX2 only (45 GFLOP/s against oneDNN's 39 on one Zen
3 core), except if the input has few rows and the weight is packed.
Only this file and int8.py, which has the operators on integers, call oneDNN directly. On other devices, under
torch.compile and torch.export, for tensor subclasses other than parameters, and under
`torch.backends.mkldnn.flags(enabled=False)`, `linear` calls PyTorch's function instead, and `can_fuse` returns False.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from common.machine import processor

Post = tuple[str, list[Any], str]  # an activation that an operator applies to its output: name, arguments, algorithm
NO_POST: Post = ("none", [], "")

MAX_PACKED_ROWS = 32  # packed fp32 weights are faster (up to twice as fast) only for 2 to 32 input rows

_ONEDNN = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None
_PRODUCT = getattr(_ONEDNN, "_linear_pointwise", None)
_PACK = getattr(_ONEDNN, "_reorder_linear_weight", None)
_CONVOLUTION = getattr(_ONEDNN, "_convolution_pointwise", None)
_CONVOLUTION_ADD = getattr(_ONEDNN, "_convolution_pointwise_", None)
_PACK_CONVOLUTION = getattr(_ONEDNN, "_reorder_convolution_weight", None)
# Whether oneDNN is faster than MKL in fp32 with unpacked weights.
_IS_FASTER_THAN_MKL = torch.backends.cpu.get_cpu_capability() != "AVX2" and not processor.is_intel()
# Whether MKL is faster for the gradient of a weight with at most MAX_NARROW inputs and at least as many outputs, from
# MIN_LONG rows on. oneDNN's operator copies transposed factors, which takes longer than what it gains on Zen 4.
_IS_SLOWER_FOR_LONG_SUMS = processor.is_zen_4()
MAX_NARROW, MIN_LONG = 384, 1500
_HAS_BF16 = _PRODUCT is not None and bool(getattr(_ONEDNN, "_is_mkldnn_bf16_supported", bool)())


_DATA: Any = Tensor.data
_GRAD: Any = Tensor.grad


class Parameter(nn.Parameter):
    """A parameter that counts its changes, so that a `WeightCache` knows when to recompute.

    A tensor's `_version` counts writes, but not those through `data` or by fused optimizers (torch 2.15). Therefore
    each access to `data` counts as a change. Each read of `grad` counts, too, because every optimizer reads the
    gradient before it writes the parameter. Later writes through an alias (`d = p.data`) and writes by collectives are
    not counted.
    """

    changes = 0

    @property
    def data(self) -> Tensor:
        """The values without autograd history, in the same memory; each access counts as a change."""
        self.changes += 1
        values: Tensor = _DATA.__get__(self)
        return values

    @data.setter
    def data(self, values: Tensor) -> None:
        self.changes += 1
        _DATA.__set__(self, values)

    @property
    def grad(self) -> Tensor | None:
        """The gradient, or None if there is none; each read counts as a change."""
        self.changes += 1
        gradient: Tensor | None = _GRAD.__get__(self)
        return gradient

    @grad.setter
    def grad(self, gradient: Tensor | None) -> None:
        _GRAD.__set__(self, gradient)

    @grad.deleter
    def grad(self) -> None:
        _GRAD.__delete__(self)


_SUPPORTED_TYPES = (Tensor, nn.Parameter, Parameter)  # not DTensor, FakeTensor or quantised weights


class WeightCache:
    """Tensors that a kernel needs and that are computed from a weight; they are valid until the weight changes.

    A copy of a cache is empty.
    """

    def __init__(self) -> None:
        self._entries: dict[Any, tuple[Tensor, tuple[Any, ...], list[Tensor], Any]] = {}

    def __reduce__(self) -> tuple[type["WeightCache"], tuple[()]]:
        return WeightCache, ()

    def clear(self) -> None:
        """Remove all entries."""
        self._entries.clear()

    def get(self, name: Any, weight: Tensor, make: Callable[[], Any], statistics: tuple[Tensor, ...] = ()) -> Any:
        """The result of `make`, stored under `name`; `make` is called again if `weight` or `statistics` have changed.

        `weight` must count its changes (`counts_changes`). `statistics` are vectors, which need not count their
        changes. On the CPU, their values are compared with stored ones, which takes a microsecond for each vector. On
        other devices, the host would have to wait for the values, so they are not compared, and changes of `statistics`
        through `data` are missed.
        """
        assert isinstance(weight, Parameter)
        state = weight.changes, *((tensor.data_ptr(), tensor._version) for tensor in (weight, *statistics))
        entry = self._entries.get(name)
        if entry and entry[0] is weight and entry[1] == state and all(map(torch.equal, entry[2], statistics)):
            return entry[3]
        # The result is not made in inference mode, because autograd may save it for a convolution's backward pass.
        with torch.inference_mode(False), torch.no_grad():
            snapshot = [tensor.clone() for tensor in statistics if tensor.device.type == "cpu"]
            self._entries[name] = weight, state, snapshot, (result := make())
        return result


def counts_changes(weight: Tensor) -> bool:
    """Whether `weight` counts its changes (see `Parameter`), so that a `WeightCache` may hold tensors made from it."""
    return type(weight) is Parameter and not weight.is_inference()


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rows: slice = slice(None),
    cache: WeightCache | None = None,
    activation: nn.Module | None = None,
) -> Tensor:
    """x W^T + b: (..., in), (out, in), (out,) -> (..., out), or only the outputs in `rows`.

    `cache` belongs to the module that holds `weight`. Without a cache, weights are not packed. `activation` is applied
    to the outputs. Without gradients, oneDNN applies those that it has, except ReLU, without a pass of their own.
    """
    dtype, needs_gradient = _product_dtype(x, weight), _needs_gradient(x, weight, bias)
    if needs_gradient and cache is not None:
        cache.clear()  # so that uncounted writes, such as a collective's, are seen after a training step
    is_packed = not needs_gradient and dtype is not None and _is_packed(weight, dtype, x.numel() // x.shape[-1], cache)
    if dtype == torch.float32 and not is_packed and not _IS_FASTER_THAN_MKL:
        dtype = None
    if dtype is not None and not needs_gradient:
        prepared = _packed_weight(weight, rows, dtype, cache) if is_packed else _cast(_select_rows(weight, rows), dtype)
        cast_bias = None if bias is None else _cast(_select_rows(bias, rows), dtype)
        # oneDNN's ReLU makes 0 of NaN: it would hide that a weight is not finite.
        post = None if activation is None or type(activation) is nn.ReLU else post_operation(activation)
        return _activate(_multiply(_cast(x, dtype), prepared, cast_bias, post or NO_POST), None if post else activation)
    weight, bias = _select_rows(weight, rows), None if bias is None else _select_rows(bias, rows)
    product: Tensor = _Linear.apply(x, weight, bias) if dtype == torch.float32 else F.linear(x, weight, bias)
    return _activate(product, activation)


def post_operation(activation: nn.Module) -> Post | None:
    """The activation as oneDNN's operators apply it to their outputs; None if they cannot.

    A module with hooks is not replaced, because its hooks would not be called.
    """
    if activation._forward_hooks or activation._forward_pre_hooks:
        return None
    if type(activation) is nn.GELU:
        return "gelu", [], activation.approximate
    names: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "swish"}
    return (names[type(activation)], [], "") if type(activation) in names else None


def _activate(x: Tensor, activation: nn.Module | None) -> Tensor:
    y: Tensor = x if activation is None else activation(x)
    return y


def can_fuse(x: Tensor, weight: Tensor, shortcut: Tensor | None) -> bool:
    """Whether `convolution_relu` can compute a convolution with these tensors; False if a gradient is needed."""
    if None in (_CONVOLUTION, _CONVOLUTION_ADD, _PACK_CONVOLUTION) or not _supports(x, weight, shortcut):
        return False
    if _needs_gradient(x, weight, shortcut) or not x.numel():
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    return dtype in ((torch.float32, torch.bfloat16) if _HAS_BF16 else (torch.float32,))


def convolution_relu(
    conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None
) -> Tensor:
    """relu(conv(x) + shortcut) in one pass; nothing is added if `shortcut` is None.

    `weight`, packed by `pack_convolution`, and `bias` replace those of `conv`. `shortcut` may be overwritten.
    """
    assert _CONVOLUTION is not None and _CONVOLUTION_ADD is not None
    x = x.to(weight.dtype)
    geometry = conv.padding, conv.stride, conv.dilation, conv.groups
    y: Tensor
    if shortcut is None:
        y = _CONVOLUTION(x, weight, bias, *geometry, "relu", [], "")
    else:
        y = _CONVOLUTION_ADD(shortcut.to(weight.dtype), x, weight, bias, *geometry, "add", 1.0, "relu", [], "")
    return y


def size_class(x: Tensor) -> int:
    """The number of binary digits of the number of positions H W of a map (B, C, H, W).

    oneDNN chooses the layout of a convolution's weight by the size of the map. A weight in another layout is repacked
    in each call, which can take twenty times as long as the convolution. Maps of one class share a layout but for a few
    sizes in int8.
    """
    return int(x.shape[2] * x.shape[3]).bit_length()


def has_packed_layout(conv: nn.Conv2d, dtype: torch.dtype) -> bool:
    """Whether `pack_convolution` changes the layout of the convolution's weight in `dtype`.

    In fp32, the layouts of 1 x 1 kernels with a stride or with more outputs than inputs differ within a `size_class`.
    """
    is_reduction = conv.kernel_size == conv.stride == (1, 1) and conv.out_channels <= conv.in_channels
    return dtype != torch.float32 or conv.kernel_size == (3, 3) or is_reduction


def pack_convolution(weight: Tensor, conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Convert a convolution's weight to the layout that its kernel reads for maps of the size of x (B, C, H, W).

    Weights without a packed layout (`has_packed_layout`) are returned unchanged.
    """
    assert _PACK_CONVOLUTION is not None
    if not has_packed_layout(conv, weight.dtype):
        return weight
    geometry = conv.padding, conv.stride, conv.dilation, conv.groups
    packed: Tensor = _PACK_CONVOLUTION(weight, *geometry, [*x.shape])
    return packed


def _supports(*tensors: Tensor | None) -> bool:
    """Whether oneDNN is enabled and supports these tensors.

    Returns False under torch.compile and torch.export, because the compiler chooses the kernels itself.
    """
    if torch.compiler.is_compiling() or not torch.backends.mkldnn.enabled:
        return False
    for tensor in tensors:  # a loop, because the generator of all(...) is slower
        if tensor is not None and (type(tensor) not in _SUPPORTED_TYPES or not tensor.is_cpu):
            return False
    return True


def _product_dtype(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The type in which oneDNN computes the product of x and `weight`, or None if PyTorch computes it."""
    if _PRODUCT is None or not _supports(x, weight) or weight.dtype != torch.float32 or not x.numel():
        return None
    if torch.is_autocast_enabled("cpu"):
        return torch.bfloat16 if _HAS_BF16 and torch.get_autocast_dtype("cpu") == torch.bfloat16 else None
    return torch.float32 if x.dtype == torch.float32 else None


def _needs_gradient(*tensors: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _is_packed(weight: Tensor, dtype: torch.dtype, count: int, cache: WeightCache | None) -> bool:
    """Whether `linear` packs the weight for a product in `dtype` with `count` input rows."""
    is_faster = dtype == torch.bfloat16 or 1 < count <= MAX_PACKED_ROWS
    return is_faster and cache is not None and _PACK is not None and counts_changes(weight)


def _packed_weight(weight: Tensor, rows: slice, dtype: torch.dtype, cache: WeightCache | None) -> Tensor:
    """The `rows` of a weight in `dtype`, in the layout that the kernel reads; stored in `cache`."""
    assert cache is not None and _PACK is not None
    packed: Tensor = cache.get((rows.start, rows.stop, dtype), weight, lambda: _PACK(weight[rows].to(dtype)))
    return packed


def _select_rows(tensor: Tensor, rows: slice) -> Tensor:
    """Select rows of a tensor; if all rows are selected, return the tensor itself.

    Making a view would take a tenth of a small product's time.
    """
    return tensor if rows.start is None and rows.stop is None else tensor[rows]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None, post: Post = NO_POST) -> Tensor:
    assert _PRODUCT is not None
    product: Tensor = _PRODUCT(x, weight, bias, *post)
    return product


class _Linear(torch.autograd.Function):
    """A linear map with both the output and the gradients computed by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        inputs, outputs = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])  # (n, in), (n, out)
        return (
            _multiply(gradient, weight.t()) if needs_x else None,
            _outer(outputs, inputs) if needs_weight else None,
            outputs.sum(0) if needs_bias else None,
        )


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """a^T b: (n, p), (n, q) -> (p, q).

    oneDNN distributes the rows of a product over threads. A product with few long rows suits this better than one with
    many short rows. Therefore, if p <= q, a^T b is computed directly, and otherwise as the transpose of b^T a.
    """
    (count, p), q = a.shape, b.shape[1]
    if _IS_SLOWER_FOR_LONG_SUMS and q <= MAX_NARROW and p >= q and count >= MIN_LONG:
        with torch.autocast("cpu", enabled=False):
            return a.t() @ b
    if p <= q:
        return _multiply(a.t(), b.t())
    # Autograd would copy a transposed gradient anyway, and adding it to a tied weight's other one takes ten times as
    # long.
    return _multiply(b.t(), a.t()).t().contiguous()
