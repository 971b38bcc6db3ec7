"""Put panels (a picture with a title above it and lines of text below it) side by side on a sheet, and draw a curve."""

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from scripts.assigning.canvas import Colour

GAP = 24  # pixels between panels
TITLE_SIZE, TEXT_SIZE = 19, 14  # pixels
LINE = 19  # pixels from one line of text to the next
MAX_COUNTS = 12  # objects whose counts are written below a panel; the table has all
CURVE = (640, 360)  # width and height of the area of a curve in pixels
BLUE: Colour = (30, 95, 165)


class Panel(NamedTuple):
    """A picture with its texts; each count is a colour and the text beside it."""

    title: str
    picture: Image.Image
    counts: Sequence[tuple[Colour, str]]
    caption: str


def make_sheet(heading: str, panels: Sequence[Panel], columns: int) -> Image.Image:
    """Put panels on a white sheet, row by row, below a heading."""
    blocks = [_block(panel) for panel in panels]
    rows = [blocks[start : start + columns] for start in range(0, len(blocks), columns)]
    width = max(sum(block.width + GAP for block in row) for row in rows) + GAP
    heights = [max(block.height for block in row) + GAP for row in rows]
    lines = _wrap(heading, width - 2 * GAP, TITLE_SIZE)
    top = GAP + len(lines) * (TITLE_SIZE + 6) + GAP // 2
    sheet = Image.new("RGB", (width, top + sum(heights)), "white")
    _write(sheet, lines, GAP, GAP, TITLE_SIZE)
    for row, height in zip(rows, heights, strict=True):
        for number, block in enumerate(row):
            sheet.paste(block, (GAP + number * (row[0].width + GAP), top))
        top += height
    return sheet


def draw_curve(heading: str, labels: Sequence[str], shares: Sequence[float], caption: str) -> Image.Image:
    """Draw shares in [0, 1] as a curve with a label below each point, and a caption below the labels."""
    width, height = CURVE
    left, right, above = 60, GAP, GAP + 34
    lines = _wrap(caption, width, TEXT_SIZE)
    sheet = Image.new("RGB", (left + width + right, above + height + 44 + LINE * len(lines) + GAP), "white")
    _write(sheet, [heading], left, GAP // 2, TITLE_SIZE)
    pen, font = ImageDraw.Draw(sheet), _font(TEXT_SIZE)
    for tenth in range(0, 11, 2):
        y = above + height * (1 - tenth / 10)
        pen.line([(left, y), (left + width, y)], fill=(215, 215, 215))
        pen.text((left - 8, y), f"{tenth * 10} %", fill="black", font=font, anchor="rm")
    step = width / max(1, len(shares))
    points = [(left + step * (i + 0.5), above + height * (1 - share)) for i, share in enumerate(shares)]
    pen.line(points, fill=BLUE, width=2)
    shown = max(1, -(-len(labels) * 64 // width))  # every label if there is room
    for number, ((x, y), label) in enumerate(zip(points, labels, strict=True)):
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=BLUE)
        if number % shown == 0:
            pen.text((x, above + height + 8), label, fill="black", font=font, anchor="mt")
    _write(sheet, lines, left, above + height + 40, TEXT_SIZE)
    return sheet


def _block(panel: Panel) -> Image.Image:
    """Draw a panel with its texts."""
    width = panel.picture.width
    hidden = len(panel.counts) - MAX_COUNTS
    counts = [*panel.counts[:MAX_COUNTS]]
    caption = _wrap(panel.caption, width, TEXT_SIZE)
    rows = _flow([text for _, text in counts], width)
    top = TITLE_SIZE + 10
    height = top + panel.picture.height + 8 + LINE * (len(rows) + (hidden > 0) + len(caption)) + 4
    block = Image.new("RGB", (width, height), "white")
    _write(block, [panel.title], 0, 0, TITLE_SIZE)
    block.paste(panel.picture, (0, top))
    pen, font, y = ImageDraw.Draw(block), _font(TEXT_SIZE), top + panel.picture.height + 8
    remaining = iter(counts)
    for row in rows:
        for x in row:
            colour, text = next(remaining)
            pen.rectangle((x, y + 2, x + 11, y + 13), fill=colour, outline="black")
            pen.text((x + 17, y), text, fill="black", font=font)
        y += LINE
    more = [f"and {hidden} more objects"] * (hidden > 0)
    _write(block, [*more, *caption], 0, y, TEXT_SIZE)
    return block


def _flow(texts: Sequence[str], width: int) -> list[list[int]]:
    """Return the horizontal positions of marked texts, for each line of the given width."""
    font, x = _font(TEXT_SIZE), width + 1
    rows: list[list[int]] = []
    for text in texts:
        length = int(font.getlength(text)) + 34
        if x + length > width + 17:
            rows.append([])
            x = 0
        rows[-1].append(x)
        x += length
    return rows


def _wrap(text: str, width: int, size: int) -> list[str]:
    """Break a text into lines of at most `width` pixels, unless a single word is wider."""
    font, lines = _font(size), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _write(sheet: Image.Image, lines: Sequence[str], x: int, y: int, size: int) -> None:
    pen = ImageDraw.Draw(sheet)
    step = LINE if size == TEXT_SIZE else size + 6
    for number, line in enumerate(lines):
        pen.text((x, y + number * step), line, fill="black", font=_font(size))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
