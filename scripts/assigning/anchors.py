"""Anchors assigned by IoU, as in Faster R-CNN's proposal network and in RetinaNet; FreeAnchor's bags of candidates.

The anchors and the matcher are torchvision's. pyramid.py defines the letters in shapes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou

from scripts.assigning.pyramid import grid_sizes

BACKGROUND, IGNORED = Matcher.BELOW_LOW_THRESHOLD, Matcher.BETWEEN_THRESHOLDS  # -1 and -2
RATIOS = (0.5, 1.0, 2.0)  # height / width
PROPOSAL_STRIDES = (4, 8, 16, 32, 64)
PROPOSAL_SIZES = ((32,), (64,), (128,), (256,), (512,))  # Lin et al. 2017, arXiv 1612.03144, section 4.1
PROPOSAL_THRESHOLDS = (0.7, 0.3)  # Ren et al. 2015, arXiv 1506.01497, section 3.1.2
RETINA_STRIDES = (8, 16, 32, 64, 128)
# Lin et al. 2017, arXiv 1708.02002, section 4: three sizes in each octave, in whole pixels as in torchvision
RETINA_SIZES = tuple(tuple(int(size * 2 ** (third / 3)) for third in range(3)) for size in (32, 64, 128, 256, 512))
RETINA_THRESHOLDS = (0.5, 0.4)
BAG_SIZE = 50  # Zhang et al. 2019, arXiv 1909.02466, section 4


def make_anchors(
    size: tuple[int, int], strides: Sequence[int], sizes: Sequence[Sequence[float]], divisor: int
) -> list[Tensor]:
    """Return torchvision's anchors (A, 4) of each level, xyxy in pixels, for an image of `size` (height and width).

    `sizes` are the anchors' sizes at each level, each with the three `RATIOS`. Strides and sizes are divided by
    `divisor`. torchvision rounds the corners of anchors, and centres the anchors at multiples of the stride.
    """
    scaled = tuple(tuple(side / divisor for side in level) for level in sizes)
    strides = [stride // divisor for stride in strides]
    generator = AnchorGenerator(scaled, (RATIOS,) * len(scaled))
    steps = [[torch.tensor(stride), torch.tensor(stride)] for stride in strides]
    grids: list[Tensor] = generator.grid_anchors([[*grid] for grid in grid_sizes(size, strides)], steps)
    return grids


def assign_by_iou(anchors: Tensor, boxes: Tensor, high: float, low: float) -> Tensor:
    """Return the index of each anchor's object (A,), or BACKGROUND, or IGNORED.

    An anchor is assigned to the object with which it has the highest IoU if this IoU is at least `high`. It is ignored
    if the IoU is at least `low`, and background if it is lower. In addition, the anchors that have an object's highest
    IoU are assigned even below `high` (low-quality matches), each to the object with which its own IoU is highest.
    """
    if not len(boxes):
        return torch.full((len(anchors),), BACKGROUND)
    matcher = Matcher(high, low, allow_low_quality_matches=True)
    assigned: Tensor = matcher(box_iou(boxes, anchors))
    return assigned


def candidate_bags(anchors: Tensor, boxes: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` anchors with the highest IoU for each object, (T, min(count, A)).

    An anchor may be in the bags of several objects.
    """
    bags: Tensor = box_iou(boxes, anchors).topk(min(count, len(anchors)), dim=1).indices
    return bags
