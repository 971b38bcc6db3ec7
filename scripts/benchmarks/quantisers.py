"""torch.ao and torchao as contenders: our model, whose linear maps they compute in int8 on the CPU.

Both quantise weights in advance, and the inputs of linear maps in each call. All else is computed in fp32, by our model
with plain linear modules (`common.nn.linear.opened`).
"""

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from common.nn.linear import opened
from scripts.benchmarks import quantised
from scripts.benchmarks.engines import Engines, is_installed

TORCH_AO, TORCHAO = "torch.ao int8", "torchao int8"
PAIRS: list[tuple[str, str | tuple[str, ...]]] = [(quantised.NAME, TORCH_AO), (quantised.NAME, TORCHAO)]


def quantisers(device: torch.device, model: nn.Module, images: Tensor) -> Engines:
    """Make the contenders for a model from images (B, 3, H, W) to a tensor."""
    if device.type != "cpu":
        return Engines({}, [])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao says that it will be removed
        spec = {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}  # as ours and torchao's
        models = {TORCH_AO: torch.ao.quantization.quantize_dynamic(opened(model), spec)}
        notes: list[str] = []
        if is_installed(notes, TORCHAO, "torchao"):
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

            models[TORCHAO] = opened(model)
            quantize_(models[TORCHAO], Int8DynamicActivationInt8WeightConfig())
    contenders: dict[str, Callable[[], list[Tensor]]] = {
        name: partial(_infer, quantised_model, images) for name, quantised_model in models.items()
    }
    return Engines(contenders, notes)


def _infer(model: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return [model(images)]
