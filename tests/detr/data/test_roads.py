"""The drawn roads: lanes lie where labels say, and straight lines do not fit them."""

import numpy as np

from detr.data.roads import MIN_ROWS, draw
from detr.evaluation.lane_scores import score
from detr.evaluation.straight_lanes import fit

SIZE = 64


def test_a_road_has_two_to_five_lanes_from_left_to_right():
    counts = set()
    for seed in range(200):
        pixels, rows, lanes = draw(np.random.default_rng(seed), SIZE)
        again = draw(np.random.default_rng(seed), SIZE)
        assert pixels.shape == (SIZE, SIZE, 3) and np.array_equal(pixels, again[0]) and np.array_equal(lanes, again[2])
        assert rows.tolist() == list(range(16, SIZE, 2)) and lanes.shape[1] == len(rows)
        counts.add(len(lanes))
        assert ((lanes >= 0).sum(1) >= MIN_ROWS).all() and (lanes <= SIZE).all()
        both = (lanes[1:] >= 0) & (lanes[:-1] >= 0)
        assert (np.diff(lanes, axis=0)[both] > 0).all(), "lanes do not cross"
    assert counts == {2, 3, 4, 5}


def test_lanes_are_brighter_than_the_road_beside_them():
    """On average over pictures; cars and gaps hide some points."""
    differences = []
    for seed in range(40):
        pixels, rows, lanes = draw(np.random.default_rng(seed), SIZE)
        grey = pixels.mean(-1)
        for lane in lanes:
            for x, y in zip(lane, rows, strict=True):
                if 4 <= x < SIZE - 4:
                    differences.append(grey[int(y), int(x)] - (grey[int(y), int(x) - 3] + grey[int(y), int(x) + 3]) / 2)
    assert np.mean(differences) > 25


def test_roads_are_curved_so_that_straight_lines_miss_a_tenth():
    scores = []
    for seed in range(300):
        _, rows, lanes = draw(np.random.default_rng(seed), SIZE)
        scores.append(score([fit(lane, rows).at(rows) for lane in lanes], list(lanes), rows, 2.0))
    assert 0.85 < np.mean(scores, 0)[0] < 0.92


def test_a_seed_gives_the_same_road_in_each_size():
    for seed in range(20):
        _, rows, lanes = draw(np.random.default_rng(seed), 64)
        _, double_rows, double = draw(np.random.default_rng(seed), 128)
        assert np.array_equal(double_rows, 2 * rows) and lanes.shape == double.shape
        assert np.abs(np.where(double >= 0, double / 2, -2) - lanes).max() < 0.01
