"""oneDNN's kernels for the CPU: linear maps and fused convolutions, and weights in the order that these read.

torch hands fp32 products on the CPU to MKL, which leaves AMD's AVX-512 unused (96 against 214 GFLOP/s on one Zen 5
core, torch 2.15); oneDNN, which torch ships as well, uses what it finds. Nothing outside this file knows of it, and
`torch.backends.mkldnn.flags(enabled=False)` is the one switch: without it, on other devices, while tracing, and for
tensor types other than torch's own, these functions are torch's.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MAX_PACKED_ROWS = 32  # in fp32 packed weights are faster from 2 rows to here (up to twice), and else slower or equal

_ONEDNN = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None
_PRODUCT = getattr(_ONEDNN, "_linear_pointwise", None)
_PACK = getattr(_ONEDNN, "_reorder_linear_weight", None)
_CONVOLUTION = getattr(_ONEDNN, "_convolution_pointwise", None)
_CONVOLUTION_ADD = getattr(_ONEDNN, "_convolution_pointwise_", None)
_PACK_CONVOLUTION = getattr(_ONEDNN, "_reorder_convolution_weight", None)
_HAS_BF16 = _PRODUCT is not None and bool(getattr(_ONEDNN, "_is_mkldnn_bf16_supported", bool)())


_DATA: Any = Tensor.data
_GRAD: Any = Tensor.grad


class Parameter(nn.Parameter):
    """A parameter that counts its changes, so that copies made from it are made again.

    Tensors count writes (`_version`), but not those through `data`, nor those of fused optimizers (torch 2.15). Here
    access to `data` counts as a change, and so does access to a gradient, which precedes every optimizer's write. Not
    counted are writes to an alias of its memory that was made before (`d = p.data`), and those of collectives.
    """

    changes = 0

    @property
    def data(self) -> Tensor:
        """The values without their history, in the same memory."""
        self.changes += 1
        values: Tensor = _DATA.__get__(self)
        return values

    @data.setter
    def data(self, values: Tensor) -> None:
        self.changes += 1
        _DATA.__set__(self, values)

    @property
    def grad(self) -> Tensor | None:
        """The gradient, or None."""
        self.changes += 1
        gradient: Tensor | None = _GRAD.__get__(self)
        return gradient

    @grad.setter
    def grad(self, gradient: Tensor | None) -> None:
        _GRAD.__set__(self, gradient)

    @grad.deleter
    def grad(self) -> None:
        _GRAD.__delete__(self)


_OWN_TYPES = (Tensor, nn.Parameter, Parameter)  # not DTensor, FakeTensor or quantised weights


class WeightCache:
    """What a module computes from a weight for its kernels, each until the weight changes; empty in its copies."""

    def __init__(self) -> None:
        self._entries: dict[Any, tuple[Tensor, tuple[Any, ...], list[Tensor], Any]] = {}

    def __reduce__(self) -> tuple[type["WeightCache"], tuple[()]]:
        return WeightCache, ()

    def clear(self) -> None:
        """Forget all of them."""
        self._entries.clear()

    def get(self, name: Any, weight: Tensor, make: Callable[[], Any], statistics: tuple[Tensor, ...] = ()) -> Any:
        """The result of `make`, from the last time if nothing that it depends on has changed since.

        Changes of `weight` are counted (`counts_changes`). Vectors of `statistics` are plain tensors: on the CPU they
        are compared, in a microsecond each; elsewhere the host would wait for that, and changes through `data` escape.
        """
        assert isinstance(weight, Parameter)
        state = weight.changes, *((tensor.data_ptr(), tensor._version) for tensor in (weight, *statistics))
        entry = self._entries.get(name)
        if entry and entry[0] is weight and entry[1] == state and all(map(torch.equal, entry[2], statistics)):
            return entry[3]
        # Not in inference mode: a gradient that passes through a convolution saves its weight.
        with torch.inference_mode(False), torch.no_grad():
            values = [tensor.clone() for tensor in statistics if tensor.device.type == "cpu"]
            self._entries[name] = weight, state, values, (made := make())
        return made


def counts_changes(weight: Tensor) -> bool:
    """Whether every change of a weight is counted, so that copies made from it can be kept."""
    return type(weight) is Parameter and not weight.is_inference()


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rows: slice = slice(None),
    cache: WeightCache | None = None,
) -> Tensor:
    """x W^T + b: (..., in), (out, in), (out,) -> (..., out); or the outputs in `rows` alone.

    `copies` belongs to the module of the weight; without it nothing is kept.
    """
    kind, learns = _product_dtype(x, weight), _needs_gradient(x, weight, bias)
    if learns and cache is not None:
        cache.clear()  # so that a write that is not counted, such as a collective's, is seen after a training step
    if kind is not None and not learns:
        ready = _prepared_weight(weight, rows, kind, x.numel() // x.shape[-1], cache)
        return _multiply(_cast(x, kind), ready, None if bias is None else _cast(_select_rows(bias, rows), kind))
    weight, bias = _select_rows(weight, rows), None if bias is None else _select_rows(bias, rows)
    if kind == torch.float32:
        product: Tensor = _Linear.apply(x, weight, bias)
        return product
    return F.linear(x, weight, bias)


def can_fuse(x: Tensor, weight: Tensor, shortcut: Tensor | None) -> bool:
    """Whether `convolution_relu` computes a layer."""
    if None in (_CONVOLUTION, _CONVOLUTION_ADD, _PACK_CONVOLUTION) or not _supports(x, weight, shortcut):
        return False
    if _needs_gradient(x, weight, shortcut) or not x.numel():
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    return dtype in ((torch.float32, torch.bfloat16) if _HAS_BF16 else (torch.float32,))


def convolution_relu(
    conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None
) -> Tensor:
    """relu(conv(x) + shortcut) in one pass over the map, with a weight from `pack_convolution`; overwrites shortcut."""
    assert _CONVOLUTION is not None and _CONVOLUTION_ADD is not None
    x = x.to(weight.dtype)
    geometry = conv.padding, conv.stride, conv.dilation, conv.groups
    y: Tensor
    if shortcut is None:
        y = _CONVOLUTION(x, weight, bias, *geometry, "relu", [], "")
    else:
        y = _CONVOLUTION_ADD(shortcut.to(weight.dtype), x, weight, bias, *geometry, "add", 1.0, "relu", [], "")
    return y


def pack_convolution(weight: Tensor, conv: nn.Conv2d) -> Tensor:
    """A weight in the order that the convolution's kernel reads."""
    assert _PACK_CONVOLUTION is not None
    if weight.dtype == torch.float32 and conv.kernel_size != (3, 3):
        return weight  # the best order depends on the map's size, and another's is up to 10 times as slow
    like = [1, conv.in_channels, 32, 32]  # any map: without one it takes an order that is slow in the same way
    packed: Tensor = _PACK_CONVOLUTION(weight, conv.padding, conv.stride, conv.dilation, conv.groups, like)
    return packed


def _supports(*tensors: Tensor | None) -> bool:
    """Whether oneDNN is switched on, and for tensors such as these; while tracing, a compiler chooses."""
    if torch.compiler.is_compiling() or not torch.backends.mkldnn.enabled:
        return False
    for tensor in tensors:  # not all(...), whose generator takes longer than the loop
        if tensor is not None and (type(tensor) not in _OWN_TYPES or not tensor.is_cpu):
            return False
    return True


def _product_dtype(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The type in which oneDNN computes a product; None: torch computes it."""
    if _PRODUCT is None or not _supports(x, weight) or weight.dtype != torch.float32 or not x.numel():
        return None
    if torch.is_autocast_enabled("cpu"):
        return torch.bfloat16 if _HAS_BF16 and torch.get_autocast_dtype("cpu") == torch.bfloat16 else None
    return torch.float32 if x.dtype == torch.float32 else None


def _needs_gradient(*tensors: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _prepared_weight(weight: Tensor, rows: slice, kind: torch.dtype, count: int, cache: WeightCache | None) -> Tensor:
    """Some rows of a weight for a product with `count` rows of inputs, packed where that is faster."""
    pays = kind == torch.bfloat16 or 1 < count <= MAX_PACKED_ROWS
    if not pays or cache is None or _PACK is None or not counts_changes(weight):
        return _cast(_select_rows(weight, rows), kind)
    packed: Tensor = cache.get((rows.start, rows.stop, kind), weight, lambda: _PACK(weight[rows].to(kind)))
    return packed


def _select_rows(tensor: Tensor, rows: slice) -> Tensor:
    """Some rows, without a view where these are all: in small products one takes a tenth of the time."""
    return tensor if rows.start is None and rows.stop is None else tensor[rows]


def _cast(tensor: Tensor, kind: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == kind else tensor.to(kind)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    assert _PRODUCT is not None
    product: Tensor = _PRODUCT(x, weight, bias, "none", [], "")
    return product


class _Linear(torch.autograd.Function):
    """The product with its gradients, by the same kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        inputs, outputs = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])  # (n, in), (n, out)
        return (
            _multiply(gradient, weight.t()) if of_x else None,
            _outer(outputs, inputs) if of_weight else None,
            outputs.sum(0) if of_bias else None,
        )


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """a^T b: (n, p), (n, q) -> (p, q); the kernel shares out the rows of a result, so the shorter side makes them."""
    if a.shape[1] <= b.shape[1]:
        return _multiply(a.t(), b.t())
    return _multiply(b.t(), a.t()).t()
