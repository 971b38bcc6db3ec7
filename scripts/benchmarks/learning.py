"""The contenders of training benchmarks, and a comparison of their first training steps.

A contender is a model of ours, or the same model in another library, in one precision.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.config.check import build, construct
from common.train import optim
from common.train.optim import OptimizerOptions
from common.train.step import Stepper
from scripts.benchmarks.timing import compare_numbers, compare_tensors

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class TrainingContender:
    """A model and its training step.

    step: runs one training step and returns the loss.
    from_ours: converts a dict of parameters or gradients from the names and shapes of our model to those of `model`.
    """

    model: nn.Module
    step: Callable[[], Tensor]
    from_ours: Callable[[Tensors], Tensors] = dict


def stepper(
    model: nn.Module, recipe: dict[str, Any], data: Any, device: torch.device, precision: str, *, compiled: bool = False
) -> Stepper:
    """Build the trainer's optimizer step for our model, and move the model to `device`.

    `recipe` is a config of train.py; its task, optimizer and `trainer.clip_norm` are used. `data` is passed to the
    constructor of the task. With `compiled`, the model is compiled by torch.compile.
    """
    model.to(device)
    optimizer = optim.build(model, construct(OptimizerOptions, recipe["optimizer"]))
    if compiled:
        model.compile()
    task = build(recipe["task"], data=data)
    return Stepper(task, model, optimizer, device, precision, recipe["trainer"]["clip_norm"])


def compare_first_steps(
    contenders: Mapping[str, TrainingContender],
    initial: Tensors,
    *,
    gradient_tolerance: float,
    update_tolerance: float,
    compares_update: Callable[[Tensor], bool] = lambda tensor: True,
) -> str:
    """Run each contender's first training step; compare loss, gradients and updates with those of "ours fp32".

    An update is the change of a parameter by the step. Returns a text with the differences. Raises MismatchError if a
    difference exceeds its tolerance. The tolerance of the loss is 1e-4 for contenders in fp32, and 0.02 in bf16. For
    contenders in bf16, the tolerance of the gradients is 0.2, and updates are not compared.

    initial: the weights of our model before the step, by name.
    gradient_tolerance: the largest accepted difference of the gradients in fp32, relative to their norm.
    update_tolerance: the largest accepted difference of the updates in fp32, relative to their norm.
    compares_update: is called with the initial values of a parameter, and returns whether its update is compared.
    """
    losses = {name: contender.step() for name, contender in contenders.items()}
    reference, differences = contenders["ours fp32"], []
    weights, gradients = _weights(reference), _gradients(reference)
    for name, contender in contenders.items():
        if contender is reference:
            continue
        bf16 = "bf16" in name
        differences.append(compare_numbers(f"{name} loss", losses[name], losses["ours fp32"], 0.02 if bf16 else 1e-4))
        expected = _flat(contender.from_ours(gradients))
        tolerance = 0.2 if bf16 else gradient_tolerance
        differences.append(compare_tensors(f"{name} gradient", _flat(_gradients(contender)), expected, tolerance))
        # Adam's first update depends almost only on the sign of the gradient. Rounding to bf16 changes this sign where
        # the gradient is small, so updates in bf16 are not compared.
        if not bf16:
            before, ours, theirs = contender.from_ours(initial), contender.from_ours(weights), _weights(contender)
            names = [key for key in before if compares_update(before[key])]
            update, expected = (
                _flat({key: after[key] - before[key].detach().cpu() for key in names}) for after in (theirs, ours)
            )
            differences.append(compare_tensors(f"{name} update", update, expected, update_tolerance))
    return "; ".join(differences)


def _weights(contender: TrainingContender) -> Tensors:
    return {name: p.detach().cpu() for name, p in contender.model.named_parameters()}


def _gradients(contender: TrainingContender) -> Tensors:
    return {name: p.grad.cpu() for name, p in contender.model.named_parameters() if p.grad is not None}


def _flat(tensors: Tensors) -> Tensor:
    return torch.cat([tensors[name].detach().flatten() for name in sorted(tensors)])
