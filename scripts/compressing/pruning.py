"""Structured pruning: remove the attention heads and hidden neurons that the loss on val needs least.

A head's score is the loss that is measured without it (as in Michel et al. 2019, "Are Sixteen Heads Really Better than
One?", arXiv 1905.10650, section 3.2). Models have too many neurons for this. A neuron's score is the increase of the
loss without it that the squared gradients of the samples predict (Theis et al. 2018, arXiv 1801.05787, equation 6),
which takes one backward pass for all neurons.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.nn.attention import Attention
from common.nn.compressed import attentions, feed_forwards, keep_heads, keep_neurons, neurons_of
from scripts.compressing.measuring import Measure

ROUNDS = 4  # of heads: after each, the rest is measured again, since two heads may do the same

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


def remove_neurons(model: nn.Module, measure: Measure, fraction: float) -> dict[str, int]:
    """Remove this fraction of all neurons, in place; returns the numbers of neurons left, by name of the feed-forward.

    One neuron of each feed-forward always stays. Raises UserError as `remove_heads` does.
    """
    parts = feed_forwards(model)
    counts = {name: neurons_of(part) for name, part in parts.items()}
    total = count_to_remove("prune.neurons", "neurons", fraction, counts, model)
    kept = _select(neuron_scores(model, measure), total)
    for name, part in parts.items():
        keep_neurons(part, kept[name])
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
            with _without_head(attention, head):
                scores[name, head] = measure(model)
    return scores


@contextmanager
def _without_head(attention: Attention, head: int) -> Iterator[None]:
    """A context in which the output of a head is zero."""
    width = attention.inner_width // attention.heads

    def zero(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        x = inputs[0].clone()
        x[..., head * width : (head + 1) * width] = 0
        return (x,)

    handle = attention.out_proj.register_forward_pre_hook(zero)
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
