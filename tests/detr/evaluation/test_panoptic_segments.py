"""Panoptic segmentations worked out by hand, and against a plain loop on random scenes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.machine.seeds import generator
from detr.evaluation.panoptic_segments import MIN_AREA, Rule, panoptic

THINGS = [True, True, False, False]


def plain(scores: Tensor, labels: Tensor, logits: Tensor, threshold: float, size: Any) -> tuple[list[list[int]], list]:
    """The segments as sets of pixels; small ones are dropped until none is left."""
    kept = [q for q in range(len(scores)) if scores[q] > threshold]
    height, width = logits.shape[-2:]
    while kept:
        segments: dict[Any, list[int]] = {}  # a thing's query, or the class of stuff -> its queries
        for q in kept:
            key = ("thing", q) if THINGS[labels[q]] else ("stuff", int(labels[q]))
            segments.setdefault(key, []).append(q)
        owner = [[None] * size[1] for _ in range(size[0])]
        for y in range(size[0]):
            for x in range(size[1]):
                row, column = y * height // size[0], x * width // size[1]  # nearest neighbour
                best = max(kept, key=lambda q: (float(logits[q, row, column]), -q))
                owner[y][x] = next(key for key, queries in segments.items() if best in queries)
        areas = {key: sum(row.count(key) for row in owner) for key in segments}
        small = {key for key, area in areas.items() if area < MIN_AREA}
        if not small:
            order = list(segments)
            ids = [[order.index(key) + 1 for key in row] for row in owner]
            return ids, [(order.index(k) + 1, int(labels[segments[k][0]]), areas[k]) for k in order]
        kept = [q for key, queries in segments.items() if key not in small for q in queries]
        kept.sort()
    return [[0] * size[1] for _ in range(size[0])], []


@pytest.mark.parametrize("seed", range(30))
def test_segments_are_those_of_a_plain_loop(seed: int) -> None:
    rng = generator("panoptic", seed)
    count = int(torch.randint(0, 9, (), generator=rng))
    labels = torch.randint(4, (count,), generator=rng)
    coarse = 4 * torch.randn(1, count, 3, 3, generator=rng) if count else torch.zeros(1, 0, 3, 3)
    logits = F.interpolate(coarse, size=(6, 8), mode="bilinear")[0] if count else torch.zeros(0, 6, 8)
    scores, size = torch.rand(count, generator=rng), (12, 8) if seed % 2 else (9, 16)
    ids, segments = panoptic("detr", *(x[scores > 0.3] for x in (scores, labels, logits)), THINGS, size)
    expected_ids, expected = plain(scores, labels, logits, 0.3, size)
    assert ids.tolist() == expected_ids
    assert [(s["id"], s["label"], s["area"]) for s in segments] == expected


def test_stuff_of_a_class_is_one_segment_and_things_are_not() -> None:
    logits = torch.full((4, 4, 8), -5.0)
    for query in range(4):
        logits[query, :, 2 * query : 2 * query + 2] = 5.0
    ids, segments = panoptic("detr", torch.full((4,), 0.9), torch.tensor([0, 2, 0, 2]), logits, THINGS, (4, 8))
    assert ids[0].tolist() == [1, 1, 2, 2, 3, 3, 2, 2]
    assert [(s["label"], s["area"]) for s in segments] == [(0, 8), (2, 16), (0, 8)]


@pytest.mark.parametrize("rule", ["detr", "maskformer"])
def test_without_a_query_there_is_no_segment(rule: Rule) -> None:
    none = torch.zeros(0, dtype=torch.long)
    ids, segments = panoptic(rule, torch.zeros(0), none, torch.ones(0, 4, 4), THINGS, (8, 8))
    assert not ids.any() and ids.shape == (8, 8) and segments == []


def plain_maskformer(scores: Any, labels: Any, probabilities: Any) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """MaskFormer's rule (Cheng et al. 2021, section 3.4) at the size of the masks, pixel by pixel."""
    queries, rows, columns = range(len(scores)), range(len(probabilities[0])), range(len(probabilities[0][0]))
    pixels: dict[int, list[tuple[int, int]]] = {q: [] for q in queries}
    for y in rows:
        for x in columns:
            best = max(queries, key=lambda q: (scores[q] * probabilities[q][y][x], -q))
            if probabilities[best][y][x] >= 0.5:
                pixels[best].append((y, x))
    ids = [[0 for _ in columns] for _ in rows]
    segments: list[list[int]] = []
    stuff: dict[int, int] = {}
    for q in queries:
        whole = sum(p >= 0.5 for row in probabilities[q] for p in row)
        if not pixels[q] or len(pixels[q]) < 0.8 * whole:
            continue
        number = len(segments) + 1 if THINGS[labels[q]] else stuff.setdefault(labels[q], len(segments) + 1)
        if number > len(segments):
            segments.append([labels[q], 0])
        segments[number - 1][1] += len(pixels[q])
        for y, x in pixels[q]:
            ids[y][x] = number
    return ids, [(label, area) for label, area in segments]


def test_segments_by_the_rule_of_maskformer_are_those_of_a_plain_loop() -> None:
    dropped = merged = 0
    for seed in range(60):
        rng = generator("maskformer", seed)
        count = int(torch.randint(1, 7, (), generator=rng))
        labels = torch.randint(4, (count,), generator=rng)
        logits = F.interpolate(4 * torch.randn(1, count, 3, 3, generator=rng), size=(6, 8), mode="bilinear")[0]
        scores = torch.rand(count, generator=rng)
        ids, segments = panoptic("maskformer", scores, labels, logits, THINGS, (6, 8))
        expected_ids, expected = plain_maskformer(scores.tolist(), labels.tolist(), logits.sigmoid().tolist())
        assert ids.tolist() == expected_ids
        assert [(s["label"], s["area"]) for s in segments] == expected
        dropped += len(segments) < count
        repeated = [x for x in labels.tolist() if not THINGS[x]]
        merged += len(repeated) > len(set(repeated))
    assert dropped > 20 and merged > 5


def test_a_duplicate_is_dropped_and_does_not_hide_its_object() -> None:
    logits = torch.full((2, 4, 8), -5.0)
    logits[:, :, :4] = 5.0
    logits[1, 0] = 8.0  # the duplicate's mask is larger, and surer in one row
    ids, segments = panoptic("maskformer", torch.tensor([0.9, 0.3]), torch.tensor([0, 1]), logits, THINGS, (8, 16))
    assert [(s["id"], s["label"], s["area"]) for s in segments] == [(1, 0, 64)]
    assert (ids[:, :8] == 1).all() and not ids[:, 8:].any()
