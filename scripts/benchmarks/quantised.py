"""Contenders in int8: copies of our models, quantised by the ranges of the benchmark's own input."""

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from common.nn import int8
from common.nn.observing import observing
from common.nn.quantisation import quantise

Model = TypeVar("Model", bound=nn.Module)

NAME = "ours int8"


def is_supported(device: torch.device) -> bool:
    """Whether a model on this device can compute in int8."""
    return device.type == "cpu" and int8.unsupported() is None


def quantised(model: Model, run: Callable[[Model], object]) -> Model:
    """Copy a model on the CPU, and quantise the copy by the ranges of its tensors in `run(copy)`."""
    model = copy.deepcopy(model)
    with torch.inference_mode(), observing(model) as ranges:
        run(model)
    quantise(model, ranges)
    return model
