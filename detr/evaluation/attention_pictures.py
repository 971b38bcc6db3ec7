"""Pictures of attention in detectors: a sheet with a tile for each detected object.

Maps are drawn as figures 3 and 6 of DETR (Carion et al. 2020, arXiv 2005.12872), sampling points as figure 6 of
Deformable DETR (Zhu et al. 2020, arXiv 2010.04159).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, rgb_to_grayscale, to_pil_image

from common.report.colours import HEAT, ramp
from common.report.tiles import add_caption, fitted, overlay, sheet_of
from detr.evaluation.attention import Points

MAX_OBJECTS = 24  # objects of a sheet; those after them are left out
OUTLINE = 3  # pixels of a box's outline
MAX_RADIUS, MIN_RADIUS = 9.0, 1.5  # pixels of the dots of the highest weight and of weight 0
CROSS = 7  # pixels of a cross's arms


class Object(NamedTuple):
    """A detected object: its box, the caption of its tile, and the colour of its outline."""

    box: Sequence[float]  # xyxy in pixels of the image
    text: str
    colour: tuple[int, int, int]  # RGB, 0 to 255


def draw_queries(image: Tensor, attention: Tensor | Points, objects: Sequence[Object]) -> Tensor:
    """Draw what the query of each object attends to, with the object's box and, if known, the query's reference point.

    Args:
        image: uint8 (3, H, W).
        attention: maps (n, h, H', W'), which are averaged over heads, or points, each for the n objects.
        objects: the n objects, in the order of their tiles.

    Returns:
        uint8 (3, H'', W''): the image with all boxes, then a tile for each of the first `MAX_OBJECTS` objects.
    """
    small, scale = _scaled(image)
    boxes = [[side * scale for side in item.box] for item in objects]
    first = small
    for box, item in reversed([*zip(boxes, objects, strict=True)]):
        first = _outlined(first, box, item.colour)
    tiles = [first]
    for i, (box, item) in enumerate(zip(boxes[:MAX_OBJECTS], objects, strict=False)):
        tile = _outlined(_seen(small, attention, i), box, item.colour)
        if isinstance(attention, Points) and attention.references is not None:
            tile = _crossed(tile, [(attention.references[i] * _size(small)).tolist()])
        tiles.append(tile)
    return _sheet(tiles, objects, "detected objects")


def draw_encoder(image: Tensor, attention: Tensor | Points, objects: Sequence[Object]) -> Tensor:
    """Draw what the encoder's position at the centre of each object attends to; a cross marks this centre.

    Arguments and result are those of `draw_queries`; the first tile is the image with all centres.
    """
    small, scale = _scaled(image)
    centres = [((x0 + x1) / 2 * scale, (y0 + y1) / 2 * scale) for x0, y0, x1, y1 in (item.box for item in objects)]
    tiles = [_crossed(small, centres)]
    tiles += [_crossed(_seen(small, attention, i), [centre]) for i, centre in enumerate(centres[:MAX_OBJECTS])]
    return _sheet(tiles, objects, "centres of detected objects")


def _sheet(tiles: Sequence[Tensor], objects: Sequence[Object], what: str) -> Tensor:
    count = f"{MAX_OBJECTS} of {len(objects)}" if len(objects) > MAX_OBJECTS else str(len(objects))
    captions = [f"{count} {what}", *(item.text for item in objects[:MAX_OBJECTS])]
    return sheet_of([add_caption(tile, text, None) for tile, text in zip(tiles, captions, strict=True)])


def _seen(image: Tensor, attention: Tensor | Points, i: int) -> Tensor:
    if isinstance(attention, Points):
        return draw_points(image, attention.locations[i], attention.weights[i])
    return overlay(image, attention[i].float().mean(0))


def draw_points(image: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Draw sampling points on a dark grey copy of an image: uint8 (3, H, W) -> uint8 (3, H, W).

    Args:
        image: uint8 (3, H, W).
        locations: (n, 2) x, y relative to the image; points outside it are not seen.
        weights: (n,), not negative. The radius of a dot grows with the square root of its weight and its colour
            brightens with it; both are relative to the highest weight. Higher weights cover lower ones.
    """
    shares = weights.float() / weights.max().clamp(min=1e-30)  # (n,)
    grey = (0.5 * rgb_to_grayscale(image, num_output_channels=3)).to(torch.uint8)
    picture: Image.Image = to_pil_image(grey)
    pen = ImageDraw.Draw(picture)
    colours = ramp(0.3 + 0.7 * shares, HEAT).T.tolist()
    radii = (MIN_RADIUS + (MAX_RADIUS - MIN_RADIUS) * shares.sqrt()).tolist()
    positions = (locations * _size(image) - 0.5).tolist()  # a pixel's centre is at its index
    for i in shares.argsort(stable=True).tolist():
        (x, y), r = positions[i], radii[i]
        pen.ellipse((x - r, y - r, x + r, y + r), fill=tuple(colours[i]))
    pixels: Tensor = pil_to_tensor(picture)
    return pixels


def _scaled(image: Tensor) -> tuple[Tensor, float]:
    """Resize an image for a tile; returns it, and the factor from the image's pixels to those of the tile."""
    small = fitted(image)
    return small, max(small.shape[-2:]) / max(image.shape[-2:])


def _size(image: Tensor) -> Tensor:
    return torch.tensor([image.shape[-1], image.shape[-2]])  # (2,) as width, height


def _outlined(image: Tensor, box: Sequence[float], colour: tuple[int, int, int]) -> Tensor:
    """Draw the outline of a box xyxy, clipped to the image, between two thin dark lines."""
    picture: Image.Image = to_pil_image(image)
    pen = ImageDraw.Draw(picture)
    x0, x1 = (min(max(round(x), 0), picture.width - 1) for x in box[0::2])
    y0, y1 = (min(max(round(y), 0), picture.height - 1) for y in box[1::2])
    pen.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=(0, 0, 0), width=OUTLINE + 2)
    pen.rectangle((x0, y0, x1, y1), outline=colour, width=OUTLINE)
    pixels: Tensor = pil_to_tensor(picture)
    return pixels


def _crossed(image: Tensor, points: Sequence[Sequence[float]]) -> Tensor:
    """Mark points x, y in pixels by green crosses with a dark edge."""
    picture: Image.Image = to_pil_image(image)
    pen = ImageDraw.Draw(picture)
    for x, y in points:
        for colour, width, arm in (((0, 40, 0), 5, CROSS + 1), ((60, 255, 60), 3, CROSS)):
            pen.line((x - arm, y, x + arm, y), fill=colour, width=width)
            pen.line((x, y - arm, x, y + arm), fill=colour, width=width)
    pixels: Tensor = pil_to_tensor(picture)
    return pixels
