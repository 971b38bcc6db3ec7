"""Sheets of an image's copies, each with a caption and, for attention, with the colours of a map over it."""

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2.functional import pil_to_tensor, resize, rgb_to_grayscale, to_pil_image

from common.report.colours import HEAT, ramp
from common.report.text import height_of, lines_of

MIN_SIDE = 400  # pixels of an image's longer side; smaller images are enlarged, so that a caption fits
MAX_SIDE = 480  # pixels of an image's longer side in a sheet; larger images are downscaled
SPACING = 8  # pixels between images
CAPTION_COLOURS = {True: (185, 235, 190), False: (250, 190, 185), None: (225, 225, 225)}  # correct, wrong, unknown


def sheet_of(tiles: Sequence[Tensor]) -> Tensor:
    """Put tiles uint8 (3, H, W) on white in about as many rows as columns: uint8 (3, H', W').

    A tile that is smaller than the largest height and width gets a white margin at the right and at the bottom.
    """
    height, width = (max(tile.shape[axis] for tile in tiles) + SPACING for axis in (-2, -1))
    columns = math.ceil(math.sqrt(len(tiles)))
    spaced = [pad(tile, (0, width - tile.shape[-1], 0, height - tile.shape[-2]), value=255) for tile in tiles]
    spaced += [torch.full_like(spaced[0], 255)] * (-len(tiles) % columns)
    rows = [torch.cat(spaced[i : i + columns], dim=-1) for i in range(0, len(spaced), columns)]
    return torch.cat(rows, dim=-2)[:, :-SPACING, :-SPACING]


def fitted(image: Tensor) -> Tensor:
    """Resize an image uint8 (3, H, W) for a sheet.

    It is downscaled if its longer side is above `MAX_SIDE` pixels, and enlarged by an integer if below `MIN_SIDE`.
    """
    longer = max(image.shape[-2:])
    if longer > MAX_SIDE:
        image = resize(image, [max(1, side * MAX_SIDE // longer) for side in image.shape[-2:]], antialias=True)
    return enlarged(image, math.ceil(MIN_SIDE / longer))


def enlarged(image: Tensor, factor: int) -> Tensor:
    """Repeat each pixel `factor` times in both directions: (3, H, W) -> (3, factor H, factor W), on the CPU."""
    return image.cpu().repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)


def overlay(image: Tensor, map: Tensor) -> Tensor:
    """Blend a grey copy of an image with the colours of a map (gh, gw) stretched to the image's size.

    uint8 (3, H, W) -> uint8 (3, H, W). The map's maximum gets the brightest colour; cells are not smoothed. NaN,
    infinite and negative values of the map count as 0.
    """
    map = map.float().cpu().nan_to_num(0, posinf=0).clamp(min=0)
    height, width = image.shape[-2:]
    rows = torch.arange(height) * map.shape[0] // height  # the row of the map for each row of pixels
    columns = torch.arange(width) * map.shape[1] // width
    colours = ramp(map / map.max().clamp(min=1e-30), HEAT)[:, rows][:, :, columns]  # (3, H, W)
    grey: Tensor = rgb_to_grayscale(image, num_output_channels=3)
    return (0.35 * grey + 0.65 * colours).round().to(torch.uint8)


def add_caption(image: Tensor, text: str, correct: bool | None) -> Tensor:
    """Write a text under an image: uint8 (3, H, W) -> uint8 (3, H', W').

    The text's background is green if `correct` is True, red if it is False, and grey if it is None. A small image is
    enlarged by the smallest integer factor that makes its longer side at least `MIN_SIDE` pixels. A narrow image gets
    white margins, and a long text is broken into lines.
    """
    large = to_pil_image(enlarged(image, math.ceil(MIN_SIDE / max(image.shape[-2:]))))
    font = ImageFont.load_default(size=max(16, max(large.size) // 24))
    width = max(large.width, MIN_SIDE // 2)
    lines = lines_of(text, font, width - 12)
    step = height_of(font) + 4
    picture = Image.new("RGB", (width, large.height + step * len(lines) + 8), "white")
    picture.paste(large, ((width - large.width) // 2, 0))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, large.height, width, picture.height), fill=CAPTION_COLOURS[correct])
    for number, line in enumerate(lines):
        pen.text((6, large.height + 6 + number * step), line, fill="black", font=font)
    pixels: Tensor = pil_to_tensor(picture)
    return pixels
