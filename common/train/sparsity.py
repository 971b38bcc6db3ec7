"""Magnitude pruning in training: the smallest weights become zero and stay zero, more of them as the run goes on.

The schedule is that of Zhu and Gupta 2017, "To prune, or not to prune", arXiv 1710.01878, equation 1, with no zeros at
its start. The mask of a weight matrix is where it is not zero. A checkpoint thus holds the masks in its weights, under
the names of a dense model, and a resumed run continues with the same masks.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.nn.attention import Attention
from common.nn.blocks import FeedForward
from common.types import Fraction, Positive, Range

MAX_ZEROS = 0.95  # of one matrix: pruned by one threshold for all layers, some layers would otherwise become empty


@dataclass(frozen=True, kw_only=True)
class SparsityOptions:
    """How many weights are zero at the end of a run, and when they become zero.

    fraction: the share of zeros among the weights of all attentions and feed-forwards, without biases and norms.
    ramp: the part of the run's steps in which the share rises from 0 to `fraction`.
    every: number of steps between two increases.
    """

    fraction: Annotated[float, Range(above=0.0, high=MAX_ZEROS)]
    ramp: Fraction
    every: Positive


class Sparsifier:
    """Sets weights to zero after optimizer steps; the embeddings, heads, norms and biases of the model stay dense.

    Raises UserError for a model without attention and feed-forward blocks.
    """

    def __init__(self, model: nn.Module, options: SparsityOptions, total: int):
        """Prepare the pruning of `model` in a run of `total` steps."""
        self.options = options
        self.weights = {name: weight for name, weight in prunable_weights(model).items() if weight.requires_grad}
        if not self.weights:
            raise UserError(
                f"trainer.sparsity prunes the weights of attentions and feed-forwards, of which {type(model).__name__} "
                "trains none; give null."
            )
        self.last_increase = max(1, round(options.ramp * total))  # the number of steps before it

    def summary(self) -> str:
        """Describe the zeros at the end of the run, for the log."""
        count = sum(weight.numel() for weight in self.weights.values())
        return (
            f"{self.options.fraction:.4g} of {count:,} weights of blocks are zero from step {self.last_increase:,} on"
        )

    def fraction(self, step: int) -> float:
        """The share of zeros after `step` steps; it rises fast at first and slowly at last."""
        return self.options.fraction * (1 - (1 - min(1.0, step / self.last_increase)) ** 3)

    def is_complete(self, step: int) -> bool:
        """Whether all weights that will be zero are zero after `step` steps."""
        return step >= self.last_increase

    @contextmanager
    def keeping_zeros(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """A context for an optimizer step: weights that are zero before it are zero after it, and so is their momentum.

        Otherwise momentum would move them again.
        """
        masks = {name: weight.detach() != 0 for name, weight in self.weights.items()}
        yield
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.mul_(masks[name])
                for moment in optimizer.state.get(weight, {}).values():
                    if isinstance(moment, Tensor) and moment.shape == weight.shape:
                        moment.mul_(masks[name])

    def increase(self, step: int) -> None:
        """Set further weights to zero if an increase is due after `step` steps."""
        if step <= self.last_increase and (step % self.options.every == 0 or step == self.last_increase):
            zero_smallest(list(self.weights.values()), self.fraction(step))

    @torch.no_grad()
    def apply_to(self, average: dict[str, Tensor]) -> None:
        """Set the zeros of the weights in a moving average of the weights, too, given by name."""
        for name, weight in self.weights.items():
            average[name].mul_(weight != 0)


def prunable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weight matrices of all attentions and feed-forwards by name; a shared one occurs once."""
    parts = {name: part for name, part in model.named_modules() if isinstance(part, Attention | FeedForward)}
    named = [(f"{name}.{key}", p) for name, part in parts.items() for key, p in part.named_parameters() if p.ndim == 2]
    unique = {id(parameter): (name, parameter) for name, parameter in reversed(named)}
    return {name: parameter for name, parameter in reversed(unique.values())}


@torch.no_grad()
def zero_smallest(weights: Sequence[Tensor], fraction: float) -> None:
    """Set the `fraction` of all elements that have the smallest magnitudes to zero, in place.

    One threshold applies to all tensors, but at most `MAX_ZEROS` of each become zero.
    """
    magnitudes = []
    for weight in weights:
        magnitude = weight.abs().flatten()
        kept = len(magnitude) - math.floor(MAX_ZEROS * len(magnitude))
        magnitudes.append(magnitude.index_fill_(0, magnitude.topk(kept).indices, math.inf))
    everything = torch.cat(magnitudes)
    count = min(round(fraction * len(everything)), int(everything.isfinite().sum()))
    if count == 0:
        return
    threshold = everything.kthvalue(count).values
    for weight, magnitude in zip(weights, magnitudes, strict=True):
        weight.masked_fill_((magnitude <= threshold).view_as(weight), 0)
