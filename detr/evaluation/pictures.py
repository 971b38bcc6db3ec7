"""Pictures of detections: boxes with class names and scores, legible on images of any size."""

import colorsys
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from common.files.names import printable
from common.report.labels import place_labels

MAX_NAME = 40  # characters of a class name in a label
MIN_LONGER_SIDE = 400  # pixels; on a smaller picture, labels would hide the objects
MIN_FONT_SIZE = 14  # pixels


def draw(
    image: Tensor,
    boxes: Tensor,
    names: Sequence[str],
    scores: Tensor | None = None,
    labels: Tensor | None = None,
    masks: Tensor | None = None,
) -> Tensor:
    """Draw boxes with their names, and masks if there are any, on a copy of an image, in ascending order of score.

    Labels do not hide each other. Where there is room, they lie outside their boxes and hide no outlines either; see
    `place_labels`. A label for which there is no room is left out.

    Pillow is used because torchvision's `draw_bounding_boxes` needs a font file for any text size other than 10.

    Args:
        image: uint8 (3, H, W).
        boxes: (n, 4) xyxy in pixels of `image`; the drawn boxes are clipped to it.
        names: n class names.
        scores: (n,) in [0, 1]; None for ground truth. Boxes without scores are drawn in their given order.
        labels: (n,) class indices, which give a class the same colour in all pictures; None = the colours follow the
            alphabetical order of the names in this picture.
        masks: boolean (n, H', W') of the whole image, in any resolution; None = no masks.

    Returns:
        uint8 (3, fH, fW), where f is the smallest integer that makes the longer side at least `MIN_LONGER_SIDE`. If a
        label is wider or higher than this picture, a white margin is added at the right or at the bottom.
    """
    classes = [sorted(set(names)).index(name) for name in names] if labels is None else labels.tolist()
    order = list(range(len(names))) if scores is None else scores.argsort().tolist()
    if masks is not None:
        image = tint(image, masks[order], [colour(classes[i]) for i in order])
    picture, factor = enlarged(image)
    corners = (boxes.detach().cpu() * factor).round()  # (n, 4), both corners are part of the drawn box
    corners[:, 0::2] = corners[:, 0::2].clamp(0, picture.width - 1)
    corners[:, 1::2] = corners[:, 1::2].clamp(0, picture.height - 1)
    texts = [printable(name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}…") for name in names]
    if scores is not None:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores.tolist(), strict=True)]
    items = [Item(corners[i].long().tolist(), texts[i], colour(classes[i])) for i in order]
    pixels: Tensor = pil_to_tensor(_with_items(picture, items))
    return pixels


def tint(image: Tensor, masks: Tensor, colours: Sequence[tuple[int, int, int]]) -> Tensor:
    """Mix the pixels of each mask (n, H', W') with its colour, half and half; later masks cover earlier ones.

    The masks are resized to the image, uint8 (3, H, W), by nearest neighbour.
    """
    if not len(masks):
        return image
    masks = F.interpolate(masks.detach().cpu()[None].byte(), size=tuple(image.shape[1:]))[0].bool()
    tinted = image.clone()
    for mask, rgb in zip(masks, colours, strict=True):
        mixed = image[:, mask] // 2 + image.new_tensor(rgb)[:, None] // 2
        tinted[:, mask] = mixed
    return tinted


class Item(NamedTuple):
    """A box to draw, with its label and its colour."""

    box: list[int]  # xyxy in pixels of the picture; both corners are part of the box
    text: str
    colour: tuple[int, int, int]  # RGB, 0 to 255


def enlarged(image: Tensor) -> tuple[Image.Image, int]:
    """Enlarge an image so that its longer side is at least `MIN_LONGER_SIDE`.

    Returns the picture and the factor, which is the smallest integer that suffices.
    """
    factor = math.ceil(MIN_LONGER_SIDE / max(image.shape[-2:]))
    picture: Image.Image = to_pil_image(image.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1))
    return picture, factor


def _with_items(picture: Image.Image, items: list[Item]) -> Image.Image:
    """Draw all boxes, then the lines from labels to boxes, then all labels.

    In each of these steps, later items cover earlier ones. The positions of the labels are chosen in reverse order, so
    the label of the last item gets the best position. A line joins a label to its box if the two do not touch. A
    picture that is smaller than a label gets a white margin.
    """
    shorter, longer = sorted(picture.size)
    font = ImageFont.load_default(size=max(MIN_FONT_SIZE, min(longer // 60, shorter // 16)))
    outline = max(2, longer // 400)
    sizes = [label_size(item.text, font) for item in items]
    picture = _with_margin(picture, sizes)
    pen = ImageDraw.Draw(picture)
    for item in items:
        pen.rectangle(item.box, outline=item.colour, width=outline)
    boxes = np.array([item.box for item in items], dtype=np.int64).reshape(-1, 4) + np.array([0, 0, 1, 1])
    corners = place_labels(boxes[::-1], sizes[::-1], picture.size, outline)[::-1]
    placed = [(item, *corner, *size) for item, corner, size in zip(items, corners, sizes, strict=True) if corner]
    for item, x, y, width, height in placed:
        ends = _nearest(x, x + width - 1, *item.box[0::2]), _nearest(y, y + height - 1, *item.box[1::2])
        pen.line([*zip(*ends, strict=True)], fill=item.colour, width=max(1, outline // 2))
    for item, x, y, width, height in placed:
        pen.rectangle((x, y, x + width - 1, y + height - 1), fill=item.colour)
        pen.text((x + 2, y + 2), item.text, fill="black", font=font)
    return picture


def _with_margin(picture: Image.Image, sizes: list[tuple[int, int]]) -> Image.Image:
    """Extend the picture with white at the right and at the bottom until it is at least as large as each label."""
    width, height = (max([side, *(size[axis] for size in sizes)]) for axis, side in enumerate(picture.size))
    extended = Image.new("RGB", (width, height), "white")
    extended.paste(picture)
    return extended


def _nearest(label_start: int, label_end: int, box_start: int, box_end: int) -> tuple[int, int]:
    """Return the coordinates, on one axis, at which a label and a box are nearest to each other: (label's, box's).

    If the two overlap on this axis, both coordinates are the middle of the overlap.
    """
    start, end = max(label_start, box_start), min(label_end, box_end)
    if start <= end:
        return (start + end) // 2, (start + end) // 2
    return (label_end, box_start) if label_end < box_start else (label_start, box_end)


def label_size(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> tuple[int, int]:
    """Return the width and height of a label in pixels, including a border of two pixels on each side."""
    _, _, right, bottom = font.getbbox(text)
    return math.ceil(right) + 4, math.ceil(bottom) + 4


def colour(label: int) -> tuple[int, int, int]:
    """Return a bright RGB colour for a class index; black text is legible on it.

    From one index to the next, the hue advances by 0.618 of the colour circle (the golden ratio).
    """
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.75, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)
