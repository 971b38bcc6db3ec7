"""Labels of lanes in TuSimple's format: lines of JSON, one image a line, with the x of each lane at given rows."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.data.opening import read_text
from common.errors import UserError

MISSING = -2.0  # x of a row in which a lane has no point; every negative x means this
MIN_POINTS = 2  # of a lane


class LaneLabels(NamedTuple):
    """The annotated lanes of one image, in pixels of the image."""

    raw_file: str  # the image's path, relative to the folder of images
    rows: NDArray[np.float64]  # (P,) the y at which lanes are annotated (h_samples), in ascending order
    lanes: NDArray[np.float64] | None  # (n, P) x of each lane, negative where it has no point; None = not annotated
    origin: str  # file and line, for messages

    def with_points(self) -> list[NDArray[np.float64]]:
        """Return the lanes (P,) that have a point; a lane without a point only counts in TuSimple's scores."""
        return [] if self.lanes is None else [lane for lane in self.lanes if (lane >= 0).any()]


def read_labels(path: Path) -> list[LaneLabels]:
    """Read a file of labels, such as label_data_0313.json; empty lines are skipped.

    Raises UserError, which names the file and the line, for anything
    that is not an image's labels: a key is missing, h_samples do not ascend, a lane has another length than h_samples,
    a single point or a value that is no number.
    """
    lines = [(number, line) for number, line in enumerate(read_text(path).splitlines(), 1) if line.strip()]
    if not lines:
        raise UserError(f"{path} has no line; expected one JSON object for each image.")
    return [_read_line(line, f"{path}, line {number}") for number, line in lines]


def _read_line(line: str, origin: str) -> LaneLabels:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin} is not JSON ({error}); expected raw_file, h_samples and lanes.") from None
    if not isinstance(record, dict):
        raise UserError(f"{origin} is no object; expected one with raw_file, h_samples and lanes.")
    raw_file = record.get("raw_file")
    if not isinstance(raw_file, str) or not raw_file:
        raise UserError(f"{origin} has no raw_file; expected the path of the image, relative to the images' folder.")
    rows = _numbers(record.get("h_samples"), "h_samples", origin)
    if not len(rows) or (np.diff(rows) <= 0).any() or rows[0] < 0:
        raise UserError(f"{origin}: h_samples must be ascending rows of the image, at least one and none negative.")
    if "lanes" not in record:
        return LaneLabels(raw_file, rows, None, origin)
    lanes = record["lanes"]
    if not isinstance(lanes, list):
        raise UserError(f"{origin}: lanes must be a list with a list of x for each lane.")
    checked = [_lane(lane, len(rows), f"lane {number}", origin) for number, lane in enumerate(lanes, 1)]
    return LaneLabels(raw_file, rows, np.array(checked).reshape(-1, len(rows)), origin)


def _lane(values: Any, count: int, name: str, origin: str) -> NDArray[np.float64]:
    lane = _numbers(values, name, origin)
    if len(lane) != count:
        raise UserError(f"{origin}: {name} has {len(lane)} values, but there are {count} h_samples; give one for each.")
    if 0 < (points := int((lane >= 0).sum())) < MIN_POINTS:
        raise UserError(f"{origin}: {name} has {points} point; a lane needs at least {MIN_POINTS}, so remove it.")
    return lane


def _numbers(values: Any, name: str, origin: str) -> NDArray[np.float64]:
    """Convert a list of finite numbers to an array; raises UserError for anything else."""
    if not isinstance(values, list):
        what = "missing" if values is None else "no list"
        raise UserError(f"{origin}: {name} is {what}; expected a list of numbers.")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{origin}: {name} has the value {value!r}; expected numbers.")
    return np.array(values, dtype=np.float64)
