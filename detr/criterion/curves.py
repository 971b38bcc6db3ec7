"""Curves of lanes: evaluation, matching costs and loss terms (Liu et al. 2021, LSTR, arXiv 2011.04233, section 3).

A curve has eight parameters (upper, lower, k, f, m, n, b'', b'''), see detr/models/lstr.py. It is compared with a lane
at the P points that are annotated, so x is computed at their y. answers.py defines the letters in shapes.

Differs: The official code weights a lane of p points by sqrt(total / p), divided by the largest such number in the
batch. Here the largest of the lane's own image is taken, so a lane's weight does not depend on the rest of the batch.
The official curve is infinite at y = f; here |y - f| is at least `MIN_DISTANCE`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from common.machine.device import constant
from common.types import NonNegativeFloat
from detr.criterion.answers import Outputs, Targets
from detr.criterion.matcher import ClassCost, Cost
from detr.criterion.set_loss import Criterion
from detr.criterion.terms import Comparison, CrossEntropy, Term

UPPER, LOWER = 0, 1  # index of the end's y among the parameters of a curve, and among the ends of a lane
MIN_DISTANCE = 0.01  # of y from f, relative to the height of the image


def evaluate(curves: Tensor, y: Tensor) -> Tensor:
    """Compute x at the heights y (..., P) for curves (..., 8), all relative to the image; returns (..., P).

    The ends of a curve are ignored. The leading dimensions are broadcast.
    """
    k, f, m, n, slope, offset = curves[..., 2:, None].unbind(-2)  # (..., 1) each
    distance = y - f
    nearest = torch.full_like(distance, MIN_DISTANCE).copysign(distance)
    distance = torch.where(distance.abs() < MIN_DISTANCE, nearest, distance)
    return k / distance**2 + m / distance + n + slope * y - offset


def lane_targets(points: Tensor, valid: Tensor, counts: list[int]) -> Targets:
    """Make the targets of T lanes from their points (T, P, 2), relative to the image.

    `valid` (T, P) is False where a lane has no point; each lane has at least one valid point. The upper end of all
    lanes of an image is that of the longest one, because they begin at the same horizon (official code). The lower end
    is a lane's own.
    """
    image = torch.repeat_interleave(constant(counts, like=points), output_size=len(points))  # (T,)
    y = points[..., 1]
    uppermost = y.masked_fill(~valid, torch.inf).amin(1)  # (T,)
    horizon = _smallest_of_images(uppermost, image, len(counts))
    ends = torch.stack((horizon, y.masked_fill(~valid, -torch.inf).amax(1)), 1)  # (T, 2)
    number = valid.sum(1).to(points.dtype)  # (T,) points of each lane
    weights = (_smallest_of_images(number, image, len(counts)) / number).sqrt()
    curves = torch.cat((points, (weights[:, None] * valid)[..., None]), -1)  # (T, P, 3)
    curves = curves.masked_fill(~valid[..., None], 0)
    labels = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    return Targets(counts, labels, points.new_zeros(len(points), 0), curves=curves, ends=ends)


def _smallest_of_images(values: Tensor, image: Tensor, images: int) -> Tensor:
    """Return, for each lane, the smallest of the `values` (T,) of all lanes of its image; `image` (T,) is its index."""
    return values.new_full((images,), torch.inf).scatter_reduce(0, image, values, "amin")[image]


class CurveCost(Cost):
    """The weighted sum, over a lane's points, of the horizontal distance of the curve."""

    def __call__(self, outputs: Outputs, targets: Targets) -> Tensor:
        """See Cost."""
        assert targets.curves is not None
        x, y, weights = targets.curves[:, None].unbind(-1)  # (B, 1, N, P) each
        distance = (evaluate(outputs["curves"][..., None, :], y) - x).abs()  # (L, B, R, N, P)
        return (distance * weights).sum(-1)


@dataclass(frozen=True)
class EndCost(Cost):
    """The vertical distance of the predicted upper or lower end from that of the lane."""

    end: int  # UPPER or LOWER

    def __call__(self, outputs: Outputs, targets: Targets) -> Tensor:
        """See Cost."""
        assert targets.ends is not None
        distance: Tensor = outputs["curves"][..., None, self.end] - targets.ends[:, None, :, self.end]  # (L, B, R, N)
        return distance.abs()


@dataclass(frozen=True)
class Curve(Term):
    """The weighted sum, over the points of each matched lane, of the horizontal distance of its curve."""

    name = "curve"
    reads = "curves"

    def __call__(self, comparison: Comparison) -> Tensor:
        """See Term."""
        assert comparison.targets.curves is not None
        x, y, weights = comparison.objects(comparison.targets.curves).unbind(-1)  # (M, P) each
        distance = (evaluate(comparison.answers("curves"), y) - x).abs()
        return comparison.per_layer((distance * weights).sum(-1))


@dataclass(frozen=True)
class End(Term):
    """The vertical distance of the predicted end of each matched lane."""

    reads = "curves"
    end: ClassVar[int]

    def __call__(self, comparison: Comparison) -> Tensor:
        """See Term."""
        assert comparison.targets.ends is not None
        predicted = comparison.answers("curves")[:, self.end]
        return comparison.per_layer((predicted - comparison.objects(comparison.targets.ends)[:, self.end]).abs())


@dataclass(frozen=True)
class Upper(End):
    """The vertical distance of the predicted upper end of each matched lane."""

    name = "upper"
    end = UPPER


@dataclass(frozen=True)
class Lower(End):
    """The vertical distance of the predicted lower end of each matched lane."""

    name = "lower"
    end = LOWER


@dataclass(frozen=True, kw_only=True)
class LaneLossOptions:
    """The weights of the terms, which are also those of the matching costs, as in the paper.

    class_weight: of the cross-entropy, and of the probability of a lane in the costs.
    curve_weight: of the horizontal distance of curves.
    end_weight: of the vertical distance of the upper and of the lower end.
    no_object: weight of unmatched queries in the cross-entropy; 1 in the official code.
    """

    class_weight: NonNegativeFloat
    curve_weight: NonNegativeFloat
    end_weight: NonNegativeFloat
    no_object: NonNegativeFloat


class LaneCriterion(Criterion):
    """Matches queries to lanes, and computes the terms of LSTR's loss (section 3.3)."""

    def __init__(self, loss: LaneLossOptions):
        ends = loss.end_weight
        self.terms = [
            CrossEntropy(loss.class_weight, loss.no_object),
            Curve(loss.curve_weight),
            Upper(ends),
            Lower(ends),
        ]
        self.costs = [
            ClassCost(loss.class_weight),
            CurveCost(loss.curve_weight),
            EndCost(ends, UPPER),
            EndCost(ends, LOWER),
        ]
