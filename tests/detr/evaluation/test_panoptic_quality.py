"""Panoptic quality against a computation in plain loops, and worked out by hand."""

import math
from typing import Any

import numpy as np
import pytest

from detr.data.panoptic import Segment
from detr.evaluation.panoptic_quality import (
    UNDEFINED,
    ClassCounts,
    Quality,
    class_quality,
    match_segments,
    mean_quality,
    merge,
)

CATEGORIES = (3, 7, 12, 40)


def in_plain_loops(scenes: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The definition of COCO's evaluation, pixel by pixel: by category, the IoUs of matches and the errors."""
    stats: dict[int, dict[str, Any]] = {c: {"ious": [], "fp": 0, "fn": 0} for c in CATEGORIES}
    for scene in scenes:
        common: dict[tuple[int, int], int] = {}
        area: dict[int, int] = {}
        for truth_row, row in zip(scene["truth_ids"].tolist(), scene["ids"].tolist(), strict=True):
            for truth_id, id in zip(truth_row, row, strict=True):
                common[truth_id, id] = common.get((truth_id, id), 0) + 1
                area[id] = area.get(id, 0) + 1
        truth = {segment.id: segment for segment in scene["truth"]}
        found, used = set(), set()
        for truth_id, segment in truth.items():
            for id, category in scene["categories"].items():
                if segment.is_crowd or segment.category != category or (truth_id, id) not in common:
                    continue
                shared = common[truth_id, id]
                iou = shared / (area[id] + segment.area - shared - common.get((0, id), 0))
                if iou > 0.5:
                    stats[category]["ious"].append(iou)
                    found.add(truth_id)
                    used.add(id)
        crowd = {}
        for truth_id, segment in truth.items():
            if segment.is_crowd:
                crowd[segment.category] = truth_id
            elif truth_id not in found:
                stats[segment.category]["fn"] += 1
        for id, category in scene["categories"].items():
            outside = common.get((0, id), 0)
            if category in crowd:
                outside += common.get((crowd[category], id), 0)
            if id not in used and not outside / area[id] > 0.5:
                stats[category]["fp"] += 1
    return stats


def blocks(rng: np.random.Generator, ids: list[int], side: int) -> np.ndarray:
    """A map (side, side) of rectangles with these ids, over VOID or over the first id; every id has a pixel."""
    while True:
        canvas = np.full((side, side), rng.choice([0, ids[0]]) if ids else 0, dtype=np.uint32)
        for id in ids:
            y, x = rng.integers(0, side - 2, 2)
            canvas[y : y + rng.integers(1, side), x : x + rng.integers(1, side)] = id
        if set(ids) <= set(canvas.ravel().tolist()):
            return canvas


def random_scene(rng: np.random.Generator) -> dict[str, Any]:
    """Ground truth and prediction that often agree, with VOID, crowds, exact ties at IoU 1/2 and stale areas."""
    side, high = int(rng.integers(4, 14)), 256**3
    ids = rng.choice(high - 1, rng.integers(0, 6), replace=False) + 1
    truth_ids = blocks(rng, ids.tolist(), side)
    truth = []
    for id in ids.tolist():
        area = int((truth_ids == id).sum())
        if rng.random() < 0.15:  # a stale area
            area = max(1, int(area * rng.uniform(0.3, 2.5)))
        truth.append(Segment(id, int(rng.choice(CATEGORIES[:3])), area, bool(rng.random() < 0.25)))
    if rng.random() < 0.7:  # the true map, with some pixels or halves changed
        predicted, names = truth_ids.copy(), {id: int(rng.integers(1, 200)) for id in ids.tolist()}
        predicted = np.vectorize(lambda id: names.get(int(id), 0))(truth_ids).astype(np.int64)
        if rng.random() < 0.5:
            predicted[:, side // 2 :] = rng.choice([0, 5, 250])
        changed = rng.random(predicted.shape) < rng.choice([0, 0.1, 0.3])
        predicted[changed] = rng.integers(0, 4, changed.sum())
        categories = {names[s.id]: s.category for s in truth}
    else:
        predicted, categories = blocks(rng, list(range(1, int(rng.integers(1, 6)))), side).astype(np.int64), {}
    present = sorted(set(predicted.ravel().tolist()) - {0})
    classes = {id: categories.get(id, int(rng.choice(CATEGORIES))) for id in present}
    return {"truth_ids": truth_ids, "truth": truth, "ids": predicted, "categories": classes}


def exact_ties(side: int = 4) -> dict[str, Any]:
    """One true segment on the left half; the prediction covers all, so the IoU is exactly 1/2 and does not match."""
    truth_ids = np.zeros((side, side), np.uint32)
    truth_ids[:, : side // 2], truth_ids[:, side // 2 :] = 9, 8
    truth = [Segment(9, 3, side * side // 2, False), Segment(8, 7, side * side // 2, False)]
    return {"truth_ids": truth_ids, "truth": truth, "ids": np.full((side, side), 1), "categories": {1: 3}}


def test_random_scenes_agree_with_plain_loops_without_a_difference():
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng) for _ in range(200)] + [exact_ties()]
    expected = in_plain_loops(scenes)
    counts = merge(match_segments(**scene) for scene in scenes)
    assert counts.keys() == expected.keys()
    qualities = []
    for category, stats in expected.items():
        ours = counts[category]
        assert sorted(ours.ious) == sorted(stats["ious"])
        assert (ours.false_positives, ours.false_negatives) == (stats["fp"], stats["fn"])
        total, matches = math.fsum(stats["ious"]), len(stats["ious"])
        divisor = matches + stats["fp"] / 2 + stats["fn"] / 2
        qualities.append((total / divisor, total / matches if matches else 0.0, matches / divisor))
        assert class_quality(ours) == qualities[-1]
    means = [math.fsum(column) / len(qualities) for column in zip(*qualities, strict=True)]
    assert list(mean_quality([q for c in counts.values() if (q := class_quality(c))])) == means
    assert all(0.05 < mean < 1 for mean in means)
    # The scenes have what they are for.
    assert any(s.is_crowd for scene in scenes for s in scene["truth"])
    assert any((scene["truth_ids"] == 0).any() and (scene["truth_ids"] > 0).any() for scene in scenes)
    assert any(s.area != (scene["truth_ids"] == s.id).sum() for scene in scenes for s in scene["truth"])
    assert any(stats["fp"] and stats["fn"] and stats["ious"] for stats in expected.values())


def test_an_iou_of_one_half_does_not_match():
    """The segment of category 3 is missed and the prediction is wrong; that of category 7 is missed."""
    assert match_segments(**exact_ties()) == {3: ClassCounts([], 1, 1), 7: ClassCounts([], 0, 1)}


def test_three_segments_evaluated_by_hand():
    """Rows of ten pixels. Category 3: a thing of six pixels, of which five are found; category 7: one that is missed.

        truth       A A A A A A . . B B     . is VOID
        prediction  1 1 1 1 1 . 2 2 2 3

    IoU of A and 1 is 5/6. 2 (category 3) has two of three pixels in VOID, so it does not count; 3 (category 3) does.
    """
    truth_ids = np.array([[11] * 6 + [0] * 2 + [12] * 2])
    ids = np.array([[1] * 5 + [0] + [2] * 3 + [3]])
    truth = [Segment(11, 3, 6, False), Segment(12, 7, 2, False)]
    counts = match_segments(truth_ids, truth, ids, {1: 3, 2: 3, 3: 3})
    assert counts == {3: ClassCounts([5 / 6], 1, 0), 7: ClassCounts([], 0, 1)}
    assert class_quality(counts[3]) == Quality(5 / 6 / 1.5, 5 / 6, 1 / 1.5)
    assert class_quality(counts[7]) == Quality(0, 0, 0)


def test_pixels_in_void_are_not_part_of_the_union():
    """A has four pixels; the prediction has these and four in VOID, so its IoU is 1 and not 1/2."""
    truth_ids, ids = np.array([[5] * 4 + [0] * 4]), np.ones((1, 8), np.int64)
    assert match_segments(truth_ids, [Segment(5, 3, 4, False)], ids, {1: 3}) == {3: ClassCounts([1.0], 0, 0)}


def test_a_stale_area_of_the_ground_truth_changes_the_iou():
    ids = np.ones((2, 4), np.int64)
    assert match_segments(ids, [Segment(1, 3, 16, False)], ids, {1: 3}) == {3: ClassCounts([], 1, 1)}
    assert match_segments(ids, [Segment(1, 3, 9, False)], ids, {1: 3})[3].ious == [8 / 9]


def test_a_crowd_excuses_predictions_of_its_class_only():
    """Of two crowds of a class, only the last one counts."""
    truth_ids = np.array([[1] * 4 + [2] * 4 + [3] * 4])
    truth = [Segment(1, 3, 4, True), Segment(2, 3, 4, True), Segment(3, 7, 4, False)]
    first, second = np.array([[9] * 4 + [0] * 8]), np.array([[0] * 4 + [9] * 4 + [0] * 4])
    for ids, category, wrong in ((second, 3, 0), (first, 3, 1), (second, 7, 1)):
        assert match_segments(truth_ids, truth, ids, {9: category})[category].false_positives == wrong


def test_empty_images_and_classes_have_no_quality():
    empty = np.zeros((3, 3), np.int64)
    assert match_segments(empty, [], empty, {}) == {}
    assert match_segments(empty, [], empty + 1, {1: 3}) == {3: ClassCounts([], 0, 0)}  # all of it lies in VOID
    assert class_quality(ClassCounts([], 0, 0)) is None and mean_quality([]) == UNDEFINED


def test_an_unlisted_segment_is_an_error():
    with pytest.raises(AssertionError, match="must be listed"):
        match_segments(np.ones((2, 2), np.int64), [], np.zeros((2, 2), np.int64), {})
