"""Bipartite matching of queries to objects (Carion et al. 2020, arXiv 2005.12872, section 3.1, equations 1 and 2).

answers.py defines output rows and the letters in shapes. N is the largest number of objects in an image of the batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.types import NonNegativeFloat
from detr.criterion.answers import Matches, Outputs, Targets
from detr.criterion.boxes import pairwise_giou, to_xyxy

NON_FINITE_COST = 1e8  # replaces NaN and infinity; its negative replaces minus infinity
PADDING_COST = 1e12  # cost of a padding row, higher than every other cost


@dataclass(frozen=True, kw_only=True)
class MatcherOptions:
    """Weights of the three matching costs; in the paper, they equal the weights of the loss terms (appendix A.2)."""

    class_cost: NonNegativeFloat
    box_cost: NonNegativeFloat
    giou_cost: NonNegativeFloat


@dataclass(frozen=True)
class Cost(ABC):
    """One of the costs of matching each query with each object of its image; `weight` is its weight in the total."""

    weight: float

    @abstractmethod
    def __call__(self, outputs: Outputs, targets: Targets) -> Tensor:
        """Compute the unweighted cost (L, B, R, N) of outputs (L, B, R, ...) and padded targets (B, N, ...)."""


class ClassCost(Cost):
    """The negative softmax probability of the object's class."""

    def __call__(self, outputs: Outputs, targets: Targets) -> Tensor:
        """See Cost."""
        return -_gather_class(outputs["logits"].softmax(-1), targets)


@dataclass(frozen=True)
class FocalCost(Cost):
    """The sigmoid focal loss of the object's class for the target 1, minus the loss for the target 0.

    Follows the official code of Deformable DETR (Zhu et al. 2020, arXiv 2010.04159), including 1e-8 in the logarithms.
    """

    alpha: float
    gamma: float

    def __call__(self, outputs: Outputs, targets: Targets) -> Tensor:
        """See Cost."""
        p = _gather_class(outputs["logits"], targets).sigmoid()
        positive = self.alpha * (1 - p) ** self.gamma * -(p + 1e-8).log()
        return positive - (1 - self.alpha) * p**self.gamma * -(1 - p + 1e-8).log()


class L1Cost(Cost):
    """The L1 distance between the predicted box and the object's box, both cxcywh relative to the image."""

    def __call__(self, outputs: Outputs, targets: Targets) -> Tensor:
        """See Cost."""
        boxes = outputs["boxes_cxcywh"]
        return torch.cdist(boxes, targets.boxes.expand(len(boxes), -1, -1, -1), p=1)


class GiouCost(Cost):
    """The negative generalised IoU of the predicted box and the object's box."""

    def __call__(self, outputs: Outputs, targets: Targets) -> Tensor:
        """See Cost."""
        return -pairwise_giou(to_xyxy(outputs["boxes_cxcywh"]), to_xyxy(targets.boxes)[None])


@torch.no_grad()
def total_cost(costs: Sequence[Cost], outputs: Outputs, targets: Targets) -> Tensor:
    """Sum the weighted costs: outputs (L, B, R, ...) and padded targets (B, N, ...) -> (L, B, R, N).

    The total cost of a padding row (`real` False in `outputs`) is PADDING_COST.
    """
    first, *rest = costs
    cost = first.weight * first(outputs, targets)
    for term in rest:
        cost = cost + term.weight * term(outputs, targets)
    if "real" in outputs:
        cost = cost.masked_fill(~outputs["real"][..., None], PADDING_COST)
    return cost


@torch.no_grad()
def match(costs: Sequence[Cost], outputs: Outputs, targets: Targets) -> Matches:
    """Find the one-to-one assignment of output rows to objects with minimum total cost, for each layer and image.

    `outputs` are (L, B, R, ...), and `targets` (T, ...) with the objects of all images concatenated. If an image has
    more objects than output rows that are not padding, the surplus objects are not matched. Costs are copied to the
    host once, and pairs to the device once.
    """
    pairs: np.ndarray = np.zeros((4, 0), dtype=np.int64)
    if max(targets.counts, default=0):
        cost = total_cost(costs, outputs, targets._replace(masks=None).padded())
        # Outputs that are not finite must not raise an error in the matcher: the trainer finds and reports them.
        cost = cost.float().nan_to_num(nan=NON_FINITE_COST, posinf=NON_FINITE_COST, neginf=-NON_FINITE_COST)
        pairs = _assign(cost.cpu().numpy(), targets.counts, padded="real" in outputs)
    return Matches(*torch.from_numpy(pairs).to(targets.labels.device, non_blocking=True))


def _gather_class(values: Tensor, targets: Targets) -> Tensor:
    """Select from `values` the class of each of the N padded objects of an image: (L, B, R, K') -> (L, B, R, N).

    K' is the number of classes K, or K + 1 with "no object".
    """
    return values.gather(-1, targets.labels[None, :, None].expand(*values.shape[:3], -1))


def _assign(cost: np.ndarray, counts: list[int], padded: bool) -> np.ndarray:
    """Match by costs (L, B, R, N); returns the layer, image, row and object of each matched pair, (4, M).

    Image i has counts[i] objects. If `padded`, pairs with a padding row are dropped.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    starts = np.cumsum([0, *counts[:-1]])
    pairs = []
    for layer, layer_cost in enumerate(cost):
        for image, count in enumerate(counts):
            queries, targets = linear_sum_assignment(layer_cost[image, :, :count])
            if padded:
                real = layer_cost[image, queries, targets] < PADDING_COST
                queries, targets = queries[real], targets[real]
            layers, images = np.full_like(queries, layer), np.full_like(queries, image)
            pairs.append(np.stack((layers, images, queries, targets + starts[image])))
    return np.concatenate(pairs, axis=1)
