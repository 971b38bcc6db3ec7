"""Panoptic segmentations worked out by hand, and against a plain loop on random scenes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.machine.seeds import generator
from detr.evaluation.masks import MIN_AREA, instance_masks, panoptic

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
    ids, segments = panoptic(*(x[scores > 0.3] for x in (scores, labels, logits)), THINGS, size)
    expected_ids, expected = plain(scores, labels, logits, 0.3, size)
    assert ids.tolist() == expected_ids
    assert [(s["id"], s["label"], s["area"]) for s in segments] == expected


def test_stuff_of_a_class_is_one_segment_and_things_are_not() -> None:
    logits = torch.full((4, 4, 8), -5.0)
    for query in range(4):
        logits[query, :, 2 * query : 2 * query + 2] = 5.0
    ids, segments = panoptic(torch.full((4,), 0.9), torch.tensor([0, 2, 0, 2]), logits, THINGS, (4, 8))
    assert ids[0].tolist() == [1, 1, 2, 2, 3, 3, 2, 2]
    assert [(s["label"], s["area"]) for s in segments] == [(0, 8), (2, 16), (0, 8)]


def test_without_a_query_there_is_no_segment() -> None:
    none = torch.zeros(0, dtype=torch.long)
    ids, segments = panoptic(torch.zeros(0), none, torch.ones(0, 4, 4), THINGS, (8, 8))
    assert not ids.any() and ids.shape == (8, 8) and segments == []


def test_masks_of_repeated_queries_are_those_of_single_ones() -> None:
    logits = torch.randn(20, 5, 6, generator=generator("instance"))
    queries = torch.tensor([3, 19, 3, 0])
    masks = instance_masks(logits, queries, (20, 24), (17, 21), (40, 50))
    for mask, query in zip(masks, queries, strict=True):
        resized = F.interpolate(logits[None, query : query + 1, :5, :6], size=(17, 21), mode="bilinear") > 0
        assert torch.equal(mask, F.interpolate(resized.float(), size=(40, 50))[0, 0].bool())
    assert instance_masks(logits, queries[:0], (20, 24), (17, 21), (40, 50)).shape == (0, 40, 50)
