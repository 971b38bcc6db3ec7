"""Draw boxes, points and lines on an enlarged image, in coordinates of the image."""

import itertools
import math
from collections.abc import Iterable

from PIL import Image, ImageDraw, ImageEnhance, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

Colour = tuple[int, int, int]
Point = tuple[float, float]
Line = tuple[Point, Point]
GREY: Colour = (150, 150, 150)
WHITE: Colour = (255, 255, 255)
SIDE = 448  # pixels; the longer side of a picture is the largest whole multiple of the image's up to this
DIMMED = 0.45  # brightness of an image behind its assignments


class Canvas:
    """A picture of an image on which assignments are drawn; `scale` is its enlargement.

    Images with a longer side above `SIDE` are reduced. With `dimmed`, the image is dark and without colour, so that
    drawings stand out.
    """

    def __init__(self, image: Tensor, *, dimmed: bool = True):
        longer = max(image.shape[1:])
        self.scale = float(SIDE // longer) if longer <= SIDE else SIDE / longer
        size = tuple(max(1, round(side * self.scale)) for side in (image.shape[2], image.shape[1]))
        method = Image.Resampling.NEAREST if self.scale >= 1 else Image.Resampling.LANCZOS
        picture = to_pil_image(image).convert("RGB").resize(size, method)
        if dimmed:
            picture = ImageEnhance.Brightness(ImageEnhance.Color(picture).enhance(0.15)).enhance(DIMMED)
        self.picture: Image.Image = picture

    def box(self, box: Tensor, colour: Colour, *, width: int = 2, alpha: int = 255, dashed: bool = False) -> None:
        """Draw the outline of a box (4,) xyxy."""
        x0, y0, x1, y1 = self._corners(box)
        corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]
        for start, end in itertools.pairwise(corners):
            parts = _dashes(start, end) if dashed else [(start, end)]
            self._strokes(parts, colour, width, alpha)

    def fill(self, box: Tensor, colour: Colour, alpha: int) -> None:
        """Fill a box (4,) xyxy."""
        with _Layer(self) as pen:
            pen.rectangle(self._corners(box), fill=(*colour, alpha))

    def dots(self, points: Tensor, colour: Colour, radius: float, *, alpha: int = 255, hollow: bool = False) -> None:
        """Draw discs of a radius in pixels of the picture around points (n, 2), or circles with `hollow`."""
        with _Layer(self) as pen:
            for x, y in (points * self.scale).tolist():
                box = (x - radius, y - radius, x + radius, y + radius)
                if hollow:
                    pen.ellipse(box, outline=(*colour, alpha), width=2)
                else:
                    pen.ellipse(box, fill=(*colour, alpha), outline=(0, 0, 0, alpha // 2))

    def line(self, start: Tensor, end: Tensor, colour: Colour, *, width: int = 2) -> None:
        """Draw a line between two points (2,)."""
        ends = [tuple((point * self.scale).tolist()) for point in (start, end)]
        self._strokes([(ends[0], ends[1])], colour, width, 255)

    def grid(self, columns: int, rows: int) -> None:
        """Draw the borders of a grid of cells over the whole picture."""
        width, height = self.picture.size
        vertical = [((i * width / columns, 0), (i * width / columns, height)) for i in range(columns + 1)]
        horizontal = [((0, i * height / rows), (width, i * height / rows)) for i in range(rows + 1)]
        self._strokes([*vertical, *horizontal], WHITE, 1, 60)

    def text(self, place: Tensor, text: str, colour: Colour) -> None:
        """Write a text in a box of the colour, whose lower left corner is at `place` (2,), inside the picture."""
        pen = ImageDraw.Draw(self.picture)
        font = ImageFont.load_default(size=14)
        _, _, right, bottom = font.getbbox(text)
        width, height = math.ceil(right) + 4, math.ceil(bottom) + 4
        x, y = (place * self.scale).tolist()
        x = min(max(0, x), self.picture.width - width)
        y = min(max(0, y - height), self.picture.height - height)
        pen.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
        pen.text((x + 2, y + 2), text, fill="black", font=font)

    def _corners(self, box: Tensor) -> tuple[float, float, float, float]:
        """Return the corners of a box in the picture; the right and the lower side lie inside the box."""
        x0, y0, x1, y1 = (box * self.scale).tolist()
        return x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)

    def _strokes(self, parts: Iterable[Line], colour: Colour, width: int, alpha: int) -> None:
        with _Layer(self) as pen:
            for start, end in parts:
                pen.line([start, end], fill=(*colour, alpha), width=width)


class _Layer:
    """A context that provides a pen for colours with alpha, and then puts its drawing onto the picture."""

    def __init__(self, canvas: Canvas):
        self.canvas = canvas
        self.layer = Image.new("RGBA", canvas.picture.size)

    def __enter__(self) -> ImageDraw.ImageDraw:
        return ImageDraw.Draw(self.layer)

    def __exit__(self, *error: object) -> None:
        self.canvas.picture.paste(self.layer, mask=self.layer)


def _dashes(start: tuple[float, float], end: tuple[float, float], length: float = 7) -> list[Line]:
    """Split a line into dashes of `length` pixels with gaps of the same length."""
    count = max(1, round(math.dist(start, end) / length / 2))

    def at(share: float) -> tuple[float, float]:
        return start[0] + (end[0] - start[0]) * share, start[1] + (end[1] - start[1]) * share

    return [(at(i / count), at((i + 0.5) / count)) for i in range(count)]
