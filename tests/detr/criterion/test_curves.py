"""Curves, their matching costs and their loss against plain loops over Python numbers, in float64."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from common.machine.seeds import generator
from detr.criterion.curves import MIN_DISTANCE, LaneCriterion, LaneLossOptions, evaluate, lane_targets
from detr.criterion.matcher import total_cost
from detr.criterion.set_loss import sum_terms

WEIGHTS = {"class_weight": 3.0, "curve_weight": 5.0, "end_weight": 2.0, "no_object": 0.4}
COUNTS, QUERIES, LAYERS, POINTS = [2, 0, 3, 5, 1], 4, 2, 9  # one image has no lane, and one more than queries


def scene(seed: int, counts: list[int] = COUNTS) -> tuple[list[dict[str, Tensor]], Tensor, Tensor]:
    """Random outputs of all layers, and points (T, P, 2) with `valid` (T, P); lanes have 2 to P points."""
    rng = generator("curves", seed)
    images, lanes = len(counts), sum(counts)
    layers = [
        {
            "logits": torch.randn(images, QUERIES, 2, dtype=torch.float64, generator=rng),
            "curves": torch.randn(images, QUERIES, 8, dtype=torch.float64, generator=rng),
        }
        for _ in range(LAYERS)
    ]
    points = torch.rand(lanes, POINTS, 2, dtype=torch.float64, generator=rng)
    valid = torch.rand(lanes, POINTS, generator=rng) < 0.6
    valid[:, :2] = True
    return layers, points, valid


def plain_x(curve: list[float], y: float) -> float:
    _, _, k, f, m, n, b2, b3 = curve
    d = y - f
    if abs(d) < MIN_DISTANCE:
        d = math.copysign(MIN_DISTANCE, d)
    return k / (d * d) + m / d + n + b2 * y - b3


def plain_lanes(points: Tensor, valid: Tensor, counts: list[int]) -> list[list[dict[str, Any]]]:
    """For each image, its lanes: points, ends, and the weight of their points."""
    images, start = [], 0
    for count in counts:
        lanes = []
        for t in range(start, start + count):
            own = [p for p, ok in zip(points[t].tolist(), valid[t].tolist(), strict=True) if ok]
            lanes.append({"points": own, "number": len(own), "lower": max(y for _, y in own)})
        total = sum(lane["number"] for lane in lanes)
        for lane in lanes:
            lane["weight"] = math.sqrt(total / lane["number"]) / max(math.sqrt(total / o["number"]) for o in lanes)
            lane["upper"] = min(y for o in lanes for _, y in o["points"])
        images.append(lanes)
        start += count
    return images


def plain_parts(curve: list[float], lane: dict[str, Any]) -> tuple[float, float, float]:
    distance = sum(abs(plain_x(curve, y) * lane["weight"] - x * lane["weight"]) for x, y in lane["points"])
    return distance, abs(curve[0] - lane["upper"]), abs(curve[1] - lane["lower"])


def plain_cost(logits: list[float], curve: list[float], lane: dict[str, Any]) -> float:
    probability = math.exp(logits[0]) / (math.exp(logits[0]) + math.exp(logits[1]))
    distance, upper, lower = plain_parts(curve, lane)
    return -3 * probability + 5 * distance + 2 * upper + 2 * lower


def plain_loss(layers: list[dict[str, Tensor]], points: Tensor, valid: Tensor, counts: list[int]) -> float:
    """The loss with the best assignment of all permutations."""
    total = 0.0
    lanes_of = plain_lanes(points, valid, counts)
    matched = sum(min(count, QUERIES) for count in counts)
    rows = matched + WEIGHTS["no_object"] * (QUERIES * len(counts) - matched)
    for layer in layers:
        for image, lanes in enumerate(lanes_of):
            logits, curves = layer["logits"][image].tolist(), layer["curves"][image].tolist()
            queries, objects = range(QUERIES), range(len(lanes))
            if len(lanes) <= QUERIES:
                choices = [list(zip(p, objects, strict=True)) for p in itertools.permutations(queries, len(lanes))]
            else:
                choices = [list(zip(queries, p, strict=True)) for p in itertools.permutations(objects, QUERIES)]
            best = min(choices, key=lambda pairs: sum(plain_cost(logits[q], curves[q], lanes[o]) for q, o in pairs))
            found = dict(best)
            for q in queries:
                log_sum = math.log(math.exp(logits[q][0]) + math.exp(logits[q][1]))
                nll = log_sum - logits[q][0 if q in found else 1]
                total += 3 * nll * (1 if q in found else WEIGHTS["no_object"]) / rows
            for q, o in best:
                distance, upper, lower = plain_parts(curves[q], lanes[o])
                total += (5 * distance + 2 * upper + 2 * lower) / sum(counts)
    return total


def criterion() -> LaneCriterion:
    return LaneCriterion(LaneLossOptions(**WEIGHTS))


def loss(layers: list[dict[str, Tensor]], points: Tensor, valid: Tensor, counts: list[int], step: Any = None) -> Tensor:
    """The loss of a batch; `step` are the counts of the whole step, those of the batch by default."""
    parts, step = criterion(), step or counts
    normalisers = {k: v or 1.0 for k, v in parts.normalisers("queries", step, [QUERIES] * len(step)).items()}
    targets = lane_targets(points, valid, counts)
    return sum_terms({"queries": parts("queries", layers, targets, normalisers)})[0]


def test_a_curve_equals_the_papers_equation():
    rng = generator("equation")
    curves, y = torch.randn(50, 8, dtype=torch.float64, generator=rng), torch.rand(50, 7, generator=rng).double()
    for curve, heights, xs in zip(curves.tolist(), y.tolist(), evaluate(curves, y).tolist(), strict=True):
        assert xs == pytest.approx([plain_x(curve, height) for height in heights], rel=1e-12)


def test_a_curve_is_finite_with_finite_gradients_at_its_horizon():
    curves = torch.tensor([[0.0, 1.0, 0.1, 0.5, 0.1, 0.0, 0.0, 0.0]], requires_grad=True)
    x = evaluate(curves, torch.tensor([[0.5, 0.5 + MIN_DISTANCE / 2, 0.5 - MIN_DISTANCE / 2]]))
    x.sum().backward()
    assert x.isfinite().all() and curves.grad is not None and curves.grad.isfinite().all()
    assert x[0, 0] == x[0, 1], "the nearest distance is MIN_DISTANCE"


@pytest.mark.parametrize("seed", range(5))
def test_matching_costs_equal_plain_loops(seed):
    layers, points, valid = scene(seed)
    targets = lane_targets(points, valid, COUNTS)
    outputs = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
    cost = total_cost(criterion().costs, outputs, targets.padded())
    assert cost.shape == (LAYERS, len(COUNTS), QUERIES, max(COUNTS))
    for number, layer in enumerate(layers):
        for image, lanes in enumerate(plain_lanes(points, valid, COUNTS)):
            for q, o in itertools.product(range(QUERIES), range(len(lanes))):
                expected = plain_cost(layer["logits"][image, q].tolist(), layer["curves"][image, q].tolist(), lanes[o])
                assert abs(float(cost[number, image, q, o]) - expected) < 1e-9 * max(1, abs(expected))


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_equals_plain_loops_over_all_assignments(seed):
    layers, points, valid = scene(seed)
    expected = plain_loss(layers, points, valid, COUNTS)
    assert abs(float(loss(layers, points, valid, COUNTS)) - expected) < 1e-9 * expected


def test_the_losses_of_images_alone_add_up_to_that_of_the_batch():
    """The number of points of a lane differs, so a weight relative to the batch's would differ, too."""
    layers, points, valid = scene(7)
    whole, start, total = loss(layers, points, valid, COUNTS), 0, torch.zeros(())
    for image, count in enumerate(COUNTS):
        own = slice(start, start + count)
        alone = [{name: value[[image]] for name, value in layer.items()} for layer in layers]
        total = total + loss(alone, points[own], valid[own], [count], COUNTS)
        start += count
    assert abs(float(total - whole)) < 1e-9 * float(whole)


def test_points_that_are_missing_have_no_effect():
    layers, points, valid = scene(3)
    changed = torch.where(valid[..., None], points, torch.full_like(points, 1e4))
    assert torch.equal(loss(layers, changed, valid, COUNTS), loss(layers, points, valid, COUNTS))


def test_a_batch_without_lanes_has_a_loss():
    layers, points, valid = scene(0, [0, 0])
    assert torch.isfinite(loss(layers, points, valid, [0, 0]))
