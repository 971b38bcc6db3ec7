"""Pictures of detections: boxes with class names and scores, legible on images of any size."""

import colorsys
import math
from collections.abc import Sequence

from PIL import ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

MAX_NAME = 40  # characters of a class name in a label
MIN_LONGER_SIDE = 400  # pixels; on a smaller picture, labels would hide the objects


def draw(
    image: Tensor,
    boxes: Tensor,
    names: Sequence[str],
    scores: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Draw boxes with their names on a copy of an image, in ascending order of score.

    Pillow is used because torchvision's `draw_bounding_boxes` needs a font file for text of any other size than 10.

    Args:
        image: uint8 (3, H, W).
        boxes: (n, 4) xyxy in pixels of `image`; the drawn boxes are clipped to it.
        names: n class names.
        scores: (n,) in [0, 1]; None for ground truth.
        labels: (n,) class indices, by which a class has the same colour in all pictures; with None, the colours follow
            the alphabetical order of the names in this picture.

    Returns:
        uint8 (3, fH, fW), where f is the smallest integer that makes the longer side at least `MIN_LONGER_SIDE`.
    """
    height, width = image.shape[-2:]
    factor = math.ceil(MIN_LONGER_SIDE / max(height, width))
    enlarged = image.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)  # (3, fH, fW)
    picture = to_pil_image(enlarged)
    canvas = ImageDraw.Draw(picture)
    longer_side = max(picture.size)
    font = ImageFont.load_default(size=max(14, longer_side // 60))
    corners = (boxes.detach().cpu() * factor).round()
    corners[:, 0::2] = corners[:, 0::2].clamp(0, picture.width - 1)
    corners[:, 1::2] = corners[:, 1::2].clamp(0, picture.height - 1)
    classes = [sorted(set(names)).index(name) for name in names] if labels is None else labels.tolist()
    texts = [name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}…" for name in names]
    if scores is not None:
        texts = [f"{name} {score:.2f}" for name, score in zip(texts, scores.tolist(), strict=True)]
    order = range(len(texts)) if scores is None else scores.argsort().tolist()
    for i in order:
        x0, y0, x1, y1 = corners[i].tolist()
        canvas.rectangle((x0, y0, x1, y1), outline=colour(classes[i]), width=max(2, longer_side // 400))
        _, _, right, bottom = canvas.textbbox((0, 0), texts[i], font=font)
        x = max(0, min(x0, picture.width - right - 4))
        y = y0 - bottom - 4 if y0 >= bottom + 4 else y0  # above the box, or inside it at the picture's upper edge
        canvas.rectangle((x, y, x + right + 4, y + bottom + 4), fill=colour(classes[i]))
        canvas.text((x + 2, y + 2), texts[i], fill="black", font=font)
    pixels: Tensor = pil_to_tensor(picture)
    return pixels


def colour(label: int) -> tuple[int, int, int]:
    """A bright colour for a class index, on which black text is legible; hues advance by the golden ratio."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.75, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)
