"""Masks in COCO's format: the segmentation of an annotation (polygons or a run-length code) as a compressed code.

Lin et al. 2014, arXiv:1405.0312; the format is defined at cocodataset.org, "Data format". Run lengths count the pixels
of alternating background and object in column-major order.
"""

import json
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle

Code = dict[str, Any]  # a compressed run-length code: "size" [height, width] and "counts" as bytes

MAX_OUTLINE = 1e6  # pixels, for a polygon's perimeter and coordinates; pycocotools crashes on much larger polygons
RLE_CODE = re.compile("[0-o]*[0-O]")  # a complete run-length code; pycocotools reads past the end of an incomplete one


class MaskFault(ValueError):
    """A segmentation that cannot be read. The text is the predicate of a sentence about its annotation."""


def encode(segmentation: Any, height: int, width: int) -> Code:
    """Convert a segmentation in an image of `height` x `width` pixels to a compressed run-length code.

    The union of several polygons is one mask. Polygons are clipped to the image. Raises MaskFault if the segmentation
    is missing or invalid, or if it lies wholly outside its image. The mask of a thin polygon may have no pixel.
    """
    if not segmentation:
        raise MaskFault('has no "segmentation"; add its polygons or its run-length code')
    if isinstance(segmentation, list):
        return _encode_polygons(segmentation, height, width)
    if isinstance(segmentation, dict):
        return _encode_runs(segmentation, height, width)
    raise MaskFault(f'has the "segmentation" {show(segmentation)}; expected polygons or a run-length code')


def encode_arrays(masks: NDArray[Any]) -> list[dict[str, Any]]:
    """Encode boolean masks (n, H, W) as compressed run-length codes, whose counts are strings, for JSON."""
    column_major = np.asfortranarray(masks.astype(np.uint8).transpose(1, 2, 0))  # (H, W, n)
    return [{"size": code["size"], "counts": code["counts"].decode()} for code in rle.encode(column_major)]


def area(segmentation: Any, height: int, width: int) -> float:
    """Return the area of a segmentation in square pixels, without its invalid polygons.

    The result is 0 if the segmentation is missing or unreadable.
    """
    try:
        if isinstance(segmentation, list):
            polygons = [p for p in segmentation if len(p) >= 6 and _outline(p) < MAX_OUTLINE]  # NaN fails
            code = rle.merge(rle.frPyObjects(polygons, height, width)) if polygons else None
        elif isinstance(segmentation["counts"], list):
            code = rle.frPyObjects(segmentation, height, width)
        else:
            code = segmentation if RLE_CODE.fullmatch(segmentation["counts"]) else None
        return float(rle.area(code)) if code else 0.0
    except Exception:  # pycocotools raises no specific type
        return 0.0


def decode(codes: list[Code]) -> NDArray[np.uint8]:
    """Decode n codes of one size, n > 0; returns their masks as (n, height, width), 1 in the object."""
    masks: NDArray[np.uint8] = rle.decode(codes)  # (height, width, n), column-major
    return masks.transpose(2, 0, 1)


def extent(code: Code) -> NDArray[np.float64]:
    """Return the box around a mask: x, y, width, height in pixels; all are 0 for a mask without a pixel."""
    box: NDArray[np.float64] = rle.toBbox(code)
    return box


def show(value: Any) -> str:
    """Return a value as JSON, shortened to 60 characters."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _encode_polygons(polygons: list[Any], height: int, width: int) -> Code:
    for polygon in polygons:
        _check_polygon(polygon)
    if all(_lies_outside(polygon, height, width) for polygon in polygons):
        raise MaskFault(f'has a "segmentation" wholly outside its image of {width} x {height} pixels; correct it')
    code: Code = rle.merge(rle.frPyObjects(polygons, height, width))
    return code


def _check_polygon(polygon: Any) -> None:
    expected = "expected at least 3 points, as x1, y1, x2, y2, x3, y3, ..."
    if not isinstance(polygon, list) or not all(type(value) in (int, float) for value in polygon):
        raise MaskFault(f"has the polygon {show(polygon)}, which is no list of numbers; {expected}")
    if len(polygon) % 2:
        raise MaskFault(f"has a polygon of {len(polygon)} numbers, which are no pairs; {expected}")
    if len(polygon) < 6:
        raise MaskFault(f"has a polygon of {len(polygon) // 2} points; {expected}")
    if not max(map(abs, polygon)) < MAX_OUTLINE or not _outline(polygon) < MAX_OUTLINE:  # NaN fails
        raise MaskFault(f"has a polygon with coordinates or a perimeter of {MAX_OUTLINE:,.0f} pixels or more")


def _lies_outside(polygon: list[float], height: int, width: int) -> bool:
    """Whether a polygon has no common area with its image because it lies beyond one of the four borders."""
    x, y = polygon[::2], polygon[1::2]
    return max(x) <= 0 or min(x) >= width or max(y) <= 0 or min(y) >= height


def _encode_runs(segmentation: dict[str, Any], height: int, width: int) -> Code:
    counts, size = segmentation.get("counts"), segmentation.get("size")
    if size != [height, width]:
        expected = f"expected [{height}, {width}], the height and width of its image"
        raise MaskFault(f'has a run-length code of the "size" {show(size)}; {expected}')
    if isinstance(counts, list):
        if not all(type(run) is int and run >= 0 for run in counts):
            raise MaskFault(f'has the "counts" {show(counts)}; expected integers of at least 0')
        _check_total(sum(counts), height, width)
        code: Code = rle.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        return code
    text = counts.decode("latin-1") if isinstance(counts, bytes) else counts
    if not isinstance(text, str) or not RLE_CODE.fullmatch(text):
        raise MaskFault(f'has the "counts" {show(text)}, which are no run-length code; correct them')
    runs = run_lengths(text.encode())
    if runs.min() < 0:
        raise MaskFault(f'has the "counts" {show(text)} with a negative run length; correct them')
    _check_total(int(runs.sum()), height, width)
    return {"size": [height, width], "counts": text.encode()}


def _check_total(total: int, height: int, width: int) -> None:
    if total != height * width:
        pixels = f"its image has {width} x {height} = {height * width}"
        raise MaskFault(f"has a run-length code of {total} pixels, but {pixels}; correct its counts")


def run_lengths(counts: bytes) -> NDArray[np.int64]:
    """Decode a complete compressed code to its run lengths.

    A number is written in groups of five bits, the lowest first; bit 5 of a character says that another group follows,
    and bit 4 of the last group is the sign. From the fourth number on, a number is the difference to the run length two
    before. Numbers of more than 60 bits are cut off.
    """
    groups = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(groups & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    order = np.arange(len(groups)) - np.repeat(starts, ends - starts + 1)  # of a group in its number
    shift = np.minimum(5 * order, 60)
    numbers = np.add.reduceat((groups & 31) << shift, starts)
    numbers -= np.where(groups[ends] & 16, 1 << np.minimum(shift[ends] + 5, 62), 0)
    runs = numbers.copy()
    runs[2::2], runs[1::2] = np.cumsum(numbers[2::2]), np.cumsum(numbers[1::2])
    return runs


def _outline(polygon: list[float]) -> float:
    """Return the larger of a polygon's perimeter and its largest absolute coordinate, in pixels.

    The length of an edge is taken in the maximum norm.
    """
    points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
    return float(max(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum(), np.abs(points).max()))
