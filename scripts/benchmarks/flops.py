"""Count the floating-point operations of a model, and measure the operations per second of a large matrix product.

PyTorch's FlopCounterMode counts matrix products, convolutions and attention. It does not count norms, softmax or the
optimizer. A model's operations per second, divided by the device's peak operations per second, are its model-FLOPs
utilisation (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).

Differs: the peak is measured with a large matrix product, not taken from a data sheet. The attention scores that the
backward pass of fused attention recomputes are counted.
"""

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from common.machine.device import DTYPES, autocast
from common.nn.linear import Linear

MATRIX_SIDES = {"cpu": (512, 1024, 2048, 4096), "cuda": (4096, 8192, 16384)}  # of square matrices, tried in this order
# No larger product is tried after one that takes longer than this. On a CPU that emulates bf16, larger products take
# minutes.
MAX_PRODUCT_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class MatrixProduct:
    """A function that computes a large matrix product, and the number of floating-point operations in one call."""

    work: Callable[[], Tensor]
    operations: float


def operations(model: nn.Module, *inputs: Any, training: bool) -> float:
    """Count the floating-point operations of `model(*inputs)` or, with `training`, of its forward and backward pass.

    Gradients of frozen parameters are not counted. The model runs on PyTorch's fake tensors, which have shapes but no
    values. Therefore nothing is computed, and no memory is allocated.
    """
    # The ignored warnings concern other GPUs than the one in use.
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings(action="ignore"):
        tensors = {name: _without_values(p).requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
        tensors |= {name: _without_values(buffer) for name, buffer in model.named_buffers()}
        arguments = tuple(_without_values(value) if isinstance(value, Tensor) else value for value in inputs)
        with FlopCounterMode(display=False) as counter, torch.enable_grad():  # the counter fails in no_grad mode
            outputs = functional_call(model, tensors, arguments)
            if training:
                per_layer = outputs if isinstance(outputs, list) else [outputs]
                groups = [output.values() if isinstance(output, dict) else [output] for output in per_layer]
                torch.autograd.backward([tensor.sum() for group in groups for tensor in group])
    return float(counter.get_total_flops())


def _without_values(tensor: Tensor) -> Tensor:
    """Make a CPU tensor with the shape and dtype of `tensor`, but not its values.

    The device is "cpu" because every machine has it and because it supports autocast, which "meta" does not.
    """
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def per_contender(contenders: Iterable[str], operations: float) -> dict[str, tuple[float, str]]:
    """Make the value of `Row.flops` for contenders that all need the same number of operations.

    Returns contender -> (operations, precision). The precision is "bf16" if the contender's name contains "bf16", and
    "fp32" otherwise.
    """
    return {name: (operations, "bf16" if "bf16" in name else "fp32") for name in contenders}


def fastest_product(precision: str, device: torch.device) -> MatrixProduct:
    """Find the product of two square matrices that reaches the most operations per second on `device`.

    The sides in MATRIX_SIDES are tried in ascending order, until the rate falls or a product takes more than
    MAX_PRODUCT_SECONDS. On the CPU, the product is computed by common/nn/linear.py, since torch's `@` is half as fast
    on some processors. On CUDA, convolutions in fp32 use TF32, but these products do not. A convolutional model may
    therefore reach more operations per second than the product.
    """
    sides = MATRIX_SIDES.get(device.type, MATRIX_SIDES["cpu"])
    fastest, highest_rate = _product(sides[0], precision, device), 0.0
    for side in sides:
        candidate = _product(side, precision, device)
        seconds = _seconds(candidate.work)
        rate = candidate.operations / seconds
        if rate < highest_rate:
            break  # larger matrices exceed the caches and are slower
        fastest, highest_rate = candidate, rate
        if seconds > MAX_PRODUCT_SECONDS:
            break
    return fastest


def _product(side: int, precision: str, device: torch.device) -> MatrixProduct:
    dtype = DTYPES[precision]
    a = torch.randn(side, side, device=device, dtype=dtype)
    b = torch.randn(side, side, device=device, dtype=dtype)
    linear = Linear(side, side, bias=False)

    def work() -> Tensor:
        with torch.no_grad(), autocast(device, precision):
            product: Tensor = linear(a) if device.type == "cpu" else a @ b
            return product

    return MatrixProduct(work=work, operations=2.0 * side**3)


def _seconds(work: Callable[[], Tensor], calls: int = 3) -> float:
    """Call `work` once to warm up, then `calls` times; returns the shortest time of these `calls` calls in seconds.

    If the warm-up call takes more than MAX_PRODUCT_SECONDS, its time is returned, and there are no further calls.
    """
    seconds = []
    for _ in range(1 + calls):
        start = time.perf_counter()
        work()[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
        if seconds[0] > MAX_PRODUCT_SECONDS:
            return seconds[0]
    return min(seconds[1:])
