"""What takes training steps, ours and peers', and the comparison of their first."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.config.check import build, construct
from common.train import optim
from common.train.optim import OptimizerOptions
from common.train.step import Stepper
from scripts.benchmarks.timing import alike, near

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Learner:
    """A model, what takes a step with it and returns the loss, and how our tensors lie under its names and shapes."""

    model: nn.Module
    step: Callable[[], Tensor]
    placed: Callable[[Tensors], Tensors] = dict


def stepper(
    model: nn.Module, recipe: dict[str, Any], data: Any, device: torch.device, precision: str, *, compiled: bool = False
) -> Stepper:
    """The trainer's own step, with our model, task and optimizer; `model` is moved to the device."""
    model.to(device)
    optimizer = optim.build(model, construct(OptimizerOptions, recipe["optimizer"]))
    if compiled:
        model.compile()
    task = build(recipe["task"], data=data)
    return Stepper(task, model, optimizer, device, precision, recipe["trainer"]["clip_norm"])


def same_step(
    learners: Mapping[str, Learner],
    start: Tensors,
    *,
    gradient: float,
    update: float,
    judged: Callable[[Tensor], bool] = lambda tensor: True,
) -> str:
    """Take every learner's first step, and compare losses, gradients and updates with those of "ours fp32".

    `start` are our first weights; `gradient` and `update` how far apart those may be in fp32, `judged` of which tensors
    the updates are compared. Raises Disagreement.
    """
    losses = {name: learner.step() for name, learner in learners.items()}
    truth, said = learners["ours fp32"], []
    weights, gradients = _weights(truth), _gradients(truth)
    for name, learner in learners.items():
        if learner is truth:
            continue
        rounded = "bf16" in name
        said.append(alike(f"{name} loss", losses[name], losses["ours fp32"], 0.02 if rounded else 1e-4))
        expected = _flat(learner.placed(gradients))
        said.append(near(f"{name} gradient", _flat(_gradients(learner)), expected, 0.2 if rounded else gradient))
        if not rounded:  # Adam's first step goes by the gradient's sign, and small ones' would be bf16's
            before, ours, theirs = learner.placed(start), learner.placed(weights), _weights(learner)
            names = [key for key in before if judged(before[key])]
            one, other = (
                _flat({key: after[key] - before[key].detach().cpu() for key in names}) for after in (theirs, ours)
            )
            said.append(near(f"{name} update", one, other, update))
    return "; ".join(said)


def _weights(learner: Learner) -> Tensors:
    return {name: p.detach().cpu() for name, p in learner.model.named_parameters()}


def _gradients(learner: Learner) -> Tensors:
    return {name: p.grad.cpu() for name, p in learner.model.named_parameters() if p.grad is not None}


def _flat(tensors: Tensors) -> Tensor:
    return torch.cat([tensors[name].detach().flatten() for name in sorted(tensors)])
