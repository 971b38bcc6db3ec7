"""TuSimple's arithmetic, against independent loops in the order of the published rules, and worked out by hand."""

import math
import random

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

from detr.evaluation.lane_scores import score

ROWS = list(range(240, 720, 10))


def plain_score(predicted, lanes, rows, tolerance, run_time=0.0):
    if run_time > 200 or len(lanes) + 2 < len(predicted):
        return 0.0, 0.0, 1.0
    accuracies, found = [], 0
    for lane in lanes:
        known = [(y, x) for y, x in zip(rows, lane, strict=True) if x >= 0]
        angle = 0.0
        if len(known) > 1:
            line = LinearRegression().fit([[y] for y, _ in known], [x for _, x in known])
            angle = math.atan(line.coef_[0])
        best = 0.0
        for guess in predicted:
            right = 0
            for a, b in zip(guess, lane, strict=True):
                a, b = (a if a >= 0 else -100), (b if b >= 0 else -100)
                right += abs(a - b) < tolerance / math.cos(angle)
            best = max(best, right / len(rows))
        accuracies.append(best)
        found += best >= 0.85
    missed, total = len(lanes) - found, sum(accuracies)
    if len(lanes) > 4:
        missed -= 1 if missed > 0 else 0
        total -= min(accuracies)
    divisor = max(1.0, min(4.0, len(lanes)))
    return total / divisor, (len(predicted) - found) / len(predicted) if predicted else 0.0, missed / divisor


def random_scene(rng):
    """Up to six lanes of which some start late or lack points, and predictions near some of them."""
    lanes = []
    for _ in range(rng.randint(0, 6)):
        x, slope, start = rng.uniform(0, 1280), rng.uniform(-2, 2), rng.randint(0, len(ROWS) - 2)
        lane = [round(x + slope * (y - 400) + 0.002 * (y - 400) ** 2) if i >= start else -2 for i, y in enumerate(ROWS)]
        lanes.append([x if x >= 0 else -2 for x in lane])
    chosen = [rng.choice(lanes) for _ in range(rng.randint(0, len(lanes) + 3))] if lanes else [[5.0] * len(ROWS)]
    guesses = [[x + rng.gauss(0, rng.choice([1, 12, 40])) if x >= 0 else x for x in lane] for lane in chosen]
    return guesses, lanes


def arrays(lanes):
    return [np.array(lane, dtype=np.float64) for lane in lanes]


def test_scores_equal_plain_loops_on_random_scenes():
    rng, kinds = random.Random(0), set()
    for _ in range(200):
        guesses, lanes = random_scene(rng)
        expected = plain_score(guesses, lanes, ROWS, 20)
        assert tuple(score(arrays(guesses), arrays(lanes), np.array(ROWS, dtype=float), 20.0)) == expected
        kinds |= {("more than four", len(lanes) > 4), ("too many", len(guesses) > len(lanes) + 2)}
        kinds |= {("negative", expected[1] < 0), ("some found", 0 < expected[2] < 1)}
    assert len(kinds) == 8, "each case and its opposite occurs"


def straight(x, start=0):
    return [float(x) if i >= start else -2.0 for i in range(10)]


def of(guesses, lanes, **changed):
    return tuple(score(arrays(guesses), arrays(lanes), np.arange(10.0) * 10, 20.0, **changed))


def test_rows_without_a_point_on_both_sides_are_right():
    """Nine of ten rows have no point in either, and the tenth is wrong: 0.9, which counts as found."""
    assert of([straight(500, 9)], [straight(100, 9)]) == (0.9, 0.0, 0.0)


def test_a_prediction_that_two_lanes_match_makes_false_positives_negative():
    assert of([straight(100)], [straight(100), straight(110)]) == (1.0, -1.0, 0.0)


def test_with_five_lanes_the_worst_is_dropped_and_one_miss_is_forgiven():
    lanes = [straight(100 * i) for i in range(5)]
    assert of(lanes[:4], lanes) == (1.0, 0.0, 0.0)
    assert of(lanes[:3], lanes) == (0.75, 0.0, 0.25)


@pytest.mark.parametrize(("count", "run_time", "expected"), [(3, 0, 1.0), (4, 0, 0.0), (1, 200, 1.0), (1, 201, 0.0)])
def test_too_many_predictions_or_too_much_time_give_no_accuracy(count, run_time, expected):
    scores = of([straight(100)] * count, [straight(100)], run_time=run_time)
    assert scores[0] == expected and (expected or scores == (0.0, 0.0, 1.0))


def test_the_tolerance_grows_with_the_angle_of_a_lane():
    """At 45 degrees 20 pixels become 28.3."""
    slanted = [100.0 + 10 * i for i in range(10)]
    for distance, right in ((28, 1.0), (29, 0.0)):
        assert of([[x + distance for x in slanted]], [slanted])[0] == right


def test_a_lane_found_in_exactly_85_of_100_rows_is_matched():
    rows = np.arange(20.0)
    lane, guess = np.full(20, 50.0), np.full(20, 50.0)
    guess[:3] = 500
    assert score([guess], [lane], rows, 20.0) == (0.85, 0.0, 0.0)
    guess[3] = 500
    assert score([guess], [lane], rows, 20.0) == (0.8, 1.0, 1.0)


def test_images_without_lanes_or_predictions():
    assert of([], []) == (0.0, 0.0, 0.0)
    assert of([straight(1)], []) == (0.0, 1.0, 0.0)
    assert of([], [straight(1)]) == (0.0, 0.0, 1.0)
