"""Labels are in the picture and pairwise disjoint, and cross no outline where there is room."""

import numpy as np
import pytest
from numpy.typing import NDArray

from common.report.labels import place_labels

OUTLINE = 2


def place(boxes: list[list[int]], sizes: list[tuple[int, int]], picture: tuple[int, int]) -> list[list[int] | None]:
    """The rectangles of the labels, x0, y0, x1, y1."""
    corners = place_labels(np.array(boxes).reshape(-1, 4), sizes, picture, OUTLINE)
    return [
        None if corner is None else [*corner, corner[0] + size[0], corner[1] + size[1]]
        for corner, size in zip(corners, sizes, strict=True)
    ]


def count_covers(labels: list[list[int] | None], picture: tuple[int, int]) -> NDArray[np.int64]:
    """The number of labels at each pixel (H, W)."""
    counts = np.zeros(picture[::-1], dtype=np.int64)
    for x0, y0, x1, y1 in filter(None, labels):
        assert 0 <= x0 < x1 <= picture[0] and 0 <= y0 < y1 <= picture[1], "inside the picture"
        counts[y0:y1, x0:x1] += 1
    return counts


def outlines(boxes: list[list[int]], picture: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels of all outlines (H, W), drawn one by one."""
    drawn = np.zeros(picture[::-1], dtype=bool)
    for x0, y0, x1, y1 in boxes:
        for rows, columns in (
            (slice(y0, y0 + OUTLINE), slice(x0, x1)),
            (slice(y1 - OUTLINE, y1), slice(x0, x1)),
            (slice(y0, y1), slice(x0, x0 + OUTLINE)),
            (slice(y0, y1), slice(x1 - OUTLINE, x1)),
        ):
            drawn[rows, columns] = True
    return drawn


def random_boxes(count: int, picture: tuple[int, int], seed: int) -> tuple[list[list[int]], list[tuple[int, int]]]:
    random = np.random.default_rng(seed)
    corners = np.sort(random.integers(0, np.array(picture) + 1, (count, 2, 2)), axis=1)  # (n, 2 corners, xy)
    corners[:, 1] = np.minimum(np.maximum(corners[:, 1], corners[:, 0] + 5), picture)
    corners[:, 0] = np.minimum(corners[:, 0], corners[:, 1] - 5)
    sizes = [(int(width), 18) for width in random.integers(40, 120, count)]
    return corners.reshape(-1, 4).tolist(), sizes


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("count", "picture"), [(1, (448, 448)), (12, (640, 480)), (30, (1333, 800)), (60, (400, 640))])
def test_labels_are_in_the_picture_and_hide_no_other_label(count: int, picture: tuple[int, int], seed: int) -> None:
    labels = place(*random_boxes(count, picture, seed), picture)
    assert None not in labels and count_covers(labels, picture).max() == 1


@pytest.mark.parametrize("seed", range(5))
def test_labels_hide_no_outline_where_there_is_room(seed: int) -> None:
    picture = (640, 480)
    boxes, sizes = random_boxes(8, picture, seed)
    assert not (count_covers(place(boxes, sizes, picture), picture).astype(bool) & outlines(boxes, picture)).any()


def test_a_label_lies_above_its_box_or_else_below_beside_or_in_it() -> None:
    size, picture = (50, 20), (300, 200)
    expected = {
        (100, 80, 200, 120): [100, 60, 150, 80],
        (100, 10, 200, 120): [100, 120, 150, 140],
        (100, 0, 200, 200): [200, 0, 250, 20],
        (260, 0, 300, 200): [210, 0, 260, 20],
        (270, 80, 300, 120): [250, 60, 300, 80],  # aligned at the right
        (0, 0, 300, 200): [2, 2, 52, 22],
    }
    for box, label in expected.items():
        assert place([[*box]], [size], picture) == [label]


def test_boxes_with_the_same_corner_have_labels_beside_each_other() -> None:
    """The second label is aligned at the right, the third lies below the box, and so on, in order."""
    labels = place([[100, 80, 210, 120]] * 5, [(50, 20)] * 5, (400, 300))
    assert labels[:3] == [[100, 60, 150, 80], [160, 60, 210, 80], [100, 120, 150, 140]]
    assert count_covers(labels, (400, 300)).max() == 1


def test_a_label_without_room_at_its_box_lies_as_near_as_possible() -> None:
    """The edges of the second box, but not its surroundings, are full of outlines."""
    crowd = [[x, y, x + 5, y + 5] for x in range(140, 262, 4) for y in range(110, 200, 4)]
    boxes = [[180, 140, 220, 160], *crowd]
    (label, *_) = place(boxes, [(60, 20)] * len(boxes), (400, 300))
    assert label is not None
    hidden = outlines(boxes, (400, 300))[label[1] : label[3], label[0] : label[2]]
    assert not hidden.any() and 60 <= label[1] and label[3] <= 250


def test_labels_for_which_the_picture_has_no_room_are_left_out_and_the_first_ones_stay() -> None:
    labels = place([[0, 0, 100, 40]] * 9, [(48, 18)] * 9, (100, 40))
    assert labels[:2] == [[2, 2, 50, 20], [50, 2, 98, 20]] and count_covers(labels, (100, 40)).max() == 1
    assert labels[4:] == [None] * 5
    assert place([[0, 0, 9, 9]], [(200, 20)], (100, 40)) == [None] and place([], [], (10, 10)) == []
