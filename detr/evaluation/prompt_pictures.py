"""Pictures of masks over an image, with the clicks and boxes that asked for them."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from detr.evaluation.pictures import MIN_LONGER_SIDE, colour

OPACITY = 0.45  # of a mask's colour
CLICK_COLOURS = {1: (60, 220, 90), 0: (235, 60, 50)}  # of clicks on the object and on the background


def draw_masks(
    image: Tensor,
    masks: Tensor,
    points: Sequence[tuple[float, float, int]] = (),
    boxes: Sequence[Sequence[float]] = (),
) -> Tensor:
    """Draw masks with their outlines, smaller ones over larger ones, then boxes and clicks.

    Args:
        image: uint8 (3, H, W).
        masks: (n, H, W) boolean; mask i has the colour of class i in pictures of detections.
        points: x, y in pixels and label of each click: 1 is on the object, 0 on the background.
        boxes: xyxy in pixels.

    Returns:
        uint8 (3, fH, fW), where f is the smallest integer that makes the longer side at least `MIN_LONGER_SIDE`.
    """
    from scipy import ndimage  # slow to import

    factor = math.ceil(MIN_LONGER_SIDE / max(image.shape[-2:]))
    pixels = np.array(to_pil_image(_enlarged(image, factor)), dtype=np.float64)  # (fH, fW, 3)
    large = _enlarged(masks, factor).numpy()
    for i in torch.argsort(masks.flatten(1).sum(1), descending=True).tolist():
        pixels[large[i]] = (1 - OPACITY) * pixels[large[i]] + OPACITY * np.array(colour(i))
        pixels[large[i] & ~ndimage.binary_erosion(large[i], iterations=max(1, factor // 3))] = colour(i)
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    width = max(2, max(picture.size) // 250)
    for box in boxes:
        pen.rectangle([side * factor for side in box], outline=CLICK_COLOURS[1], width=width)
    for x, y, label in points:
        column, row, radius = (x + 0.5) * factor, (y + 0.5) * factor, 3 * width
        extent = (column - radius, row - radius, column + radius, row + radius)
        pen.ellipse(extent, fill=CLICK_COLOURS[label], outline="white", width=max(1, width // 2))
    drawn: Tensor = pil_to_tensor(picture)
    return drawn


def _enlarged(maps: Tensor, factor: int) -> Tensor:
    return maps.cpu().repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)
