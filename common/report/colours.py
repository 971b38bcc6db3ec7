"""Colours of values, for heat maps and sheets of attention."""

from collections.abc import Sequence

import torch
from torch import Tensor

Anchors = Sequence[tuple[int, int, int]]  # red, green and blue in 0..255 of the values 0 ... 1 at equal distances

HEAT: Anchors = ((8, 8, 20), (80, 20, 110), (190, 50, 90), (245, 130, 40), (255, 240, 150))  # lightness rises evenly
BLUES: Anchors = ((255, 255, 255), (190, 215, 235), (95, 160, 210), (30, 95, 165), (10, 40, 90))


def ramp(values: Tensor, anchors: Anchors) -> Tensor:
    """Values (...) in 0..1 as colours uint8 (3, ...) between the anchors; others count as 0 or 1."""
    colours = torch.tensor(anchors, dtype=torch.float32)
    place = values.float().cpu().clamp(0, 1) * (len(anchors) - 1)
    lower = place.long().clamp(max=len(anchors) - 2)
    share = (place - lower)[..., None]
    return colours[lower].lerp(colours[lower + 1], share).round().to(torch.uint8).movedim(-1, 0)
