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


@dataclass(frozen=True)
class Term(ABC):
    """One term with its weight in the loss."""

    weight: float
    name: ClassVar[str]  # in the log, and of its normaliser
    reads: ClassVar[str]  # the answers that it needs; a set of answers without them has no such term
    layers: ClassVar[Literal["all", "last"]] = "all"

    @abstractmethod
    def __call__(self, outputs: Outputs, targets: Targets, matches: Matches) -> Tensor:
        """Outputs (L, B, R, ...) -> the sum over rows and images of each layer, (L,)."""

    def normaliser(self, counts: Sequence[int], rows: Sequence[int]) -> float:
        """What a batch adds to the divisor, from the objects and the rows of each image: the number of objects."""
        return float(sum(counts))


@dataclass(frozen=True)
class CrossEntropy(Term):
    """Cross-entropy over classes and "no object" (Carion et al. 2020, arXiv 2005.12872, equation 2 and A.4)."""

    no_object: float  # the weight of rows without an object
    name = "class"
    reads = "logits"

    def __call__(self, outputs: Outputs, targets: Targets, matches: Matches) -> Tensor:
        """See Term."""
        logits = outputs["logits"]
        nothing = logits.shape[-1] - 1
        where = (matches.layers, matches.images, matches.queries)
        classes = targets.labels.new_full(logits.shape[:3], nothing).index_put(where, targets.labels[matches.targets])
        nll = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction="none").view_as(classes)  # (L, B, R)
        weight = torch.ones_like(nll).masked_fill(classes == nothing, self.no_object)
        return _real(nll * weight, outputs).sum((1, 2))

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

    def __call__(self, outputs: Outputs, targets: Targets, matches: Matches) -> Tensor:
        """See Term."""
        logits = outputs["logits"]
        where = (matches.layers, matches.images, matches.queries, targets.labels[matches.targets])
        truth = torch.zeros_like(logits).index_put(where, logits.new_ones(()))  # (L, B, R, K)
        nll = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        probability = logits.sigmoid()
        wrong = probability + truth - 2 * probability * truth  # 1 - p where the class is right, p elsewhere
        weight = (1 - self.alpha) + (2 * self.alpha - 1) * truth
        return _real((weight * wrong**self.gamma * nll).sum(-1), outputs).sum((1, 2))


@dataclass(frozen=True)
class L1(Term):
    """The distance of matched boxes, cxcywh relative to the image."""

    name = "box"
    reads = "boxes_cxcywh"

    def __call__(self, outputs: Outputs, targets: Targets, matches: Matches) -> Tensor:
        """See Term."""
        boxes = outputs["boxes_cxcywh"]
        chosen = boxes[matches.layers, matches.images, matches.queries]  # (M, 4)
        truth = targets.boxes.to(boxes.dtype)[matches.targets]
        return per_layer((chosen - truth).abs().sum(-1), matches, len(boxes))


@dataclass(frozen=True)
class Giou(Term):
    """1 - generalised IoU of matched boxes."""

    name = "giou"
    reads = "boxes_cxcywh"

    def __call__(self, outputs: Outputs, targets: Targets, matches: Matches) -> Tensor:
        """See Term."""
        boxes = outputs["boxes_cxcywh"]
        chosen = boxes[matches.layers, matches.images, matches.queries]  # (M, 4)
        overlap = giou(to_xyxy(chosen), to_xyxy(targets.boxes.to(boxes.dtype)[matches.targets]))
        return per_layer(1 - overlap, matches, len(boxes))


def per_layer(values: Tensor, matches: Matches, layers: int) -> Tensor:
    """Sum the values (M,) of pairs by their layer -> (L,)."""
    return values.new_zeros(layers).index_add(0, matches.layers, values)


def _real(values: Tensor, outputs: Outputs) -> Tensor:
    """Values (L, B, R), zero in rows that are padding."""
    return values if "real" not in outputs else values * outputs["real"]
