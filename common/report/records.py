"""The predictions for a user's inputs as lists of records, which show themselves in a notebook."""

import base64
import html
import io
import os
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torchvision.transforms.v2.functional import resize, to_pil_image

from common.data.image_objects import to_image
from common.data.images import Exif
from common.errors import UserError
from common.files import inputs

MAX_SIDE = 1000  # pixels of a picture in a notebook
MAX_SHOWN = 16  # inputs in one output of a notebook


class Records(list[Any]):
    """The predictions for one input, each a dict, or the Records of several inputs.

    It behaves as the list that it is. In Jupyter, it shows itself as a picture or as text.
    """

    def __init__(self, records: Iterable[Any] = (), draw: Callable[[], Tensor] | None = None, text: str | None = None):
        """Make the list.

        Args:
            records: dicts, or Records.
            draw: returns the picture uint8 (3, H, W) of an image with its predictions.
            text: HTML of predictions without a picture.
        """
        super().__init__(records)
        self.draw, self.text = draw, text

    def _repr_png_(self) -> bytes | None:
        """The picture as PNG, at most `MAX_SIDE` pixels wide and high, or None."""
        if self.draw is None:
            return None
        picture, buffer = self.draw(), io.BytesIO()
        height, width = picture.shape[-2:]
        if (longer := max(height, width)) > MAX_SIDE:
            size = [max(1, side * MAX_SIDE // longer) for side in (height, width)]
            picture = resize(picture, size, antialias=True)
        to_pil_image(picture).save(buffer, "PNG")
        return buffer.getvalue()

    def _repr_html_(self) -> str | None:
        """The text, or the pictures and texts of several inputs; None for a single picture, and for neither."""
        if self.draw is not None or self.text is not None:
            return self.text
        parts = [item for item in self if isinstance(item, Records)]
        if not parts:
            return None
        more = f"<p>and {len(parts) - MAX_SHOWN:,} more</p>" if len(parts) > MAX_SHOWN else ""
        return "\n".join(map(_to_html, parts[:MAX_SHOWN])) + more


def predict_each(input: Any, predict: Callable[[Any], Records]) -> Records:
    """`predict(image)` for one image, or the list of these for a list, a folder or a pattern such as photos/*.jpg.

    Raises UserError for a path that names no image, and for the first image that cannot be read.
    """
    if isinstance(input, list | tuple):
        return Records(predict_each(item, predict) for item in input)
    if isinstance(input, str | os.PathLike) and not os.path.isfile(input):
        unreadable: list[str] = []
        files = inputs.find(os.fspath(input), (), unreadable)
        if unreadable:
            raise UserError(unreadable[0])
        return Records([predict(file.path) for file in files])
    return predict(input)


def draw_on(input: Any, exif: Exif, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """`draw(image)` for the image of an input; Records refer to their input rather than hold a copy of its pixels."""
    return draw(to_image(input, exif))


def _to_html(records: Records) -> str:
    if (png := records._repr_png_()) is not None:
        return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    return records._repr_html_() or f"<pre>{html.escape(repr(list(records)))}</pre>"
