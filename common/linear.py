"""Linear maps, on the CPU in fp32 by oneDNN's matrix product: the same sums, on some processors twice as fast.

torch hands fp32 products on the CPU to MKL, which leaves AMD's AVX-512 unused (96 against 214 GFLOP/s on one Zen 5
core, torch 2.15); oneDNN, which torch has beside it, uses what it finds. Everywhere else this is torch.nn.Linear.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_PRODUCT = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


class Linear(nn.Linear):
    """torch.nn.Linear, by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: (..., in), (out, in), (out,) -> (..., out)."""
    if not _suits(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        product: Tensor = _Linear.apply(x, weight, bias)
        return product
    return _multiply(x, weight, bias)


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is to be asked: not while tracing, where a compiler chooses, nor for what autocast makes bf16."""
    return (
        _PRODUCT is not None
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


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
        rows, columns = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])  # (n, in), (n, out)
        return (
            _multiply(gradient, weight.t()) if of_x else None,
            _outer(columns, rows) if of_weight else None,
            columns.sum(0) if of_bias else None,
        )


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """a^T b: (n, p), (n, q) -> (p, q); the kernel shares out the rows of a result, so the shorter side makes them."""
    if a.shape[1] <= b.shape[1]:
        return _multiply(a.t(), b.t())
    return _multiply(b.t(), a.t()).t()
