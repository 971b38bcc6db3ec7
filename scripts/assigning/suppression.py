"""Non-maximum suppression, one kept box after the other, with the box that suppressed each dropped one."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou

KEPT = -1


class Suppression(NamedTuple):
    """The result for N candidates."""

    order: Tensor  # (N,) candidates by descending score
    suppressors: Tensor  # (N,) the candidate that suppressed each candidate, or KEPT
    overlaps: Tensor  # (N,) IoU with the suppressor; 0 for kept candidates

    @property
    def kept(self) -> list[int]:
        """The kept candidates, by descending score."""
        return [i for i in self.order.tolist() if self.suppressors[i] == KEPT]

    def dropped_by(self, candidate: int) -> list[int]:
        """The candidates that a kept candidate suppressed, by descending score."""
        return [i for i in self.order.tolist() if self.suppressors[i] == candidate]


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Suppression:
    """Suppress boxes (N, 4) xyxy with scores (N,) and class indices (N,).

    The candidate with the highest score is kept and drops all candidates of its class with which its IoU is above
    `threshold`; this is repeated with the candidates that are left. Of equal scores, the first counts as higher.
    """
    overlaps = box_iou(boxes, boxes) * (labels[:, None] == labels[None])
    order = scores.argsort(descending=True, stable=True)
    suppressors, ious = torch.full((len(boxes),), KEPT), torch.zeros(len(boxes))
    is_open = torch.ones(len(boxes), dtype=torch.bool)
    for candidate in order.tolist():
        if is_open[candidate]:
            is_open[candidate] = False
            dropped = is_open & (overlaps[candidate] > threshold)
            suppressors[dropped], ious[dropped] = candidate, overlaps[candidate][dropped]
            is_open &= ~dropped
    return Suppression(order, suppressors, ious)
