"""Bipartite matching of queries to objects (Carion et al. 2020, arXiv 2005.12872, section 3.1, equations 1 and 2)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from common.types import NonNegativeFloat
from detr.criterion.answers import Matches, Outputs, Targets
from detr.criterion.boxes import pairwise_giou, to_xyxy

NON_FINITE_COST = 1e8  # what a cost that is not finite counts as
PADDING_COST = 1e12  # what a row that is padding costs: more than any other


@dataclass(frozen=True, kw_only=True)
class MatcherOptions:
    """Weights of the three costs of taking a query for an object (appendix A.2: the loss's own weights)."""

    class_cost: NonNegativeFloat
    box_cost: NonNegativeFloat
    giou_cost: NonNegativeFloat


@dataclass(frozen=True)
class Cost(ABC):
    """What each query costs for each object of its image, with its weight in the whole cost."""

    weight: float

    @abstractmethod
    def __call__(self, outputs: Outputs, targets: Targets) -> Tensor:
        """Outputs (L, B, R, ...) and padded targets (B, N, ...) -> (L, B, R, N)."""


class ClassCost(Cost):
    """The negative softmax probability of the object's class."""

    def __call__(self, outputs: Outputs, targets: Targets) -> Tensor:
        """See Cost."""
        return -_gather_class(outputs["logits"].softmax(-1), targets)


@dataclass(frozen=True)
class FocalCost(Cost):
    """The focal loss of the object's class if it is right, less that if it is wrong.

    As the official code of Deformable DETR (Zhu et al. 2020, arXiv 2010.04159), which adds 1e-8 in the logarithms.
    """

    alpha: float
    gamma: float

    def __call__(self, outputs: Outputs, targets: Targets) -> Tensor:
        """See Cost."""
        p = _gather_class(outputs["logits"], targets).sigmoid()
        right = self.alpha * (1 - p) ** self.gamma * -(p + 1e-8).log()
        return right - (1 - self.alpha) * p**self.gamma * -(1 - p + 1e-8).log()


class L1Cost(Cost):
    """The distance of boxes, cxcywh relative to the image."""

    def __call__(self, outputs: Outputs, targets: Targets) -> Tensor:
        """See Cost."""
        boxes = outputs["boxes_cxcywh"]
        return torch.cdist(boxes, targets.boxes.expand(len(boxes), -1, -1, -1), p=1)


class GiouCost(Cost):
    """The negative generalised IoU."""

    def __call__(self, outputs: Outputs, targets: Targets) -> Tensor:
        """See Cost."""
        return -pairwise_giou(to_xyxy(outputs["boxes_cxcywh"]), to_xyxy(targets.boxes)[None])


@torch.no_grad()
def total_cost(costs: Sequence[Cost], outputs: Outputs, targets: Targets) -> Tensor:
    """The weighted sum of all costs, over all layers at once: (L, B, R, N) for padded targets (B, N, ...)."""
    first, *others = costs
    cost = first.weight * first(outputs, targets)
    for each in others:
        cost = cost + each.weight * each(outputs, targets)
    if "real" in outputs:
        cost = cost.masked_fill(~outputs["real"][..., None], PADDING_COST)
    return cost


@torch.no_grad()
def match(costs: Sequence[Cost], outputs: Outputs, targets: Targets) -> Matches:
    """The cheapest one-to-one assignment of each layer and image.

    Outputs (L, B, R, ...) of all layers, targets (T, ...) of all images one after another. With more objects than
    rows, R objects are matched. The costs go to the host in one copy, and the pairs come back in one.
    """
    table: np.ndarray = np.zeros((4, 0), dtype=np.int64)
    if max(targets.counts, default=0):
        cost = total_cost(costs, outputs, targets.padded())
        # A model that has diverged must reach the trainer's guard, which names the step, and not fail here.
        cost = cost.float().nan_to_num(nan=NON_FINITE_COST, posinf=NON_FINITE_COST, neginf=-NON_FINITE_COST)
        table = _assign(cost.cpu().numpy(), targets.counts, padded="real" in outputs)
    return Matches(*torch.from_numpy(table).to(targets.labels.device, non_blocking=True))


def _gather_class(values: Tensor, targets: Targets) -> Tensor:
    """Values (L, B, R, K) of each object's class: (L, B, R, N)."""
    return values.gather(-1, targets.labels[None, :, None].expand(*values.shape[:3], -1))


def _assign(cost: np.ndarray, counts: list[int], padded: bool) -> np.ndarray:
    """cost (L, B, R, N) -> (4, M): layer, image, query and target row of each pair; none has a row that is padding."""
    starts = np.cumsum([0, *counts[:-1]])
    rows = []
    for layer, of_layer in enumerate(cost):
        for image, count in enumerate(counts):
            queries, targets = linear_sum_assignment(of_layer[image, :, :count])
            if padded:
                real = of_layer[image, queries, targets] < PADDING_COST
                queries, targets = queries[real], targets[real]
            same = np.full_like(queries, layer), np.full_like(queries, image)
            rows.append(np.stack((*same, queries, targets + starts[image])))
    return np.concatenate(rows, axis=1)
