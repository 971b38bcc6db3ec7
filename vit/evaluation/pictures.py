"""Pictures for classification: confusion matrices, attention maps over an image, images with captions."""

import math
import unicodedata
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2.functional import pil_to_tensor, resize, rgb_to_grayscale, to_pil_image

from common.report.colours import BLUES, HEAT, ramp

MIN_SIDE = 400  # pixels of an image's longer side; smaller images are enlarged, so that a caption fits
MAX_SIDE = 480  # pixels of an image's longer side in a sheet; larger images are downscaled
MAX_NAMED_CLASSES = 40  # a confusion matrix of more classes is drawn without names and counts
SPACING = 8  # pixels between images
CAPTION_COLOURS = {True: (185, 235, 190), False: (250, 190, 185), None: (225, 225, 225)}  # correct, wrong, unknown

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


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
        cell = max(30, 240 // classes, _width(str(int(counts.max())), font) + 10)
    else:
        cell = max(2, 1000 // classes)
    matrix = to_pil_image(_enlarged(ramp(shares.sqrt(), BLUES), cell))
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
    enlarged = _enlarged(image, math.ceil(MIN_SIDE / max(image.shape[-2:])))
    gap = enlarged.new_full((3, enlarged.shape[-2], SPACING), 255)
    return torch.cat([enlarged, gap, _overlaid(enlarged, map)], dim=-1)


def draw_attention_sheet(image: Tensor, maps: Tensor) -> Tensor:
    """Draw an image uint8 (3, H, W) and, over grey copies of it, the maps (heads, gh, gw) and their mean over heads.

    Each map is divided by its own maximum. If the image's longer side is above `MAX_SIDE` pixels, the image is
    downscaled; if it is below `MIN_SIDE` pixels, the image is enlarged by an integer factor. Returns the image and the
    overlaid maps as tiles in rows of one picture, uint8 (3, H', W').
    """
    longer = max(image.shape[-2:])
    if longer > MAX_SIDE:
        image = resize(image, [max(1, side * MAX_SIDE // longer) for side in image.shape[-2:]], antialias=True)
    image = _enlarged(image, math.ceil(MIN_SIDE / longer))
    captions = ["mean of heads", *(f"head {number}" for number in range(len(maps)))]
    maps = torch.cat([maps.float().mean(0, keepdim=True), maps])  # (1 + heads, gh, gw)
    overlays = [add_caption(_overlaid(image, map), text, None) for text, map in zip(captions, maps, strict=True)]
    tiles = [add_caption(image, "image", None), *overlays]
    columns = math.ceil(math.sqrt(len(tiles)))
    tiles += [torch.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    spaced = [pad(tile, (0, SPACING, 0, SPACING), value=255) for tile in tiles]
    rows = [torch.cat(spaced[i : i + columns], dim=-1) for i in range(0, len(spaced), columns)]
    return torch.cat(rows, dim=-2)[:, :-SPACING, :-SPACING]


def add_caption(image: Tensor, text: str, correct: bool | None) -> Tensor:
    """Write a text under an image: uint8 (3, H, W) -> uint8 (3, H', W').

    The text's background is green if `correct` is True, red if it is False, and grey if it is None. A small image is
    enlarged by the smallest integer factor that makes its longer side at least `MIN_SIDE` pixels. A narrow image gets
    white margins, and a long text is broken into lines.
    """
    enlarged = to_pil_image(_enlarged(image, math.ceil(MIN_SIDE / max(image.shape[-2:]))))
    font = ImageFont.load_default(size=max(16, max(enlarged.size) // 24))
    width = max(enlarged.width, MIN_SIDE // 2)
    lines = _lines(text, font, width - 12)
    step = _height(font) + 4
    picture = Image.new("RGB", (width, enlarged.height + step * len(lines) + 8), "white")
    picture.paste(enlarged, ((width - enlarged.width) // 2, 0))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, enlarged.height, width, picture.height), fill=CAPTION_COLOURS[correct])
    for number, line in enumerate(lines):
        pen.text((6, enlarged.height + 6 + number * step), line, fill="black", font=font)
    pixels: Tensor = pil_to_tensor(picture)
    return pixels


def _enlarged(image: Tensor, factor: int) -> Tensor:
    return image.cpu().repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)  # (3, fH, fW)


def _overlaid(image: Tensor, map: Tensor) -> Tensor:
    """Blend a grey copy of an image with the colours of a map (gh, gw) stretched to the image's size.

    uint8 (3, H, W) -> uint8 (3, H, W). NaN, infinite and negative values of the map count as 0.
    """
    map = map.float().cpu().nan_to_num(0, posinf=0).clamp(min=0)
    height, width = image.shape[-2:]
    rows = torch.arange(height) * map.shape[0] // height  # the row of the map for each row of pixels
    columns = torch.arange(width) * map.shape[1] // width
    colours = ramp(map / map.max().clamp(min=1e-30), HEAT)[:, rows][:, :, columns]  # (3, H, W)
    grey: Tensor = rgb_to_grayscale(image, num_output_channels=3)
    return (0.35 * grey + 0.65 * colours).round().to(torch.uint8)


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
    ascii_names = [_ascii(name) for name in names]
    texts = [
        _shortened(text, font, 180) if text.count("?") == name.count("?") else str(label)
        for label, (name, text) in enumerate(zip(names, ascii_names, strict=True))
    ]
    side = Image.new("RGB", (max(_width(text, font) for text in texts) + 16, cell * len(texts)), "white")
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
    width = _width(str(classes), font) + 16
    steps = (10, 20, 50, 100, 200, 500, 1000)
    step = next((step for step in steps if step * cell >= 3 * width), classes)
    side = Image.new("RGB", (width, classes * cell), "white")
    upper = Image.new("RGB", (classes * cell, _height(font) + 14), "white")
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
    line = _height(font) + 12
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
    title = Image.new("RGB", (_width("truth", font) + 4, line), "white")
    ImageDraw.Draw(title).text((title.width / 2, line / 2), "truth", fill="black", font=font, anchor="mm")
    title = title.transpose(Image.Transpose.ROTATE_90)
    picture.paste(title, (0, int(y + (matrix.height - title.height) / 2)))
    picture.paste(key, (min(x, size[0] - 20 - key.width), y + matrix.height + 16))
    return picture


def _key(font: Font) -> Image.Image:
    """Draw the legend of a confusion matrix's colours: the shares 0, 1, 10, 50 and 100 %."""
    caption = "share of the true class"
    box, height = _width("100%", font) + 10, _height(font) + 8
    shares = (0.0, 0.01, 0.1, 0.5, 1.0)
    key = Image.new("RGB", (box * len(shares) + 10 + _width(caption, font), height), "white")
    pen = ImageDraw.Draw(key)
    for number, share in enumerate(shares):
        fill = tuple(ramp(torch.tensor(share).sqrt(), BLUES).tolist())
        pen.rectangle((number * box, 0, (number + 1) * box - 1, height - 1), fill=fill, outline=(200, 200, 200))
        ink = "white" if share > 0.4 else "black"
        pen.text((number * box + box / 2, height / 2), f"{share:.0%}", fill=ink, font=font, anchor="mm")
    pen.text((box * len(shares) + 10, height / 2), caption, fill="black", font=font, anchor="lm")
    return key


def _lines(text: str, font: Font, width: int) -> list[str]:
    """Break a text at spaces into lines of at most `width` pixels; a word that is wider is shortened."""
    lines: list[str] = []
    for word in _ascii(text).split():
        extended = f"{lines[-1]} {word}" if lines else word
        if lines and _width(extended, font) <= width:
            lines[-1] = extended
        else:
            lines.append(_shortened(word, font, width))
    return lines or [""]


def _ascii(text: str) -> str:
    """Convert a text to one line of ASCII for Pillow's own font.

    Accents are dropped. Characters that have no ASCII form become "?".
    """
    letters = unicodedata.normalize("NFKD", " ".join(text.split()))
    return "".join(c for c in letters if not unicodedata.combining(c)).encode("ascii", "replace").decode()


def _shortened(text: str, font: Font, width: int) -> str:
    """Replace the end of a text by an ellipsis if the text is wider than `width` pixels."""
    if _width(text, font) <= width:
        return text
    return next((f"{text[:n]}…" for n in range(len(text), 0, -1) if _width(f"{text[:n]}…", font) <= width), "…")


def _width(text: str, font: Font) -> int:
    return math.ceil(font.getlength(text))


def _height(font: Font) -> int:
    """Return the height in pixels of a line of text, including descenders."""
    return math.ceil(font.getbbox("Ag")[3])
