"""Points in boxes, as FCOS assigns them and as AutoAssign weights them; pyramid.py defines the letters in shapes.

Tian et al. 2019 (FCOS, arXiv 1904.01355, section 3.2, with the centre sampling of its journal version, arXiv
2006.09214); Zhu et al. 2020 (AutoAssign, arXiv 2007.03496, section 3, center weighting).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scripts.assigning.anchors import BACKGROUND
from scripts.assigning.pyramid import level_of

STRIDES = (8, 16, 32, 64, 128)
RADIUS = 1.5  # of centre sampling, in strides
RANGE = (4, 8)  # in strides: the distances from a point to the farthest side of its object at a level


def side_distances(points: Tensor, boxes: Tensor) -> Tensor:
    """Return the distances (P, T, 4) in pixels from points (P, 2) to the left, top, right and bottom of boxes (T, 4).

    A distance is negative if the point lies beyond that side.
    """
    return torch.cat([points[:, None] - boxes[None, :, :2], boxes[None, :, 2:] - points[:, None]], dim=2)


def assign_points(points: Sequence[Tensor], strides: Sequence[int], boxes: Tensor) -> Tensor:
    """Return the index of the object of each point of all levels (P,), or BACKGROUND.

    A point may belong to an object if three conditions hold. It lies inside the object's box. Its distances to the
    box's centre along x and y are below `RADIUS` strides of its level. The largest of its distances to the four sides
    lies between `RANGE` times the stride, where the first level has no lower and the last level no upper bound. Of
    several such objects, the one with the smallest area gets the point, and of equal areas the first.

    Differs: areas are compared exactly, where torchvision's fp32 arithmetic does not tell areas within 8 square pixels
    apart.
    """
    places, level = torch.cat([*points]), level_of([len(part) for part in points])
    if not len(boxes):
        return torch.full((len(places),), BACKGROUND)
    stride = torch.tensor(strides, dtype=places.dtype)[level][:, None]  # (P, 1)
    lower, upper = RANGE[0] * stride, RANGE[1] * stride
    lower[level == 0], upper[level == len(strides) - 1] = 0, float("inf")
    distances = side_distances(places, boxes)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    is_central = (places[:, None] - centres).abs().amax(2) < RADIUS * stride
    farthest = distances.amax(2)
    allowed = (distances.amin(2) > 0) & is_central & (farthest > lower) & (farthest < upper)  # (P, T)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = areas.argsort(stable=True)
    first = allowed[:, order].int().argmax(1)  # the first allowed object in the order of areas
    return torch.where(allowed.any(1), order[first], BACKGROUND)


def centerness(points: Tensor, boxes: Tensor) -> Tensor:
    """Return the centerness (P,) of each point inside the box at the same index (FCOS, equation 3).

    It is 1 at the centre of the box and 0 at its sides.
    """
    left, top, right, bottom = side_distances(points, boxes).diagonal(dim1=0, dim2=1)
    x = torch.minimum(left, right) / torch.maximum(left, right)
    y = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    return (x * y).sqrt()


def centre_prior(points: Sequence[Tensor], strides: Sequence[int], boxes: Tensor) -> Tensor:
    """Return AutoAssign's initial centre prior of each point and object, (P, T); 0 for points outside the box.

    The prior is exp(-|d|^2 / 2), where d is the offset from the centre of the box to the point, in strides of its
    level: a Gaussian with the initial values of its parameters, mean 0 and standard deviation 1.
    """
    places = torch.cat([*points])
    stride = torch.tensor(strides, dtype=places.dtype)[level_of([len(part) for part in points])][:, None, None]
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    offsets = (places[:, None] - centres) / stride  # (P, T, 2)
    inside = side_distances(places, boxes).amin(2) > 0
    return torch.exp(-offsets.square().sum(2) / 2) * inside
