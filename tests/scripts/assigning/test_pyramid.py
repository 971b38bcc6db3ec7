"""The levels of a feature pyramid."""

import pytest

from scripts.assigning import pyramid


@pytest.mark.parametrize(
    ("size", "expected"), [((64, 64), 4), ((800, 1333), 1), ((401, 900), 1), ((400, 900), 2), ((900, 200), 4)]
)
def test_lengths_are_divided_so_that_an_enlarged_image_has_at_most_800_pixels(size, expected):
    assert pyramid.divisor(size) == expected


def test_points_are_the_centres_of_cells_that_cover_the_image():
    first, second = pyramid.make_points((5, 9), [4, 8])
    assert first.tolist() == [[2, 2], [6, 2], [10, 2], [2, 6], [6, 6], [10, 6]]
    assert second.tolist() == [[4, 4], [12, 4]]
    assert pyramid.level_of([6, 2]).tolist() == [0] * 6 + [1] * 2
