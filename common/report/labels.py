"""Place the labels of boxes on a picture.

No label hides another label. If there is enough space near its box, a label hides no outline of a box either.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Rectangles = NDArray[np.int64]  # (n, 4) x0, y0, x1, y1 in pixels; column x1 and row y1 lie just outside the rectangle

CROSSING = 10.0  # cost of 1 pixel of hidden outline length, in pixels of distance between a label and its box
CHECKED_AT_ONCE = 64  # positions that are compared with the placed labels in one operation


def place_labels(
    boxes: Rectangles, sizes: Sequence[tuple[int, int]], picture: tuple[int, int], outline: int
) -> list[tuple[int, int] | None]:
    """Return the upper left corner (x, y) of each label in pixels.

    Labels are placed in order, so the first ones get the best positions.

    A position is free if a label there lies within the picture and overlaps no label that was placed before. A label is
    placed at an edge of its box if a position there is free and hides no outline. Otherwise, the positions of a grid
    over the picture are tried, too. The label then gets the free position with the lowest cost: the distance from its
    box plus `CROSSING` times the length of the outlines that it hides, both in heights of the label. The corner is None
    if none of these positions is free.

    Args:
        boxes: boxes (n, 4), which include their outlines and lie within the picture.
        sizes: width and height of each label in pixels.
        picture: width and height of the picture in pixels.
        outline: thickness of an outline in pixels; the outline of a box lies inside the box.
    """
    sums = _sums_of_outlines(boxes, picture, outline)
    placed: list[NDArray[np.int64]] = []
    corners: list[tuple[int, int] | None] = []
    for box, (width, height) in zip(boxes, sizes, strict=True):
        best, least = None, math.inf
        for positions in (_at_edges(box, width, height, outline), _everywhere(width, height, picture)):
            labels = np.concatenate([positions, positions + np.array([width, height])], axis=1)  # (P, 4)
            labels = labels[np.all(labels[:, :2] >= 0, axis=1) & np.all(labels[:, 2:] <= picture, axis=1)]
            crossings = _within(sums, labels) / (height * outline)
            costs = CROSSING * crossings + _distances(labels, box) / height
            order = costs.argsort(kind="stable")
            index = _first_free(labels[order], np.array(placed).reshape(-1, 4))
            if index is not None and costs[order[index]] < least:
                best, least = labels[order[index]], costs[order[index]]
            if least == 0:
                break
        placed += [] if best is None else [best]
        corners.append(None if best is None else (int(best[0]), int(best[1])))
    return corners


def _at_edges(box: NDArray[np.int64], width: int, height: int, outline: int) -> NDArray[np.int64]:
    """Return positions (P, 2) for a label's upper left corner.

    They are above, below and beside the box, and inside it at the top.
    """
    x0, y0, x1, y1 = box.tolist()
    outside = [(x, y) for y in (y0 - height, y1) for x in (x0, x1 - width)]
    beside = [(x, y) for x in (x1, x0 - width) for y in (y0, y1 - height)]
    return np.array(outside + beside + [(x0 + outline, y0 + outline), (x1 - outline - width, y0 + outline)])


def _everywhere(width: int, height: int, picture: tuple[int, int]) -> NDArray[np.int64]:
    """Return a grid of positions (P, 2) for a label's upper left corner, spaced by half the label's height."""
    step = max(1, height // 2)
    x, y = (np.unique([*range(0, room + 1, step), max(0, room)]) for room in (picture[0] - width, picture[1] - height))
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def _sums_of_outlines(boxes: Rectangles, picture: tuple[int, int], outline: int) -> NDArray[np.int32]:
    """Return the integral image (H + 1, W + 1) of the outlines, from which `_within` counts the pixels in a rectangle.

    The entry [y, x] is the number of outline pixels in the rows above y and the columns left of x. A pixel that is part
    of two outlines counts twice.
    """
    sums = np.zeros((picture[1] + 1, picture[0] + 1), dtype=np.int32)
    pixels = sums[1:, 1:]
    for x0, y0, x1, y1 in boxes.tolist():
        pixels[y0:y1, x0:x1] += 1
        pixels[y0 + outline : max(y0, y1 - outline), x0 + outline : max(x0, x1 - outline)] -= 1
    return sums.cumsum(0, dtype=np.int32).cumsum(1, dtype=np.int32)


def _within(sums: NDArray[np.int32], rectangles: Rectangles) -> NDArray[np.int32]:
    """Return the number of outline pixels in each rectangle (P,); `sums` is the result of `_sums_of_outlines`."""
    x0, y0, x1, y1 = rectangles.T
    counts: NDArray[np.int32] = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]
    return counts


def _first_free(labels: Rectangles, placed: Rectangles) -> int | None:
    """Return the index of the first of `labels` that overlaps none of `placed`; None if there is no such label."""
    for start in range(0, len(labels), CHECKED_AT_ONCE):
        part = labels[start : start + CHECKED_AT_ONCE, None]  # (p, 1, 4)
        starts, ends = np.maximum(part[..., :2], placed[:, :2]), np.minimum(part[..., 2:], placed[:, 2:])
        free = ~np.any(np.all(starts < ends, axis=-1), axis=1)  # (p, n, 2) -> (p,)
        if free.any():
            return start + int(free.argmax())
    return None


def _distances(rectangles: Rectangles, box: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the distance in pixels (n,) between each rectangle and a box; 0 if they touch or overlap."""
    gaps = np.maximum(np.maximum(box[:2] - rectangles[:, 2:], rectangles[:, :2] - box[2:]), 0)  # (n, 2)
    distances: NDArray[np.float64] = np.hypot(gaps[:, 0], gaps[:, 1])
    return distances
