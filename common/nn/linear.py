"""Linear maps, on the CPU by oneDNN's matrix product: the same sums, on some processors more than twice as fast.

torch hands fp32 products on the CPU to MKL, which leaves AMD's AVX-512 unused (96 against 214 GFLOP/s on one Zen 5
core, torch 2.15); oneDNN, which torch has beside it, uses what it finds. Where no gradient is wanted, weights are kept
in the order in which the kernel reads them, which again doubles the rate when there are few rows. Everywhere else this
is torch.nn.Linear.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_ONEDNN = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None  # type: ignore[no-untyped-call]
_PRODUCT = getattr(_ONEDNN, "_linear_pointwise", None)
_PACK = getattr(_ONEDNN, "_reorder_linear_weight", None)
_HAS_BF16 = _PRODUCT is not None and bool(getattr(_ONEDNN, "_is_mkldnn_bf16_supported", bool)())


class Linear(nn.Linear):
    """torch.nn.Linear, by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, rows: slice = slice(None)) -> Tensor:
    """x W^T + b: (..., in), (out, in), (out,) -> (..., out); or the outputs in `rows` alone."""
    kind = _kind(x, weight)
    if not _is_learning(x, weight, bias):
        if kind is not None:
            return _multiply(x.to(kind), *_packed(weight, bias, rows, kind))
    elif hasattr(weight, "packs"):
        del weight.packs  # it is about to change, by an optimizer that may not count that
    if rows != slice(None):
        weight, bias = weight[rows], None if bias is None else bias[rows]
    if kind == torch.float32:
        product: Tensor = _Linear.apply(x, weight, bias)
        return product
    return F.linear(x, weight, bias)


def _kind(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The type in which oneDNN is to be asked; None: not at all, as while tracing, where a compiler chooses."""
    if _PRODUCT is None or x.device.type != "cpu" or weight.dtype != torch.float32 or not x.numel():
        return None
    if torch.compiler.is_compiling() or not torch.backends.mkldnn.enabled:
        return None
    if torch.is_autocast_enabled("cpu"):
        return torch.bfloat16 if _HAS_BF16 and torch.get_autocast_dtype("cpu") == torch.bfloat16 else None
    return torch.float32 if x.dtype == torch.float32 else None


def _is_learning(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    wants = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    return torch.is_grad_enabled() and wants


def _packed(weight: Tensor, bias: Tensor | None, rows: slice, kind: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A part of weight and bias as the kernel likes them, kept with the weight until either changes.

    A tensor counts the changes of its memory (`_version`), also those made through what `state_dict` hands out. Fused
    optimizers do not count (torch 2.15); common/train/optim.py does it for them.
    """
    if not isinstance(weight, nn.Parameter) or weight.is_inference() or _PACK is None:
        return weight[rows].to(kind), None if bias is None else bias[rows].to(kind)
    name = (rows.start, rows.stop, kind)
    state = tuple((part.data_ptr(), part._version) for part in (weight, bias) if part is not None)
    packs: dict[Any, Any] = getattr(weight, "packs", {})
    if name not in packs or packs[name][0] != state:
        with torch.no_grad():
            ready = _PACK(weight[rows].to(kind)), None if bias is None else bias[rows].to(kind)
        packs[name] = state, ready
        weight.packs = packs  # type: ignore[attr-defined]
    found: tuple[Tensor, Tensor | None] = packs[name][1]
    return found


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
