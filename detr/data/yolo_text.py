"""Read one label file of YOLO's format (Ultralytics' documentation, "Detection" and "Segmentation datasets")."""

from pathlib import Path
from typing import NamedTuple

from common.config.describe import shorten
from common.data.opening import read_text
from common.errors import UserError

LOWEST, HIGHEST = -1.0, 2.0  # limits of a relative coordinate; a value beyond them is in pixels, or a mistake


class Rules(NamedTuple):
    """What the label files of a data set may contain."""

    classes: int  # the number of classes
    source: str  # where the classes are named, for messages
    keypoints: int  # how many numbers follow the box on a line with keypoints; 0 if lines have no keypoints


class LabelFile(NamedTuple):
    """The content of a label file."""

    boxes: list[tuple[int, list[float]]]  # class; centre x, centre y, width, height, relative to the image's size
    lines: list[int]  # the number of each box's line, from 1
    polygons: int  # number of boxes around a polygon or a rotated box
    poses: int  # number of boxes with keypoints; the keypoints were left out


def read(path: Path, rules: Rules) -> LabelFile | None:
    """Read a label file; returns None if it does not exist.

    A line holds the number of a class and then a box (4 numbers), the points of a polygon (x and y of at least 3
    points), or a pose (a box, then `rules.keypoints` numbers for its keypoints). Empty lines are skipped. An invalid
    line raises a UserError that names the file and the line.
    """
    if not path.exists():
        return None
    boxes: list[tuple[int, list[float]]] = []
    lines: list[int] = []
    polygons = poses = 0
    for number, line in enumerate(read_text(path).split("\n"), 1):
        words = line.split()
        if not words:
            continue
        try:
            label, *values = map(float, words)
        except ValueError:
            raise UserError(f"{_at(path, number, line)} is not a line of numbers; correct or remove it.") from None
        if fault := _fault(label, values, rules):
            raise UserError(f"{_at(path, number, line)} {fault}.")
        if len(values) == 4 + rules.keypoints:
            poses += rules.keypoints > 0
            box = values[:4]
        elif len(values) > 4:
            polygons += 1
            box = _around(values)
        else:
            box = values
        boxes.append((int(label), box))
        lines.append(number)
    return LabelFile(boxes, lines, polygons, poses)


def _fault(label: float, values: list[float], rules: Rules) -> str | None:
    """Return the fault of a line, as the end of an error message; None if the line is valid."""
    count = len(values)
    is_pose = count == 4 + rules.keypoints
    if count != 4 and not is_pose and (count < 6 or count % 2):
        remark = " (a fifth is written with predictions, as their score)" if count == 5 else ""
        return f"has {count} numbers after the class; expected 4, or the points of a polygon{remark}"
    if not label.is_integer() or not 0 <= label < rules.classes:
        return f"has the class {label:g}, but {rules.source} names the classes 0 to {rules.classes - 1}"
    place = values[:4] if is_pose else values
    if not (LOWEST <= min(place) and max(place) <= HIGHEST and sum(place) == sum(place)):  # NaN differs from itself
        return "has a coordinate that is not relative to the image's size; expected numbers from 0 to 1"
    return None


def _around(points: list[float]) -> list[float]:
    """Return the smallest box that contains the points x1, y1, x2, y2, ..., as centre x, centre y, width, height."""
    left, right, top, bottom = min(points[::2]), max(points[::2]), min(points[1::2]), max(points[1::2])
    return [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]


def _at(path: Path, number: int, line: str) -> str:
    return f"{path}, line {number}: {shorten(repr(line.strip()))}"
