"""Floating-point operations of a model's products, and how many of them a second this device can do.

A model's operations are those of its matrix products, convolutions and attention, each counted once by PyTorch: nothing
is added for what is computed twice, and nothing for norms, softmax or an optimizer. Over what a large matrix product
reaches in the same run that is the model-FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311, appendix B), but
for its limit, which is measured here and not read in a data sheet.
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

SIDES = {"cpu": (512, 1024, 2048, 4096), "cuda": (4096, 8192, 16384)}  # of square matrices, tried in this order
LONGEST = 1.0  # seconds of a product, after which no larger one is tried: emulated bf16 takes minutes


@dataclass(frozen=True, kw_only=True)
class Product:
    """A large matrix product."""

    work: Callable[[], Tensor]
    operations: float


def operations(model: nn.Module, *inputs: Any, training: bool) -> float:
    """Of a forward pass, or of a training step's forward and backward pass; what is frozen has no backward pass.

    Nothing is computed, and no memory is needed.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings(action="ignore"):  # of other GPUs
        tensors = {name: _hollow(p).requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
        tensors |= {name: _hollow(buffer) for name, buffer in model.named_buffers()}
        given = tuple(_hollow(one) if isinstance(one, Tensor) else one for one in inputs)
        with FlopCounterMode(display=False) as counter, torch.enable_grad():  # the counter fails where none is wanted
            outputs = functional_call(model, tensors, given)
            if training:
                layers = outputs if isinstance(outputs, list) else [outputs]
                parts = [part for layer in layers for part in (layer.values() if isinstance(layer, dict) else [layer])]
                torch.autograd.backward([part.sum() for part in parts])
    return float(counter.get_total_flops())


def _hollow(tensor: Tensor) -> Tensor:
    """One without values, on the CPU: other devices may not be there, and "meta" knows no autocast."""
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def each(contenders: Iterable[str], counted: float) -> dict[str, tuple[float, str]]:
    """The same operations for all contenders, in the precision that their names hold: Row.flops."""
    return {name: (counted, "bf16" if "bf16" in name else "fp32") for name in contenders}


def product(precision: str, device: torch.device) -> Product:
    """Matrices of the size at which this device is fastest, by the fastest product that it has.

    On the CPU that is common/nn/linear.py's: torch's own `@` is half as fast on some. On CUDA, fp32 is
    exact while convolutions take TF32, so that a model of convolutions may do better than this limit.
    """
    best, most = _product(SIDES.get(device.type, SIDES["cpu"])[0], precision, device), 0.0
    for side in SIDES.get(device.type, SIDES["cpu"]):
        tried = _product(side, precision, device)
        seconds = _seconds(tried.work)
        rate = tried.operations / seconds
        if rate < most:
            break  # larger ones leave the caches
        best, most = tried, rate
        if seconds > LONGEST:
            break
    return best


def _product(side: int, precision: str, device: torch.device) -> Product:
    kind = DTYPES[precision]
    one = torch.randn(side, side, device=device, dtype=kind)
    other = torch.randn(side, side, device=device, dtype=kind)
    linear = Linear(side, side, bias=False)

    def work() -> Tensor:
        with torch.no_grad(), autocast(device, precision):
            product: Tensor = linear(one) if device.type == "cpu" else one @ other
            return product

    return Product(work=work, operations=2.0 * side**3)


def _seconds(work: Callable[[], Tensor], calls: int = 3) -> float:
    """Of the fastest call after a first one, or of that if it takes long; taking a number out waits for the device."""
    taken = []
    for _ in range(1 + calls):
        start = time.perf_counter()
        work()[0, 0].item()
        taken.append(time.perf_counter() - start)
        if taken[0] > LONGEST:
            return taken[0]
    return min(taken[1:])
