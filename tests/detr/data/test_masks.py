"""Segmentations become run-length codes that pycocotools reads back, and every kind of fault is named."""

import json
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as rle

from detr.data import masks


def random_mask(rng: np.random.Generator) -> np.ndarray:
    """A mask of random size and density, sometimes full or empty, column-major."""
    height, width = rng.integers(1, 50, 2)
    density = rng.choice([0, 1, rng.random(), 0.01])
    return np.asfortranarray(rng.random((height, width)) < density, dtype=np.uint8)


def test_codes_of_both_kinds_are_read_alike():
    """The uncompressed counts are computed here; column by column, the first run is that of the background."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        mask = random_mask(rng)
        pixels, (height, width) = mask.flatten(order="F"), mask.shape
        edges = np.flatnonzero(np.diff(pixels, prepend=0, append=2))
        counts = np.diff(edges, prepend=0).tolist()
        expected = rle.encode(mask)
        compressed = {"size": [height, width], "counts": expected["counts"].decode()}
        for segmentation in (compressed, {"size": [height, width], "counts": counts}, expected):
            assert masks.encode(json.loads(json.dumps(segmentation, default=bytes.decode)), height, width) == expected
        assert masks.run_lengths(expected["counts"]).tolist() == counts
        assert np.array_equal(masks.decode([expected, expected])[1], mask)
        assert (masks.extent(expected)[2] > 0) == mask.any()


def test_a_size_may_be_written_with_a_decimal_point():
    for counts in ([2, 3, 1], "231"):
        code = masks.encode({"size": [2.0, 3.0], "counts": counts}, 2, 3)
        assert code["size"] == [2, 3] and masks.decode([code]).sum() == 3
        assert masks.extent(code).tolist() == [1, 0, 2, 2]


def test_run_lengths_above_a_million_are_decoded():
    mask = np.zeros((3000, 3000), np.uint8, order="F")
    mask[:, 2999] = 1
    assert masks.run_lengths(rle.encode(mask)["counts"]).tolist() == [3000 * 2999, 3000]


def test_several_polygons_are_one_mask_that_is_clipped_to_the_image():
    """Squares on whole coordinates cover whole pixels."""
    polygons = [[1, 1, 5, 1, 5, 4, 1, 4], [8, 8, 30, 8, 30, 30, 8, 30]]
    expected = np.zeros((10, 12), np.uint8)
    expected[1:4, 1:5] = expected[8:, 8:] = 1
    assert np.array_equal(masks.decode([masks.encode(polygons, 10, 12)])[0], expected)


def test_a_polygon_that_touches_its_image_is_read_and_a_thin_one_has_no_pixel():
    inside = masks.encode([[-50, -50, -40, -50, -40, -40], [-5, 0, 2, 0, 2, 2]], 10, 10)
    assert masks.extent(inside)[2] > 0
    assert masks.extent(masks.encode([[2.1, 2, 2.2, 2, 2.2, 9]], 10, 10))[2] == 0


FAULTS: dict[str, tuple[Any, str]] = {
    "none": (None, 'has no "segmentation"'),
    "empty list": ([], 'has no "segmentation"'),
    "text": ("polygon", 'has the "segmentation" "polygon"; expected polygons'),
    "two points": ([[1, 2, 3, 4]], "has a polygon of 2 points; expected at least 3 points"),
    "two points beside a good polygon": ([[1, 1, 9, 1, 9, 9], [1, 2, 3, 4]], "has a polygon of 2 points"),
    "no points": ([[]], "has a polygon of 0 points"),
    "an odd number": ([[1, 2, 3, 4, 5, 6, 7]], "has a polygon of 7 numbers, which are no pairs"),
    "one level too few": ([1, 2, 3, 4, 5, 6], "has the polygon 1, which is no list of numbers"),
    "words": ([["1", 2, 3, 4, 5, 6]], "which is no list of numbers"),
    "NaN": ([[1, 2, 3, 4, 5, float("nan")]], "coordinates or a perimeter of 1,000,000 pixels or more"),
    "far": ([[0, 0, 5e8, 0, 5e8, 5e8]], "1,000,000 pixels or more"),
    "huge integers": ([[10**400] * 6], "1,000,000 pixels or more"),
    "right of the image": ([[60, 1, 70, 1, 70, 9]], "wholly outside its image of 60 x 40 pixels"),
    "above the image": ([[1, -9, 9, -9, 9, 0], [1, -5, 5, -5, 5, -1]], "wholly outside its image"),
    "another size": (
        {"size": [60, 40], "counts": [2400]},
        'code of the "size" [60, 40]; expected [40, 60], the height and width',
    ),
    "no size": ({"counts": [2400]}, 'of the "size" null'),
    "too few runs": ({"size": [40, 60], "counts": [5, 5]}, "code of 10 pixels, but its image has 60 x 40 = 2400"),
    "too many runs": ({"size": [40, 60], "counts": [10**30]}, "but its image has 60 x 40 = 2400"),
    "negative runs": ({"size": [40, 60], "counts": [2401, -1]}, "expected integers of at least 0"),
    "runs with a fraction": ({"size": [40, 60], "counts": [2400.0]}, "expected integers"),
    "an incomplete code": ({"size": [40, 60], "counts": "ooo"}, "which are no run-length code"),
    "an empty code": ({"size": [40, 60], "counts": ""}, "which are no run-length code"),
    "characters of no code": ({"size": [40, 60], "counts": "\u00ff"}, "which are no run-length code"),
    "a code of another length": ({"size": [40, 60], "counts": "Z1"}, "code of 42 pixels, but its image"),
    "a code of negative runs": ({"size": [40, 60], "counts": "OOOO"}, "with a negative run length"),
    "no counts": ({"size": [40, 60]}, 'has the "counts" null'),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_the_predicate_of_one_sentence(name: str):
    segmentation, words = FAULTS[name]
    with pytest.raises(masks.MaskFault) as fault:
        masks.encode(segmentation, 40, 60)
    assert words in str(fault.value) and "\n" not in str(fault.value) and len(str(fault.value)) < 200
