"""Predictions for a user's inputs as lists of records, which Jupyter displays as pictures or text."""

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

MAX_SIDE = 1000  # maximum width and height in pixels of a picture in a notebook
MAX_SHOWN = 16  # maximum number of inputs that a cell of a notebook displays; the others are only counted


class Records(list[Any]):
    """A list of predictions: for one input, the items are dicts; for several inputs, one Records for each input.

    It can be used like any list. Jupyter displays it as a picture or as text.
    """

    def __init__(self, records: Iterable[Any] = (), draw: Callable[[], Tensor] | None = None, text: str | None = None):
        """Create the list, and set what Jupyter displays.

        Args:
            records: the items: dicts for one input, or Records for several inputs.
            draw: a function that returns a picture uint8 (3, H, W) of the input with its predictions; None means that
                there is no picture.
            text: HTML of the input with its predictions; None means that there is no text.
        """
        super().__init__(records)
        self.draw, self.text = draw, text

    def _repr_png_(self) -> bytes | None:
        """Return the picture as PNG, at most `MAX_SIDE` pixels wide and high; None if there is no picture."""
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
        """Return the text of one input, or HTML with the pictures and texts of the first `MAX_SHOWN` of several inputs.

        Returns None for one input without text, or for an empty list. Jupyter then displays the picture if there is
        one, otherwise the plain list.
        """
        if self.draw is not None or self.text is not None:
            return self.text
        parts = [item for item in self if isinstance(item, Records)]
        if not parts:
            return None
        more = f"<p>and {len(parts) - MAX_SHOWN:,} more</p>" if len(parts) > MAX_SHOWN else ""
        return "\n".join(map(_to_html, parts[:MAX_SHOWN])) + more


def check_batch(input: dict[Any, Any]) -> None:
    """Raise UserError for a dict that is not a batch; batches of a data set and of `Task.read` have the key "ids"."""
    if "ids" not in input:
        keys = ", ".join(map(str, list(input)[:3])) or "no key"
        raise UserError(
            f"The input is a dict with {keys}, and not a batch; give a path, an image, an array, a sentence or a list."
        )


def predict_each(input: Any, predict: Callable[[Any], Records]) -> Records:
    """Return `predict(input)` for one image, or a list with the result for each of several images.

    Several images are given as a list, a folder or a pattern such as photos/*.jpg. Raises UserError if a path names no
    image, or if an image cannot be read.
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
    """Return `draw(image)`, where `image` is the input as a tensor uint8 (3, H, W).

    Records call this function when Jupyter displays them. They hold a reference to their input instead of a copy of
    its pixels, so an image file is read again.
    """
    return draw(to_image(input, exif))


def _to_html(records: Records) -> str:
    if (png := records._repr_png_()) is not None:
        return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    return records._repr_html_() or f"<pre>{html.escape(repr(list(records)))}</pre>"
