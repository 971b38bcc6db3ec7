"""Box formats, and generalised IoU (Rezatofighi et al. 2019, arXiv 1902.09630) of corresponding boxes or all pairs."""

import torch
from torch import Tensor

# An area of at most this value counts as empty, so that 1 / area and its gradient stay finite in fp32. In relative
# units, it is the area of a box with sides of a millionth of the image's sides.
SMALLEST_AREA = 1e-12


def to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert corners to centre and size: (..., 4) xyxy -> (..., 4) cxcywh, in the same unit."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=-1)


def to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Convert centre and size to corners: (..., 4) cxcywh -> (..., 4) xyxy, in the same unit."""
    x, y, width, height = boxes_cxcywh.unbind(-1)
    return torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=-1)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Compute the generalised IoU, in [-1, 1], of each box in `a` with the box at the same index in `b`.

    `a` and `b` are (..., 4) xyxy in the same unit and broadcast against each other; the result is (...). NaN inputs
    give NaN, which the trainer's check of the loss reports.

    Differs: each of the formula's two fractions counts as 0 if its divisor is an empty area. Two identical boxes
    without area therefore have a generalised IoU of 0 with finite gradients, where official DETR gives NaN.
    """
    ax0, ay0, ax1, ay1 = a.unbind(-1)
    bx0, by0, bx1, by1 = b.unbind(-1)
    width = (torch.minimum(ax1, bx1) - torch.maximum(ax0, bx0)).clamp(min=0)
    height = (torch.minimum(ay1, by1) - torch.maximum(ay0, by0)).clamp(min=0)
    intersection = width * height
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - intersection
    hull = (torch.maximum(ax1, bx1) - torch.minimum(ax0, bx0)) * (torch.maximum(ay1, by1) - torch.minimum(ay0, by0))
    return intersection / _divisor(union) - (hull - union) / _divisor(hull)


def pairwise_giou(a: Tensor, b: Tensor) -> Tensor:
    """Compute the generalised IoU of all pairs: (..., N, 4) and (..., M, 4) xyxy -> (..., N, M); see `giou`."""
    # Each coordinate is stored contiguously, because later operations would otherwise read with a stride of four.
    a, b = (boxes.movedim(-1, 0).contiguous().movedim(0, -1) for boxes in (a, b))
    return giou(a[..., :, None, :], b[..., None, :, :])


def _divisor(area: Tensor) -> Tensor:
    return torch.where(area.abs() > SMALLEST_AREA, area, 1.0)
