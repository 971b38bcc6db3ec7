"""Pictures for classification: confusion matrices, and attention maps over an image."""

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from common.report.colours import BLUES, SIGNED, ramp
from common.report.text import Font, height_of, shortened, to_ascii, width_of
from common.report.tiles import MIN_SIDE, SPACING, add_caption, enlarged, fitted, overlay, sheet_of

MAX_NAMED_CLASSES = 40  # a confusion matrix of more classes is drawn without names and counts


def draw_confusion_matrix(counts: Tensor, names: Sequence[str]) -> Tensor:
    """Draw a confusion matrix, int (K, K) with a row per true class and a column per predicted class: uint8 (3, H, W).

    Counts above zero are written into their cells. The colour of a cell darkens with the square root of the count's
    share of the row, so that rare mistakes are visible. With more than `MAX_NAMED_CLASSES` classes, counts are omitted
    and the axes show indices instead of names.
    """
    classes = len(names)
    # The names of more than 20 classes need smaller text. The large picture of more than 500 classes needs larger text.
    font = ImageFont.load_default(size=15 if classes <= 20 else 12 if classes <= 500 else 22)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)  # a class without images has a white row
    if classes <= MAX_NAMED_CLASSES:
        cell = max(30, 240 // classes, width_of(str(int(counts.max())), font) + 10)
    else:
        cell = max(2, 1000 // classes)
    matrix = to_pil_image(enlarged(ramp(shares.sqrt(), BLUES), cell))
    if classes <= MAX_NAMED_CLASSES:
        _write_counts(matrix, counts, shares, cell, font)
        upper, left = _name_margins(names, cell, font)
    else:
        upper, left = _index_margins(classes, cell, font)
    framed: Tensor = pil_to_tensor(_framed(matrix, upper, left, font))
    return framed


def draw_heat_map(image: Tensor, map: Tensor) -> Tensor:
    """Draw an image, and beside it a grey copy overlaid with the colours of a non-negative map (gh, gw).

    uint8 (3, H, W) -> uint8 (3, fH, 2 fW + SPACING), where f is the smallest integer factor that makes the longer side
    at least `MIN_SIDE` pixels. The map's maximum gets the brightest colour. Cells of the map are not smoothed.
    """
    large = enlarged(image, math.ceil(MIN_SIDE / max(image.shape[-2:])))
    gap = large.new_full((3, large.shape[-2], SPACING), 255)
    return torch.cat([large, gap, overlay(large, map)], dim=-1)


def draw_attention_sheet(image: Tensor, maps: Tensor, edges: tuple[Sequence[int], Sequence[int]] = ((), ())) -> Tensor:
    """Draw an image uint8 (3, H, W) and, over grey copies of it, the maps (heads, gh, gw) and their mean over heads.

    White lines precede the rows and columns of the maps in `edges`, such as those at which a window begins. Each map is
    divided by its own maximum. If the image's longer side is above `MAX_SIDE` pixels, the image is
    downscaled; if it is below `MIN_SIDE` pixels, the image is enlarged by an integer factor. Returns the image and the
    overlaid maps as tiles in rows of one picture, uint8 (3, H', W').
    """
    image = fitted(image)
    captions = ["mean of heads", *(f"head {number}" for number in range(len(maps)))]
    maps = torch.cat([maps.float().mean(0, keepdim=True), maps])  # (1 + heads, gh, gw)
    overlays = [_with_lines(overlay(image, map), edges, map.shape) for map in maps]
    captioned = [add_caption(tile, text, None) for text, tile in zip(captions, overlays, strict=True)]
    return sheet_of([add_caption(image, "image", None), *captioned])


def draw_biases(biases: Tensor) -> Tensor:
    """Draw the relative position biases (heads, 2 h - 1, 2 w - 1) as one tile for each head: uint8 (3, H, W).

    Positive values are red, negative ones are blue, and zero is white. Each head has a scale of its own, which its
    caption states.
    """
    tiles = []
    for number, bias in enumerate(biases):
        limit = float(bias.abs().max())
        colours = ramp(bias / (2 * limit or 1.0) + 0.5, SIGNED)  # (3, 2 h - 1, 2 w - 1)
        tiles.append(add_caption(colours, f"head {number}: {float(bias.min()):.2f} to {float(bias.max()):.2f}", None))
    return sheet_of(tiles)


def _with_lines(picture: Tensor, edges: tuple[Sequence[int], Sequence[int]], cells: Sequence[int]) -> Tensor:
    """Draw a white line before each row and column in `edges` of a picture of a map with `cells` (rows, columns)."""
    for axis, numbers in enumerate(edges, start=1):
        for number in numbers:
            picture.select(axis, -(-number * picture.shape[axis] // cells[axis - 1])).fill_(255)
    return picture


def _write_counts(matrix: Image.Image, counts: Tensor, shares: Tensor, cell: int, font: Font) -> None:
    """Draw thin lines between the cells, and the counts above zero: white on dark cells, black on the others."""
    pen = ImageDraw.Draw(matrix)
    for i in range(1, len(counts)):
        pen.line((i * cell, 0, i * cell, matrix.height), fill=(225, 225, 225))
        pen.line((0, i * cell, matrix.width, i * cell), fill=(225, 225, 225))
    for row, column in counts.nonzero().tolist():
        ink = "white" if shares[row, column] > 0.4 else "black"
        middle = (column * cell + cell / 2, row * cell + cell / 2)
        pen.text(middle, str(int(counts[row, column])), fill=ink, font=font, anchor="mm")


def _name_margins(names: Sequence[str], cell: int, font: Font) -> tuple[Image.Image, Image.Image]:
    """Draw the margins with the names of the classes; returns the upper margin, with rotated names, and the left one.

    A name that the font cannot write is replaced by the index of its class. A long name is shortened.
    """
    ascii_names = [to_ascii(name) for name in names]
    texts = [
        shortened(text, font, 180) if text.count("?") == name.count("?") else str(label)
        for label, (name, text) in enumerate(zip(names, ascii_names, strict=True))
    ]
    side = Image.new("RGB", (max(width_of(text, font) for text in texts) + 16, cell * len(texts)), "white")
    pen = ImageDraw.Draw(side)
    for number, text in enumerate(texts):
        pen.text((side.width - 8, number * cell + cell / 2), text, fill="black", font=font, anchor="rm")
    upper = Image.new("RGB", side.size, "white")  # rotated below, so that its last row becomes the last column
    pen = ImageDraw.Draw(upper)
    for number, text in enumerate(texts):
        pen.text((8, number * cell + cell / 2), text, fill="black", font=font, anchor="lm")
    return upper.transpose(Image.Transpose.ROTATE_90), side


def _index_margins(classes: int, cell: int, font: Font) -> tuple[Image.Image, Image.Image]:
    """Draw the margins with the index of every 10th (or 20th, 50th, ...) class; returns the upper and the left one."""
    width = width_of(str(classes), font) + 16
    steps = (10, 20, 50, 100, 200, 500, 1000)
    step = next((step for step in steps if step * cell >= 3 * width), classes)
    side = Image.new("RGB", (width, classes * cell), "white")
    upper = Image.new("RGB", (classes * cell, height_of(font) + 14), "white")
    at_side, above = ImageDraw.Draw(side), ImageDraw.Draw(upper)
    for label in range(0, classes, step):
        centre = label * cell + cell // 2
        # In small cells, the text of index 0 starts at the cell's centre: text centred there would be clipped.
        side_anchor, upper_anchor = ("rt", "ld") if centre < upper.height / 4 else ("rm", "md")
        at_side.line((width - 6, centre, width, centre), fill="black")
        at_side.text((width - 8, centre), str(label), fill="black", font=font, anchor=side_anchor)
        above.line((centre, upper.height - 6, centre, upper.height), fill="black")
        above.text((centre, upper.height - 8), str(label), fill="black", font=font, anchor=upper_anchor)
    return upper, side


def _framed(matrix: Image.Image, upper: Image.Image, left: Image.Image, font: Font) -> Image.Image:
    """Draw the matrix with a thin frame, margins and axis titles, and below it the legend of its colours."""
    line = height_of(font) + 12
    key = _key(font)
    x, y = line + left.width, line + upper.height  # the matrix's corner
    size = (max(x + matrix.width, 10 + key.width) + 20, y + matrix.height + key.height + 24)
    picture = Image.new("RGB", size, "white")
    picture.paste(upper, (x, line))
    picture.paste(left, (line, y))
    picture.paste(matrix, (x, y))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((x - 1, y - 1, x + matrix.width, y + matrix.height), outline=(120, 120, 120))
    pen.text((x + matrix.width / 2, line / 2), "predicted", fill="black", font=font, anchor="mm")
    title = Image.new("RGB", (width_of("truth", font) + 4, line), "white")
    ImageDraw.Draw(title).text((title.width / 2, line / 2), "truth", fill="black", font=font, anchor="mm")
    title = title.transpose(Image.Transpose.ROTATE_90)
    picture.paste(title, (0, int(y + (matrix.height - title.height) / 2)))
    picture.paste(key, (min(x, size[0] - 20 - key.width), y + matrix.height + 16))
    return picture


def _key(font: Font) -> Image.Image:
    """Draw the legend of a confusion matrix's colours: the shares 0, 1, 10, 50 and 100 %."""
    caption = "share of the true class"
    box, height = width_of("100%", font) + 10, height_of(font) + 8
    shares = (0.0, 0.01, 0.1, 0.5, 1.0)
    key = Image.new("RGB", (box * len(shares) + 10 + width_of(caption, font), height), "white")
    pen = ImageDraw.Draw(key)
    for number, share in enumerate(shares):
        fill = tuple(ramp(torch.tensor(share).sqrt(), BLUES).tolist())
        pen.rectangle((number * box, 0, (number + 1) * box - 1, height - 1), fill=fill, outline=(200, 200, 200))
        ink = "white" if share > 0.4 else "black"
        pen.text((number * box + box / 2, height / 2), f"{share:.0%}", fill=ink, font=font, anchor="mm")
    pen.text((box * len(shares) + 10, height / 2), caption, fill="black", font=font, anchor="lm")
    return key
