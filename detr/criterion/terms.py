"""The terms of a detector's loss. Each term is a sum over the output rows of a layer, divided by a normaliser.

An output row is one prediction of a layer: logits and a box. answers.py defines the letters in shapes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from detr.criterion.answers import Matches, Outputs, Targets, upcast_half
from detr.criterion.boxes import giou, to_xyxy

OnRequest = Mapping[str, Callable[[Tensor, Tensor], Tensor]]  # (M,) images, (M,) rows -> (M, ...)


class Comparison:
    """The inputs of a term: the outputs of L layers, the T objects, and the M matched pairs.

    `on_request` maps the names of outputs that are computed for the matched rows alone to functions of the indices
    (M,) of their images and rows. `answers` caches its results, because several terms read the same output.
    `mask_pairs` is the cache of detr/criterion/masks.py.
    """

    def __init__(self, outputs: Outputs, targets: Targets, matches: Matches, on_request: OnRequest | None = None):
        self.outputs, self.targets, self.matches = outputs, targets, matches
        self.on_request = on_request or {}
        self._gathered: dict[str, Tensor] = {}
        self.mask_pairs: list[tuple[Tensor, Tensor]] | None = None

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """The indices of layer, image and output row of each pair, (M,) each."""
        return self.matches[:3]

    def answers(self, name: str) -> Tensor:
        """Select the output `name` in the row of each pair: (L, B, R, ...) -> (M, ...)."""
        if name not in self._gathered:
            given = name in self.outputs
            values = self.outputs[name][self.rows] if given else self.on_request[name](*self.rows[1:])
            self._gathered[name] = upcast_half(values)
        return self._gathered[name]

    def has(self, name: str) -> bool:
        """Whether the outputs include `name`."""
        return name in self.outputs or name in self.on_request

    def objects(self, values: Tensor) -> Tensor:
        """Select the value of each pair's object: values (T, ...) -> (M, ...)."""
        return values[self.matches.targets]

    def per_layer(self, values: Tensor) -> Tensor:
        """Sum the values of the pairs of each layer: (M,) -> (L,)."""
        return values.new_zeros(len(self.outputs["logits"])).index_add(0, self.matches.layers, values)

    def sum_rows(self, values: Tensor) -> Tensor:
        """Sum the values of all rows of each layer, except padding rows: (L, B, R) -> (L,)."""
        return (values if "real" not in self.outputs else values * self.outputs["real"]).sum((1, 2))


@dataclass(frozen=True)
class Term(ABC):
    """A term and its weight in the loss."""

    weight: float
    name: ClassVar[str]  # the term's name in the log and in the key of its normaliser
    reads: ClassVar[str]  # the output that the term reads; answer sets without this output skip the term
    layers: ClassVar[Literal["all", "last"]] = "all"  # the decoder layers for which the term is computed

    @abstractmethod
    def __call__(self, comparison: Comparison) -> Tensor:
        """Compute the unweighted sum over the rows and images of each layer, (L,)."""

    def normaliser(self, counts: Sequence[int], rows: Sequence[int]) -> float:
        """Return what a batch adds to the term's divisor; by default, this is the number of objects in the batch.

        Image i has counts[i] objects and rows[i] output rows in one layer.
        """
        return float(sum(counts))


@dataclass(frozen=True)
class CrossEntropy(Term):
    """Cross-entropy over the classes and "no object" (Carion et al. 2020, arXiv 2005.12872, equation 2)."""

    no_object: float  # weight of unmatched rows
    name = "class"
    reads = "logits"

    def __call__(self, comparison: Comparison) -> Tensor:
        """See Term."""
        logits, labels = comparison.outputs["logits"], comparison.targets.labels
        no_object = logits.shape[-1] - 1
        classes = labels.new_full(logits.shape[:3], no_object).index_put(comparison.rows, comparison.objects(labels))
        nll = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction="none").view_as(classes)  # (L, B, R)
        class_weights = torch.ones_like(nll).masked_fill(classes == no_object, self.no_object)
        return comparison.sum_rows(nll * class_weights)

    def normaliser(self, counts: Sequence[int], rows: Sequence[int]) -> float:
        """Return the sum of the weights of all output rows in one layer of the batch.

        In an image with R rows and n objects, min(n, R) rows are matched and have weight 1. The other rows have weight
        `no_object`.
        """
        matched = [(min(n, R), R) for n, R in zip(counts, rows, strict=True)]
        return float(sum(n + self.no_object * (R - n) for n, R in matched))


@dataclass(frozen=True)
class Focal(Term):
    """The sigmoid focal loss, summed over the classes (Lin et al. 2017, arXiv 1708.02002, equation 5)."""

    alpha: float  # weight of the true class; every other class has weight 1 - alpha
    gamma: float  # exponent of (1 - p)^gamma, where p is the predicted probability of the correct answer
    name = "class"
    reads = "logits"

    def __call__(self, comparison: Comparison) -> Tensor:
        """See Term."""
        logits = comparison.outputs["logits"]
        indices = (*comparison.rows, comparison.objects(comparison.targets.labels))
        truth = torch.zeros_like(logits).index_put(indices, logits.new_ones(()))  # (L, B, R, K)
        return comparison.sum_rows(sigmoid_focal(logits, truth, self.alpha, self.gamma).sum(-1))


def sigmoid_focal(logits: Tensor, truth: Tensor, alpha: float, gamma: float) -> Tensor:
    """Compute the focal loss of each element; `truth` is 0 or 1 (Lin et al. 2017, arXiv 1708.02002, equation 5)."""
    nll = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    probability = logits.sigmoid()
    error = probability + truth - 2 * probability * truth  # 1 - p for the true answer, p for the other
    return ((1 - alpha) + (2 * alpha - 1) * truth) * error**gamma * nll


@dataclass(frozen=True)
class L1(Term):
    """The L1 distance between the predicted box and the object's box of each pair.

    Both boxes are cxcywh, relative to the image.
    """

    name = "box"
    reads = "boxes_cxcywh"

    def __call__(self, comparison: Comparison) -> Tensor:
        """See Term."""
        distance = comparison.answers("boxes_cxcywh") - comparison.objects(comparison.targets.boxes)  # (M, 4)
        return comparison.per_layer(distance.abs().sum(-1))


@dataclass(frozen=True)
class Giou(Term):
    """One minus the generalised IoU of the predicted box and the object's box of each pair."""

    name = "giou"
    reads = "boxes_cxcywh"

    def __call__(self, comparison: Comparison) -> Tensor:
        """See Term."""
        predicted, truth = comparison.answers("boxes_cxcywh"), comparison.objects(comparison.targets.boxes)  # (M, 4)
        return comparison.per_layer(1 - giou(to_xyxy(predicted), to_xyxy(truth)))
