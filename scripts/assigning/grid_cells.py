"""Grid cells and anchor shapes, as YOLO assigns them; the shapes are clusters of the training boxes.

Redmon et al. 2016 (YOLOv1, arXiv 1506.02640, section 2), Redmon and Farhadi 2017 (YOLOv2, arXiv 1612.08242, section 2)
and 2018 (YOLOv3, arXiv 1804.02767, section 2). All lengths are relative to the width and height of the image, because
these detectors resize images to squares. In shapes, T is the number of objects of an image, K of anchor shapes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou

from detr.criterion.boxes import to_xyxy

V1_GRID, V2_GRID = 7, 13  # cells along each side
V3_GRIDS = (52, 26, 13)  # of images of 416 pixels at the strides 8, 16 and 32, the smallest shapes at the first
V2_SHAPES, V3_SHAPES = 5, 9
IGNORE_THRESHOLD = 0.5  # YOLOv3: priors with a higher IoU are ignored, unless they are responsible
MAX_ITERATIONS = 300


class Slots(NamedTuple):
    """The slot that is responsible for each of T objects: a shape in a cell of a grid."""

    grids: Tensor  # (T,) index of the grid
    cells: Tensor  # (T, 2) column and row
    shapes: Tensor  # (T,) index among all shapes
    holds: Tensor  # (T,) False if another object took the slot


def shape_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU (N, M) of boxes of the widths and heights `a` (N, 2) and `b` (M, 2) with a common centre."""
    intersection = torch.minimum(a[:, None], b[None]).prod(2)
    return intersection / (a.prod(1)[:, None] + b.prod(1)[None] - intersection)


def cluster_shapes(sizes: Tensor, count: int) -> Tensor:
    """Cluster widths and heights (N, 2) by k-means with the distance 1 - IoU; returns (count, 2) by ascending area.

    The first clusters are the sizes at equally spaced ranks of area, so that the result does not depend on random
    numbers. A cluster is the mean of its sizes; a cluster without sizes stays as it is.
    """
    order = sizes.prod(1).argsort(stable=True)
    ranks = ((torch.arange(count) + 0.5) / count * len(sizes)).long()
    shapes = sizes[order[ranks]].clone()
    previous = None
    for _ in range(MAX_ITERATIONS):
        nearest = shape_iou(sizes, shapes).argmax(1)
        if previous is not None and bool((nearest == previous).all()):
            break
        for k in nearest.unique().tolist():
            shapes[k] = sizes[nearest == k].mean(0)
        previous = nearest
    return shapes[shapes.prod(1).argsort(stable=True)]


def assign_slots(boxes_cxcywh: Tensor, grids: Sequence[int], shapes: Sequence[Tensor], first_holds: bool) -> Slots:
    """Assign each object to the cell of its centre, and there to the shape with the highest IoU over all grids.

    `shapes` (K, 2) are the anchor shapes of each grid. If several objects have the same slot, it holds the first of
    them, or the last without `first_holds`.
    """
    best = shape_iou(boxes_cxcywh[:, 2:], torch.cat([*shapes])).argmax(1)
    grid = torch.repeat_interleave(torch.arange(len(grids)), torch.tensor([len(part) for part in shapes]))[best]
    side = torch.tensor(grids)[grid][:, None]
    cells = (boxes_cxcywh[:, :2] * side).long().clamp(min=0).minimum(side - 1)
    slots = torch.cat([cells, best[:, None]], dim=1).tolist()
    ranked = list(enumerate(slots))
    holder = {tuple(slot): index for index, slot in (reversed(ranked) if first_holds else ranked)}
    holds = torch.tensor([holder[tuple(slot)] == index for index, slot in ranked], dtype=torch.bool)
    return Slots(grid, cells, best, holds)


def make_priors(grids: Sequence[int], shapes: Sequence[Tensor]) -> Tensor:
    """Return the priors (A, 4) xyxy of all grids: each shape at the centre of each cell, row by row."""
    priors = []
    for side, part in zip(grids, shapes, strict=True):
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        centres = (torch.stack([x.flatten(), y.flatten()], dim=1) + 0.5) / side
        pairs = torch.cat([centres[:, None].expand(-1, len(part), -1), part.expand(side * side, -1, -1)], dim=2)
        priors.append(to_xyxy(pairs.flatten(0, 1)))
    return torch.cat(priors)


def ignored_priors(boxes_cxcywh: Tensor, grids: Sequence[int], shapes: Sequence[Tensor], slots: Slots) -> Tensor:
    """Return a mask (A,) of the priors whose IoU with an object is above the threshold, without those of `slots`.

    Follows the text of YOLOv3, section 2.1; the authors' code compares the predicted boxes in place of the priors.
    """
    priors = make_priors(grids, shapes)
    if not len(boxes_cxcywh):
        return torch.zeros(len(priors), dtype=torch.bool)
    ignored: Tensor = box_iou(priors, to_xyxy(boxes_cxcywh)).amax(1) > IGNORE_THRESHOLD
    starts = torch.tensor([0, *(len(part) for part in shapes)]).cumsum(0)  # of each grid's shapes
    offsets = torch.tensor([0, *(side * side * len(part) for side, part in zip(grids, shapes, strict=True))]).cumsum(0)
    counts = torch.tensor([len(part) for part in shapes])
    cell = slots.cells[:, 1] * torch.tensor(grids)[slots.grids] + slots.cells[:, 0]
    ignored[offsets[slots.grids] + cell * counts[slots.grids] + slots.shapes - starts[slots.grids]] = False
    return ignored
