"""Floating-point operations of a model, and the rate of a large matrix product on this device.

PyTorch's counter counts matrix products, convolutions and attention; recomputation, norms, softmax and the optimizer
are not counted. A model's operations per second divided by those of a large matrix product are its
model-FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311, appendix B). Differs: the highest rate of the device
is measured, not taken from a data sheet.
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
MAX_PRODUCT_SECONDS = 1.0  # no larger product is tried after a slower one; emulated bf16 would take minutes


@dataclass(frozen=True, kw_only=True)
class MatrixProduct:
    """A large matrix product and its number of operations."""

    work: Callable[[], Tensor]
    operations: float


def operations(model: nn.Module, *inputs: Any, training: bool) -> float:
    """Count the operations of a forward pass or, with `training`, of a forward and a backward pass.

    Frozen parameters get no gradients. Fake tensors are used, so nothing is computed and no memory is allocated.
    """
    # The ignored warnings are about other GPUs than this one.
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings(action="ignore"):
        tensors = {name: _without_values(p).requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
        tensors |= {name: _without_values(buffer) for name, buffer in model.named_buffers()}
        arguments = tuple(_without_values(value) if isinstance(value, Tensor) else value for value in inputs)
        with FlopCounterMode(display=False) as counter, torch.enable_grad():  # the counter fails without gradients
            outputs = functional_call(model, tensors, arguments)
            if training:
                per_layer = outputs if isinstance(outputs, list) else [outputs]
                groups = [output.values() if isinstance(output, dict) else [output] for output in per_layer]
                torch.autograd.backward([tensor.sum() for group in groups for tensor in group])
    return float(counter.get_total_flops())


def _without_values(tensor: Tensor) -> Tensor:
    """A CPU tensor of the same shape and type; the CPU always exists and, unlike "meta", supports autocast."""
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def per_contender(contenders: Iterable[str], operations: float) -> dict[str, tuple[float, str]]:
    """Make `Row.flops`: the same number of operations for all contenders, with the precision that each name holds."""
    return {name: (operations, "bf16" if "bf16" in name else "fp32") for name in contenders}


def fastest_product(precision: str, device: torch.device) -> MatrixProduct:
    """Find the square matrix product with the most operations per second on this device.

    On the CPU, common/nn/linear.py computes it, since torch's `@` is half as fast on some processors. On CUDA, fp32
    products do not use TF32 while convolutions do, so a convolutional model may exceed this rate.
    """
    sides = MATRIX_SIDES.get(device.type, MATRIX_SIDES["cpu"])
    fastest, highest_rate = _product(sides[0], precision, device), 0.0
    for side in sides:
        candidate = _product(side, precision, device)
        seconds = _seconds(candidate.work)
        rate = candidate.operations / seconds
        if rate < highest_rate:
            break  # larger matrices exceed the caches
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
    """The time of the first call if it exceeds MAX_PRODUCT_SECONDS, else of the fastest of `calls` further calls."""
    seconds = []
    for _ in range(1 + calls):
        start = time.perf_counter()
        work()[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
        if seconds[0] > MAX_PRODUCT_SECONDS:
            return seconds[0]
    return min(seconds[1:])
