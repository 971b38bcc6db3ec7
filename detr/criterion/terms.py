"""The terms of a detector's loss: sums over the rows of each layer, and what they are divided by."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from detr.criterion.answers import Matches, Outputs, Targets
from detr.criterion.boxes import giou, to_xyxy


class Comparison:
    """What a term compares: the answers of L layers, the objects, and the M pairs of both; each is gathered once."""

    def __init__(self, outputs: Outputs, targets: Targets, matches: Matches):
        self.outputs, self.targets, self.matches = outputs, targets, matches
        self._answers: dict[str, Tensor] = {}

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Layer, image and row of each pair, (M,) each."""
        return self.matches[:3]

    def answers(self, name: str) -> Tensor:
        """The answers `name` of each pair, (M, ...)."""
        if name not in self._answers:
            self._answers[name] = self.outputs[name][self.rows]
        return self._answers[name]

    def objects(self, values: Tensor) -> Tensor:
        """Of the values (T, ...) of all objects, those of each pair, (M, ...)."""
        return values[self.matches.targets]

    def per_layer(self, values: Tensor) -> Tensor:
        """Sum the values (M,) of pairs by their layer -> (L,)."""
        return values.new_zeros(len(self.outputs["logits"])).index_add(0, self.matches.layers, values)

    def sum_rows(self, values: Tensor) -> Tensor:
        """Sum the values (L, B, R) of all rows that are no padding by their layer -> (L,)."""
        return (values if "real" not in self.outputs else values * self.outputs["real"]).sum((1, 2))


@dataclass(frozen=True)
class Term(ABC):
    """One term with its weight in the loss."""

    weight: float
    name: ClassVar[str]  # in the log, and of its normaliser
    reads: ClassVar[str]  # the answers that it needs; a set of answers without them has no such term
    layers: ClassVar[Literal["all", "last"]] = "all"

    @abstractmethod
    def __call__(self, compared: Comparison) -> Tensor:
        """The sum over the rows and images of each layer, (L,)."""

    def normaliser(self, counts: Sequence[int], rows: Sequence[int]) -> float:
        """What a batch adds to the divisor, from the objects and the rows of each image: the number of objects."""
        return float(sum(counts))


@dataclass(frozen=True)
class CrossEntropy(Term):
    """Cross-entropy over classes and "no object" (Carion et al. 2020, arXiv 2005.12872, equation 2 and A.4)."""

    no_object: float  # the weight of rows without an object
    name = "class"
    reads = "logits"

    def __call__(self, compared: Comparison) -> Tensor:
        """See Term."""
        logits, labels = compared.outputs["logits"], compared.targets.labels
        nothing = logits.shape[-1] - 1
        classes = labels.new_full(logits.shape[:3], nothing).index_put(compared.rows, compared.objects(labels))
        nll = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction="none").view_as(classes)  # (L, B, R)
        weight = torch.ones_like(nll).masked_fill(classes == nothing, self.no_object)
        return compared.sum_rows(nll * weight)

    def normaliser(self, counts: Sequence[int], rows: Sequence[int]) -> float:
        """The weights of all rows: min(n, R) have an object, and R - min(n, R) the weight `no_object`."""
        taken = [(min(count, number), number) for count, number in zip(counts, rows, strict=True)]
        return float(sum(n + self.no_object * (number - n) for n, number in taken))


@dataclass(frozen=True)
class Focal(Term):
    """Sigmoid focal loss of each class by itself (Lin et al. 2017, arXiv 1708.02002, equation 5)."""

    alpha: float  # the weight of the right class, 1 - alpha that of the others
    gamma: float
    name = "class"
    reads = "logits"

    def __call__(self, compared: Comparison) -> Tensor:
        """See Term."""
        logits = compared.outputs["logits"]
        where = (*compared.rows, compared.objects(compared.targets.labels))
        truth = torch.zeros_like(logits).index_put(where, logits.new_ones(()))  # (L, B, R, K)
        nll = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        probability = logits.sigmoid()
        wrong = probability + truth - 2 * probability * truth  # 1 - p where the class is right, p elsewhere
        weight = (1 - self.alpha) + (2 * self.alpha - 1) * truth
        return compared.sum_rows((weight * wrong**self.gamma * nll).sum(-1))


@dataclass(frozen=True)
class L1(Term):
    """The distance of matched boxes, cxcywh relative to the image."""

    name = "box"
    reads = "boxes_cxcywh"

    def __call__(self, compared: Comparison) -> Tensor:
        """See Term."""
        distance = compared.answers("boxes_cxcywh") - compared.objects(compared.targets.boxes)  # (M, 4)
        return compared.per_layer(distance.abs().sum(-1))


@dataclass(frozen=True)
class Giou(Term):
    """1 - generalised IoU of matched boxes."""

    name = "giou"
    reads = "boxes_cxcywh"

    def __call__(self, compared: Comparison) -> Tensor:
        """See Term."""
        chosen, truth = compared.answers("boxes_cxcywh"), compared.objects(compared.targets.boxes)  # (M, 4)
        return compared.per_layer(1 - giou(to_xyxy(chosen), to_xyxy(truth)))
