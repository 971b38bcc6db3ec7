"""Pictures of lanes: the curves on their image, with their scores."""

from collections.abc import Sequence

import numpy as np
from PIL import ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from common.report.labels import place_labels
from detr.evaluation.pictures import MIN_FONT_SIZE, colour, enlarged, label_size

Points = Sequence[tuple[float, float]]  # x and y in pixels, from the upper to the lower end of a lane


def draw_lanes(image: Tensor, lanes: Sequence[Points], scores: Sequence[float]) -> Tensor:
    """Draw lanes on a copy of an image, from left to right in different colours, each with its score at its lower end.

    Labels do not hide each other; a label for which there is no room is left out.

    Args:
        image: uint8 (3, H, W).
        lanes: the points of each lane, in pixels of `image`. Points outside of it are not visible.
        scores: the score of each lane, in [0, 1].

    Returns:
        uint8 (3, fH, fW), where f is the smallest integer that makes the longer side at least
        `detr.evaluation.pictures.MIN_LONGER_SIDE`.
    """
    picture, factor = enlarged(image)
    pen = ImageDraw.Draw(picture)
    width = max(2, max(picture.size) // 200)
    font = ImageFont.load_default(size=max(MIN_FONT_SIZE, max(picture.size) // 60))
    order = sorted((i for i, lane in enumerate(lanes) if lane), key=lambda i: lanes[i][-1][0])
    for number, i in enumerate(order):
        scaled = [(x * factor, y * factor) for x, y in lanes[i]]
        pen.line(scaled, fill=colour(number), width=width, joint="curve")
    texts = [f"{scores[i]:.2f}" for i in order]
    sizes = [label_size(text, font) for text in texts]
    ends = np.array([lanes[i][-1] for i in order]).reshape(-1, 2) * factor
    corners = (ends - width).clip(0, np.array(picture.size) - 2 * width - 1).astype(np.int64)
    boxes = np.concatenate([corners, corners + 2 * width], axis=1)  # around the lower ends
    for number, (text, size, place) in enumerate(
        zip(texts, sizes, place_labels(boxes, sizes, picture.size, width), strict=True)
    ):
        if place is not None:
            pen.rectangle((*place, place[0] + size[0] - 1, place[1] + size[1] - 1), fill=colour(number))
            pen.text((place[0] + 2, place[1] + 2), text, fill="black", font=font)
    pixels: Tensor = pil_to_tensor(picture)
    return pixels
