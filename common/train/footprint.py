"""Estimate the memory that a model's parameters need, before any of it is allocated."""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from common.config.check import build_model
from common.errors import UserError
from common.machine import memory
from common.task import Task

BYTES = 4  # of a parameter, a gradient or a moment, which are fp32
GIB = 2**30


class Footprint(NamedTuple):
    """The numbers of elements of a model, and its largest parameter."""

    all: int  # parameters and buffers
    trained: int  # parameters that get gradients
    largest: str  # name and shape


def measure(section: Mapping[str, Any], task: Task) -> Footprint | None:
    """Count the elements of the model that a checked section describes, without allocating them.

    The model is built on the device `meta`, where tensors have shapes and no content. Returns None for a model that
    cannot be built there, such as one whose constructor computes with the values of tensors.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            model: nn.Module = build_model(section, task)
        parameters = dict(model.named_parameters())
        tensors = [*parameters.values(), *model.buffers()]
        name = max(parameters, key=lambda key: parameters[key].numel())
        trained = sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad)
        return Footprint(sum(tensor.numel() for tensor in tensors), trained, f"{name} {tuple(parameters[name].shape)}")
    except Exception as error:  # a mistake in the config is reported when the model is built
        if "overflow" in str(error):  # "Storage size calculation overflowed": more than 2^63 bytes
            return Footprint(2**63, 2**63, "one of more than 2^63 bytes")
        return None


def refuse_oversize(config: Mapping[str, Any], task: Task, device: torch.device, *, training: bool) -> None:
    """Raise UserError for a model that needs more memory than the machine has, unless check_memory is false.

    The weights must fit on the CPU, where models are built. In training without FSDP, the weights, gradients, optimizer
    moments and moving average must together fit on `device`. Activations are not counted, because they depend on the
    batch.
    """
    footprint = measure(config["model"], task) if config.get("check_memory", True) else None
    if footprint is None:
        return
    needs = [("to hold the weights", footprint.all * BYTES, torch.device("cpu"))]
    if training and config["trainer"]["strategy"] != "fsdp":  # which divides them among the processes
        optimizer = config["optimizer"]
        moments = 2 if optimizer["name"] in ("adamw", "adam") else int(optimizer["momentum"] > 0)
        copies = 1 + moments + (config["trainer"]["ema_decay"] > 0)
        needs.append(("to be trained", (footprint.all + copies * footprint.trained) * BYTES, device))
    for purpose, need, where in needs:
        available = memory.capacity(where)
        if available is not None and need > available:
            raise UserError(
                f"model: {footprint.all:,} parameters need {need / GIB:,.1f} GiB {purpose}, and the {where.type} has "
                f"{available / GIB:,.1f} GiB (the largest parameter is {footprint.largest}); give a smaller model, or "
                "check_memory=false to try it nevertheless."
            )
