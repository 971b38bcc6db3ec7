"""Structured pruning: remove the attention heads and hidden neurons that the loss on val needs least.

A head's score is the loss that is measured without it (as in Michel et al. 2019, "Are Sixteen Heads Really Better than
One?", arXiv 1905.10650, section 3.2). Models have too many neurons for this. The estimate of a neuron's score is the
increase of the loss without it that the squared gradients of the samples predict (Theis et al. 2018, arXiv 1801.05787,
equation 6), which takes one backward pass for all neurons. Its measured score is that of a group of GROUP neurons of a
feed-forward that have similar estimates, which takes a forward pass for each group.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.nn.compressed import attentions, feed_forwards, keep_heads, keep_neurons, neurons_of
from scripts.compressing.measuring import Measure

ROUNDS = 4  # of heads: after each, the rest is measured again, since two heads may do the same

GROUP = 8  # neurons whose loss is measured together

Scores = dict[tuple[str, int], float]  # (name of a module, index of its head or neuron) -> score; the lowest go first


def remove_heads(model: nn.Module, measure: Measure, fraction: float) -> dict[str, int]:
    """Remove this fraction of all heads, in place; returns the numbers of heads left, by name of the attention.

    One head of each attention always stays. Raises UserError if the model has no heads to remove, or if the fraction
    removes none or leaves an attention without heads.
    """
    counts = {name: attention.heads for name, attention in attentions(model).items()}
    total = count_to_remove("prune.heads", "heads", fraction, counts, model)
    removed = 0
    for number in range(1, ROUNDS + 1):
        goal = math.ceil(total * number / ROUNDS)
        if goal > removed:
            kept = _select(head_losses(model, measure), goal - removed)
            for name, attention in attentions(model).items():
                keep_heads(attention, kept[name])
            removed = goal
    return {name: attention.heads for name, attention in attentions(model).items() if attention.heads < counts[name]}


def remove_neurons(model: nn.Module, measure: Measure, fraction: float, measured: bool = False) -> dict[str, int]:
    """Remove this fraction of all neurons, in place; returns the numbers of neurons left, by name of the feed-forward.

    They are ranked by `neuron_scores` or, if `measured`, by `group_losses`. One neuron of each feed-forward always
    stays. Raises UserError as `remove_heads` does.
    """
    parts = feed_forwards(model)
    counts = {name: neurons_of(part) for name, part in parts.items()}
    total = count_to_remove("prune.neurons", "neurons", fraction, counts, model)
    scores = neuron_scores(model, measure)
    kept = _select(group_losses(model, measure, scores) if measured else scores, total)
    for name, part in parts.items():
        keep_neurons(part, sorted(kept[name]))
    return {name: len(kept[name]) for name in parts if len(kept[name]) < counts[name]}


def count_to_remove(key: str, parts: str, fraction: float, counts: dict[str, int], model: nn.Module) -> int:
    """Return how many of all parts a fraction is; raises UserError if that is none, or leaves a module without any."""
    total, modules = sum(counts.values()), len(counts)
    if not modules:
        raise UserError(f"{key}={fraction:g}: {type(model).__name__} has no {parts} that can be removed; leave it out.")
    count = round(fraction * total)
    if count < 1:
        raise UserError(f"{key}={fraction:g} removes none of {total} {parts}; give at least {1 / total:.2g}.")
    if total - count < modules:
        most = math.floor(1000 * (total - modules) / total) / 1000
        advice = f"give at most {most:g}" if most else "leave it out"
        raise UserError(
            f"{key}={fraction:g} leaves {total - count} of {total} {parts}, but each of the {modules} modules that have"
            f" them keeps at least one; {advice}."
        )
    return count


def head_losses(model: nn.Module, measure: Measure) -> Scores:
    """Measure the loss on val without each head."""
    scores: Scores = {}
    for name, attention in attentions(model).items():
        for head in range(attention.heads):
            width = attention.inner_width // attention.heads
            with _without_inputs(attention.out_proj, list(range(head * width, (head + 1) * width))):
                scores[name, head] = measure(model)
    return scores


def group_losses(model: nn.Module, measure: Measure, estimates: Scores) -> Scores:
    """Measure the increase of the loss on val without each group of GROUP neurons, divided by their number.

    This is the score of each neuron of the group. The groups of a feed-forward are its neurons in the order of their
    estimates.
    """
    scores: Scores = {}
    dense = measure(model)
    for name, part in feed_forwards(model).items():
        of_part = [estimates[name, index] for index in range(neurons_of(part))]
        order = sorted(range(len(of_part)), key=of_part.__getitem__)
        for start in range(0, len(order), GROUP):
            group = order[start : start + GROUP]
            with _without_inputs(part.contract, group):
                increase = (measure(model) - dense) / len(group)
            scores |= {(name, index): increase for index in group}
    return scores


@contextmanager
def _without_inputs(module: nn.Module, columns: list[int]) -> Iterator[None]:
    """A context in which these channels of a linear map's input are zero."""

    def zero(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        x = inputs[0].clone()
        x[..., columns] = 0
        return (x,)

    handle = module.register_forward_pre_hook(zero)
    try:
        yield
    finally:
        handle.remove()


def neuron_scores(model: nn.Module, measure: Measure) -> Scores:
    """Predict the increase of the loss without each neuron.

    A neuron has a factor of 1, the gate, for each sample. The score is half the sum of the squared gradients with
    respect to these gates.
    """
    parts = feed_forwards(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sums = {name: torch.zeros(neurons_of(part), dtype=torch.float64) for name, part in parts.items()}
    with ExitStack() as stack:
        stack.callback(lambda: [parameter.requires_grad_(True) for parameter in trained])
        for parameter in trained:  # only the gates need gradients
            parameter.requires_grad_(False)
        gates: dict[str, list[Tensor]] = {name: [] for name in parts}
        for name, part in parts.items():
            stack.enter_context(_gated(part, gates[name]))
        for loss in measure.batch_losses(model):
            torch.autograd.backward(loss)
            for name, of_part in gates.items():
                for gate in of_part:
                    if gate.grad is not None:
                        sums[name] += gate.grad.double().square().flatten(0, -2).sum(0).cpu() / 2
                of_part.clear()
    return {(name, i): value for name, column in sums.items() for i, value in enumerate(column.tolist())}


@contextmanager
def _gated(feed_forward: Any, gates: list[Tensor]) -> Iterator[None]:
    """A context that multiplies hidden channels (B, ..., F) by gates (B, 1, ..., F) of 1, which are added to a list."""

    def multiply(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (x,) = inputs
        gate = x.new_ones(x.shape[0], *[1] * (x.ndim - 2), x.shape[-1]).requires_grad_()
        gates.append(gate)
        return (x * gate,)

    handle = feed_forward.contract.register_forward_pre_hook(multiply)
    try:
        yield
    finally:
        handle.remove()


def _select(scores: Scores, count: int) -> dict[str, list[int]]:
    """Remove the `count` parts with the lowest scores, but no module's last one; returns those that are left."""
    kept: dict[str, list[int]] = {}
    for name, index in scores:
        kept.setdefault(name, []).append(index)
    for name, index in sorted(scores, key=scores.__getitem__):
        if count and len(kept[name]) > 1:
            kept[name].remove(index)
            count -= 1
    return kept
