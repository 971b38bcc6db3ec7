"""Matching against brute force, and its invariances and degenerate inputs."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from common.machine.seeds import generator
from detr.criterion import matcher
from detr.criterion.answers import Matches, Targets
from detr.criterion.matcher import ClassCost, Cost, GiouCost, L1Cost

OPTIONS: list[Cost] = [L1Cost(5.0), ClassCost(1.0), GiouCost(2.0)]  # appendix A.4
LAYERS, QUERIES, CLASSES = 2, 4, 3


def match(logits: Tensor, box: Tensor, labels: Tensor, target: Tensor, counts: list[int]) -> Matches:
    return matcher.match(OPTIONS, {"logits": logits, "boxes_cxcywh": box}, Targets(counts, labels, target))


def costs(options: list[Cost], logits: Tensor, box: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """The costs (L, 1, Q, N) of one image."""
    padded = Targets([len(labels)], labels, target).padded()
    return matcher.total_cost(options, {"logits": logits, "boxes_cxcywh": box}, padded)


def predictions(images: int, queries: int = QUERIES) -> tuple[Tensor, Tensor]:
    rng = generator("predictions", images)
    shape = (LAYERS, images, queries)
    return torch.randn(*shape, CLASSES + 1, generator=rng), boxes(*shape, seed=1)


def boxes(*shape: int, seed: int) -> Tensor:
    """cxcywh inside the image."""
    rng = generator("boxes", seed)
    centre = 0.2 + 0.6 * torch.rand(*shape, 2, generator=rng)
    return torch.cat([centre, 0.05 + 0.3 * torch.rand(*shape, 2, generator=rng)], dim=-1)


def targets(counts: list[int]) -> tuple[Tensor, Tensor]:
    labels = torch.randint(CLASSES, (sum(counts),), generator=generator("labels"))
    return labels, boxes(sum(counts), seed=2)


def plain_cost(logits: Tensor, box: Tensor, label: Tensor, target: Tensor) -> float:
    """Equation 1 of the paper for one query and one object, with A.2's box loss."""
    corners = [box_convert(x[None], "cxcywh", "xyxy") for x in (box, target)]
    overlap = generalized_box_iou(*corners).item()
    return 5.0 * (box - target).abs().sum().item() - logits.softmax(0)[label].item() - 2.0 * overlap


def cheapest(logits: Tensor, box: Tensor, labels: Tensor, target: Tensor) -> set[tuple[int, int]]:
    """Pairs of query and object of one image, found by trying every assignment."""
    queries, count = len(box), len(labels)
    cost = [[plain_cost(logits[q], box[q], labels[t], target[t]) for t in range(count)] for q in range(queries)]
    matched = min(queries, count)
    assignments = (
        tuple(zip(rows, objects, strict=True))
        for rows in itertools.permutations(range(queries), matched)
        for objects in itertools.combinations(range(count), matched)
    )
    return set(min(assignments, key=lambda pairs: sum(cost[q][t] for q, t in pairs)))


def pairs(matches: Matches, layer: int, image: int, start: int = 0) -> set[tuple[int, int]]:
    selected = (matches.layers == layer) & (matches.images == image)
    return set(zip(matches.queries[selected].tolist(), (matches.targets[selected] - start).tolist(), strict=True))


@pytest.mark.parametrize("counts", [[2], [0, 3], [1, 0, 4], [6, 2], [5, 5]], ids=str)
def test_matches_are_those_of_brute_force_in_every_layer_and_image(counts: list[int]) -> None:
    """Some images of [6, 2] and [5, 5] have more objects than queries."""
    logits, box = predictions(len(counts))
    labels, target = targets(counts)
    matches = match(logits, box, labels, target, counts)
    start = 0
    for image, count in enumerate(counts):
        objects = slice(start, start + count)
        for layer in range(LAYERS):
            expected = cheapest(logits[layer, image], box[layer, image], labels[objects], target[objects])
            assert pairs(matches, layer, image, start) == expected
        start += count
    assert len(matches.layers) == LAYERS * sum(min(count, QUERIES) for count in counts)
    assert all(part.dtype == torch.int64 for part in matches)


def test_costs_are_those_of_the_paper() -> None:
    logits, box = predictions(1)
    labels, target = targets([3])
    cost = costs(OPTIONS, logits, box, labels, target)
    assert cost.shape == (LAYERS, 1, QUERIES, 3)
    for layer, query, t in itertools.product(range(LAYERS), range(QUERIES), range(3)):
        expected = plain_cost(logits[layer, 0, query], box[layer, 0, query], labels[t], target[t])
        assert cost[layer, 0, query, t].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("index", range(3))
def test_each_cost_is_multiplied_by_its_weight(index: int) -> None:
    logits, box = predictions(1)
    labels, target = targets([3])
    kinds = (ClassCost, L1Cost, GiouCost)
    single = [costs([kind(1.0)], logits, box, labels, target) for kind in kinds]
    doubled: list[Cost] = [kind(2.0 if i == index else 1.0) for i, kind in enumerate(kinds)]
    expected = sum(single) + single[index]
    torch.testing.assert_close(costs(doubled, logits, box, labels, target), expected)


def test_the_order_of_objects_changes_no_pair() -> None:
    logits, box = predictions(2)
    labels, target = targets([3, 2])
    order = torch.tensor([2, 0, 1, 4, 3])
    matches = match(logits, box, labels, target, [3, 2])
    shuffled = match(logits, box, labels[order], target[order], [3, 2])
    original = Matches(*shuffled[:3], order[shuffled.targets])
    for layer, image in itertools.product(range(LAYERS), range(2)):
        assert pairs(matches, layer, image) == pairs(original, layer, image)


def test_an_image_is_matched_as_if_alone() -> None:
    logits, box = predictions(3)
    labels, target = targets([2, 5, 1])
    together = match(logits, box, labels, target, [2, 5, 1])
    alone = match(logits[:, 2:], box[:, 2:], labels[7:], target[7:], [1])
    for layer in range(LAYERS):
        assert pairs(together, layer, 2, 7) == pairs(alone, layer, 0)


@pytest.mark.parametrize("counts", [[0], [0, 0, 0]], ids=str)
def test_without_objects_there_are_no_pairs(counts: list[int]) -> None:
    logits, box = predictions(len(counts))
    matches = match(logits, box, *targets(counts), counts)
    assert all(part.shape == (0,) and part.dtype == torch.int64 for part in matches)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["logits", "boxes"])
def test_outputs_that_are_not_finite_are_matched_and_change_no_other_image(bad: float, where: str) -> None:
    logits, box = predictions(2)
    labels, target = targets([3, 2])
    expected = match(logits, box, labels, target, [3, 2])
    broken = {"logits": logits, "boxes": box}[where]
    broken[:, 0] = bad
    matches = match(logits, box, labels, target, [3, 2])
    for layer in range(LAYERS):
        matched = pairs(matches, layer, 0)
        assert {t for _, t in matched} == {0, 1, 2} and len({query for query, _ in matched}) == 3
        assert pairs(matches, layer, 1, 3) == pairs(expected, layer, 1, 3)


def test_a_query_that_is_not_finite_is_matched_last() -> None:
    logits, box = predictions(1)
    labels, target = targets([3])
    logits[:, :, 1] = torch.nan
    matches = match(logits, box, labels, target, [3])
    assert 1 not in matches.queries.tolist()


def test_matching_does_not_depend_on_requires_grad() -> None:
    logits, box = predictions(1)
    labels, target = targets([2])
    expected = match(logits, box, labels, target, [2])
    matches = match(logits.requires_grad_(), box.requires_grad_(), labels, target, [2])
    assert all(torch.equal(a, b) for a, b in zip(matches, expected, strict=True))


def test_the_costs_of_all_layers_and_images_go_to_the_host_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts calls of methods that copy to the host or synchronise with it."""
    logits, box = predictions(3)
    labels, target = targets([2, 5, 1])
    calls: list[tuple[str, tuple[int, ...]]] = []

    def count_calls(name: str) -> Any:
        original = getattr(Tensor, name)

        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append((name, tuple(self.shape)))
            return original(self, *args, **kwargs)

        return call

    for name in ("cpu", "item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(Tensor, name, count_calls(name))
    match(logits, box, labels, target, [2, 5, 1])
    monkeypatch.undo()
    assert calls == [("cpu", (LAYERS, 3, QUERIES, 5))]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_copies_to_the_host_once() -> None:
    arguments = [part.cuda() for part in (*predictions(3), *targets([2, 5, 1]))]
    match(*arguments, [2, 5, 1])
    with torch.profiler.profile() as profile:
        match(*arguments, [2, 5, 1])
        torch.cuda.synchronize()
    copies = [event for event in profile.events() if "Memcpy DtoH" in event.name]
    assert len(copies) == 1
