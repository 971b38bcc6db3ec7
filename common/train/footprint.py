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

BYTES = 4  # of one element of a parameter, gradient or moment, all of them fp32
GIB = 2**30


class Footprint(NamedTuple):
    """The numbers of elements in a model's tensors, and its largest parameter."""

    all: int  # elements of parameters and buffers
    trained: int  # elements of parameters that get gradients
    largest: str  # the largest parameter's name and shape, for messages


def measure(section: Mapping[str, Any], task: Task) -> Footprint | None:
    """Count the elements of the model that the checked config `section` describes, without allocating their memory.

    The model is built on PyTorch's device `meta`, where tensors have a shape but no data. If a tensor has more than
    2^63 bytes, PyTorch cannot build it, and both numbers in the result are 2^63. Returns None if the model cannot be
    built for another reason, for example because its constructor reads the values of a tensor.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            model: nn.Module = build_model(section, task)
        parameters = dict(model.named_parameters())
        tensors = [*parameters.values(), *model.buffers()]
        name = max(parameters, key=lambda key: parameters[key].numel())
        trained = sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad)
        return Footprint(sum(tensor.numel() for tensor in tensors), trained, f"{name} {tuple(parameters[name].shape)}")
    except Exception as error:  # a mistake in the config raises its error again when the model is built
        if "overflow" in str(error):  # "Storage size calculation overflowed": more than 2^63 bytes
            return Footprint(2**63, 2**63, "one of more than 2^63 bytes")
        return None


def refuse_oversize(config: Mapping[str, Any], task: Task, device: torch.device, *, training: bool) -> None:
    """Raise UserError for a model that needs more memory than the machine has, unless check_memory is false.

    Models are built on the CPU, so the weights must fit into its memory. In training without FSDP, the weights,
    gradients, optimizer moments and moving average must together fit into the memory of `device`. Activations are not
    counted, because they depend on the batch. A model is not refused if `measure` returns None, or if the operating
    system does not state the size of the memory.
    """
    footprint = measure(config["model"], task) if config.get("check_memory", True) else None
    if footprint is None:
        return
    needs = [("to hold the weights", footprint.all * BYTES, torch.device("cpu"))]
    if training and config["trainer"]["strategy"] != "fsdp":  # fsdp divides these tensors among the processes
        optimizer = config["optimizer"]
        # Muon's matrices have one moment. Its parameters with two (embeddings, heads) are counted with one, too.
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
