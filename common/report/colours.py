"""Colour maps for pictures of attention and of confusion matrices."""

from collections.abc import Sequence

import torch
from torch import Tensor

Anchors = Sequence[tuple[int, int, int]]  # RGB in 0..255 at equally spaced values from 0 to 1

HEAT: Anchors = (
    (8, 8, 20),
    (80, 20, 110),
    (190, 50, 90),
    (245, 130, 40),
    (255, 240, 150),
)  # lightness increases evenly
SIGNED: Anchors = ((20, 70, 150), (140, 185, 225), (255, 255, 255), (240, 165, 135), (165, 30, 40))  # white is zero
BLUES: Anchors = ((255, 255, 255), (190, 215, 235), (95, 160, 210), (30, 95, 165), (10, 40, 90))


def ramp(values: Tensor, anchors: Anchors) -> Tensor:
    """Map values (...), clamped to 0..1, to colours uint8 (3, ...) by linear interpolation between the anchors."""
    colours = torch.tensor(anchors, dtype=torch.float32)
    positions = values.float().cpu().clamp(0, 1) * (len(anchors) - 1)
    lower = positions.long().clamp(max=len(anchors) - 2)
    fraction = (positions - lower)[..., None]
    return colours[lower].lerp(colours[lower + 1], fraction).round().to(torch.uint8).movedim(-1, 0)
