"""Read the XML file of one image in Pascal VOC's format (Everingham et al., VOC2012 development kit, section 2.5)."""

import math
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from common.config.describe import shorten
from common.data.names import composed
from common.data.opening import read_bytes
from common.errors import UserError

CORNERS = ("xmin", "ymin", "xmax", "ymax")
DIFFICULT = {"": False, "0": False, "false": False, "1": True, "true": True}


class VocObject(NamedTuple):
    """An object of an image, as the XML file states it."""

    name: str  # the name of its class
    corners: tuple[float, float, float, float]  # xmin, ymin, xmax, ymax in pixels, as in the file
    is_difficult: bool
    origin: str  # the file's name and the object's number, from 1, for messages


class VocImage(NamedTuple):
    """The content of an XML file."""

    filename: str  # of the image; "" if missing
    height: float  # pixels; 0 if missing
    width: float  # pixels; 0 if missing
    objects: list[VocObject]


def read(path: Path) -> VocImage:
    """Read the XML file of an image.

    Invalid content raises a UserError that names the file and, if the fault is in an object, the object's number.
    """
    root = _parse(path)
    if root.tag != "annotation":
        raise UserError(
            f"{path} is no annotation of Pascal VOC: its first element is <{shorten(root.tag)}>; remove it."
        )
    height, width = (_number(root, f"size/{key}", str(path), optional=True) for key in ("height", "width"))
    objects = [_read_object(element, path, i) for i, element in enumerate(root.findall("object"), 1)]
    return VocImage(_text(root, "filename"), height, width, objects)


def _read_object(element: Element, path: Path, number: int) -> VocObject:
    origin, name = f"{path}, object {number}", composed(_text(element, "name"))
    if not name:
        raise UserError(f"{origin}, has no <name>; add the name of its class.")
    if element.find("bndbox") is None:
        raise UserError(f"{origin}, has no <bndbox>; add its box, or remove the object.")
    xmin, ymin, xmax, ymax = (_number(element, f"bndbox/{key}", origin) for key in CORNERS)
    is_difficult = DIFFICULT.get(_text(element, "difficult").lower())
    if is_difficult is None:
        raise UserError(f"{origin}, has {shorten(_text(element, 'difficult'))} as <difficult>; expected 0 or 1.")
    return VocObject(name, (xmin, ymin, xmax, ymax), is_difficult, f"{path.name}, object {number}")


def _text(element: Element, tag: str) -> str:
    return (element.findtext(tag) or "").strip()


def _number(element: Element, tag: str, origin: str, optional: bool = False) -> float:
    """Return the number in the element `tag`; 0 if `optional` is True and the element is missing or empty.

    Raises UserError if there is no finite number. `origin`, the file or the object, is named in the message.
    """
    text = _text(element, tag)
    if optional and not text:
        return 0.0
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        name = tag.rpartition("/")[2]
        raise UserError(f"{origin}, has {shorten(repr(text))} as <{name}>; expected a number.")
    return number


def _parse(path: Path) -> Element:
    """Parse an XML file; raises UserError for a file that cannot be read, is not XML, or declares entities.

    Entities are refused because nested ones can expand to any amount of memory. Annotations do not need entities.
    """

    def refuse_entities(*declaration: object) -> None:
        raise UserError(
            f"{path} declares XML entities, which no annotation needs; remove the declarations or the file."
        )

    builder, parser = TreeBuilder(), expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler, parser.EntityDeclHandler = builder.data, refuse_entities
    content = read_bytes(path)
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, LookupError, ValueError) as error:  # the last two are raised for unknown encodings
        raise UserError(f"{path} is not XML ({error}); correct it, or copy it again.") from None
    element: Element = builder.close()
    return element
