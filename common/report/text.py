"""Measure, shorten and break text for Pillow's own font, which has ASCII letters only."""

import math
import unicodedata

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def lines_of(text: str, font: Font, width: int) -> list[str]:
    """Break a text at spaces into lines of at most `width` pixels; a word that is wider is shortened."""
    lines: list[str] = []
    for word in to_ascii(text).split():
        extended = f"{lines[-1]} {word}" if lines else word
        if lines and width_of(extended, font) <= width:
            lines[-1] = extended
        else:
            lines.append(shortened(word, font, width))
    return lines or [""]


def to_ascii(text: str) -> str:
    """Convert a text to one line of ASCII for Pillow's own font.

    Accents are dropped. Characters that have no ASCII form become "?".
    """
    letters = unicodedata.normalize("NFKD", " ".join(text.split()))
    return "".join(c for c in letters if not unicodedata.combining(c)).encode("ascii", "replace").decode()


def shortened(text: str, font: Font, width: int) -> str:
    """Replace the end of a text by an ellipsis if the text is wider than `width` pixels."""
    if width_of(text, font) <= width:
        return text
    return next((f"{text[:n]}…" for n in range(len(text), 0, -1) if width_of(f"{text[:n]}…", font) <= width), "…")


def width_of(text: str, font: Font) -> int:
    """Return the width of a text in pixels."""
    return math.ceil(font.getlength(text))


def height_of(font: Font) -> int:
    """Return the height in pixels of a line of text, including descenders."""
    return math.ceil(font.getbbox("Ag")[3])
