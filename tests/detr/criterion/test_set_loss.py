"""The set loss against a computation with loops and transformers' DETR, and for any split into micro-batches."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from common.machine.seeds import generator
from detr.criterion.answers import Targets, unstack_layers
from detr.criterion.matcher import MatcherOptions
from detr.criterion.set_loss import Criterion, LossOptions, sum_terms

SOFTMAX: dict[str, Any] = {"classification": "softmax", "focal_alpha": 0.25, "focal_gamma": 2.0}
OPTIONS = LossOptions(class_weight=1.0, box_weight=5.0, giou_weight=2.0, no_object=0.1, **SOFTMAX)  # A.4, 3.1
MATCHER = MatcherOptions(class_cost=1.0, box_cost=5.0, giou_cost=2.0)
LAYERS, QUERIES, CLASSES = 3, 5, 4
EVERY_KIND = pytest.mark.parametrize(
    "counts", [[2, 3], [0, 0], [4, 0, 1], [7, 1], [5, 6], [1]], ids=str
)  # none, unequal, more than queries


def outputs(images: int, dtype: torch.dtype = torch.float64, layers: int = LAYERS) -> dict[str, Tensor]:
    """Random model outputs, leaves of the graph."""
    rng = generator("outputs", images)
    logits = torch.randn(layers, images, QUERIES, CLASSES + 1, dtype=torch.float64, generator=rng)
    boxes = torch.rand(layers, images, QUERIES, 4, dtype=torch.float64, generator=rng)
    return {
        "logits": logits.to(dtype).requires_grad_(),
        "boxes_cxcywh": (0.1 + 0.5 * boxes).to(dtype).requires_grad_(),
    }


def targets(counts: list[int]) -> tuple[Tensor, Tensor]:
    rng = generator("targets")
    labels = torch.randint(CLASSES, (sum(counts),), generator=rng)
    return labels, 0.1 + 0.5 * torch.rand(sum(counts), 4, generator=rng)


def normalisers(counts: list[int]) -> dict[str, float]:
    return Criterion(OPTIONS, MATCHER).normalisers("queries", counts, [QUERIES] * len(counts))


def step_normalisers(counts: list[int]) -> dict[str, float]:
    """The trainer's divisors: a sum of exactly 0 is replaced by 1."""
    return {name: value or 1.0 for name, value in normalisers(counts).items()}


def set_loss(
    options: LossOptions,
    outputs: dict[str, Tensor],
    labels: Tensor,
    boxes: Tensor,
    counts: list[int],
    divisors: dict[str, float],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of all layers' outputs (L, B, Q, ...), and its parts."""
    criterion = Criterion(options, MATCHER)
    return sum_terms(
        {"queries": criterion("queries", unstack_layers(outputs), Targets(counts, labels, boxes), divisors)}
    )


def loss(
    predicted: dict[str, Tensor], counts: list[int], options: LossOptions = OPTIONS
) -> tuple[Tensor, dict[str, Tensor]]:
    return set_loss(options, predicted, *targets(counts), counts, step_normalisers(counts))


def gradients(total: Tensor, predicted: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(total, list(predicted.values())))


def plain_loss(predicted: dict[str, Tensor], counts: list[int]) -> dict[str, Tensor]:
    """Sections 3.1 and A.2 in loops over layers, images and queries: class, box and GIoU terms of each layer."""
    labels, target = targets(counts)
    terms = []
    for logits, boxes in zip(predicted["logits"], predicted["boxes_cxcywh"], strict=True):
        nll = total_weight = distance = overlap = torch.zeros((), dtype=torch.float64)
        start = 0
        for image, count in enumerate(counts):
            probabilities = logits[image].softmax(-1)
            classes, box = labels[start : start + count], target[start : start + count].to(boxes.dtype)
            giou = generalized_box_iou(box_convert(boxes[image], "cxcywh", "xyxy"), box_convert(box, "cxcywh", "xyxy"))
            l1 = torch.stack([(boxes[image] - x).abs().sum(-1) for x in box], -1) if count else giou
            cost = 5 * l1 - probabilities[:, classes] - 2 * giou
            matched = dict(zip(*linear_sum_assignment(cost.detach().numpy()), strict=True))
            for query in range(QUERIES):
                label = int(classes[matched[query]]) if query in matched else CLASSES
                weight = 1.0 if query in matched else 0.1
                nll = nll - weight * probabilities[query, label].log()
                total_weight = total_weight + weight
            for query, t in matched.items():
                distance = distance + l1[query, t]
                overlap = overlap + 1 - giou[query, t]
            start += count
        objects = max(sum(counts), 1)
        terms.append(torch.stack([nll / total_weight, 5 * distance / objects, 2 * overlap / objects]))
    return dict(zip(("class", "box", "giou"), torch.stack(terms, 1), strict=True))


@EVERY_KIND
def test_loss_parts_and_gradients_are_those_of_loops(counts: list[int]) -> None:
    predicted = outputs(len(counts))
    total, parts = loss(predicted, counts)
    expected = plain_loss(predicted, counts)
    whole = torch.stack(list(expected.values())).sum()
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=0)
    for name, term in expected.items():
        torch.testing.assert_close(parts[name], term[-1].detach(), rtol=1e-12, atol=1e-15)
    auxiliary = sum(term[:-1].sum() for term in expected.values())
    torch.testing.assert_close(parts["auxiliary"], auxiliary.detach(), rtol=1e-12, atol=0)
    for gradient, reference in zip(gradients(total, predicted), gradients_or_zero(whole, predicted), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-14)


def gradients_or_zero(total: Tensor, predicted: dict[str, Tensor]) -> list[Tensor]:
    """Zero for an output that the loss does not depend on: boxes, if there are no objects."""
    values = torch.autograd.grad(total, list(predicted.values()), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(values, predicted.values(), strict=True)]


@EVERY_KIND
def test_loss_parts_and_gradients_are_those_of_transformers(counts: list[int]) -> None:
    """In fp32, as in transformers; its divisors equal ours in one process without micro-batches."""
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

    predicted = outputs(len(counts), torch.float32)
    total, parts = loss(predicted, counts)
    labels, boxes = (part.split(counts) for part in targets(counts))
    config = SimpleNamespace(
        class_cost=1.0,
        bbox_cost=5.0,
        giou_cost=2.0,
        num_labels=CLASSES,
        eos_coefficient=0.1,
        auxiliary_loss=True,
        decoder_layers=LAYERS,
        bbox_loss_coefficient=5,
        giou_loss_coefficient=2,
    )
    expected, named, _ = ForObjectDetectionLoss(
        predicted["logits"][-1],
        [{"class_labels": a, "boxes": b} for a, b in zip(labels, boxes, strict=True)],
        predicted["logits"].device,
        predicted["boxes_cxcywh"][-1],
        config,
        predicted["logits"],
        predicted["boxes_cxcywh"],
    )
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    for name, theirs, weight in [("class", "loss_ce", 1), ("box", "loss_bbox", 5), ("giou", "loss_giou", 2)]:
        torch.testing.assert_close(parts[name], weight * named[theirs].detach(), rtol=1e-5, atol=1e-6)
    for gradient, reference in zip(gradients(total, predicted), gradients_or_zero(expected, predicted), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


def test_normalisers_depend_on_the_targets_alone() -> None:
    """Two images of 5 queries: 2 objects give 2 + 0.1 * 3, and 7 objects match all 5 queries."""
    assert normalisers([2, 7]) == {"queries.class": pytest.approx(2.3 + 5.0), "queries.box": 9.0, "queries.giou": 9.0}
    assert normalisers([0, 0]) == {"queries.class": pytest.approx(1.0), "queries.box": 0.0, "queries.giou": 0.0}


@pytest.mark.parametrize("micro_batches", [[4], [3, 1], [1, 1, 2], [1, 1, 1, 1]], ids=str)
def test_losses_of_micro_batches_add_up_to_that_of_the_batch(micro_batches: list[int]) -> None:
    counts = [2, 0, 7, 1]
    predicted, (labels, boxes), whole = outputs(4), targets(counts), step_normalisers(counts)
    expected, expected_parts = set_loss(OPTIONS, predicted, labels, boxes, counts, whole)

    totals, all_parts, image = [], [], 0
    for images in micro_batches:
        micro_counts, first = counts[image : image + images], sum(counts[:image])
        micro_outputs = {name: value[:, image : image + images] for name, value in predicted.items()}
        objects = slice(first, first + sum(micro_counts))
        total, parts = set_loss(OPTIONS, micro_outputs, labels[objects], boxes[objects], micro_counts, whole)
        totals.append(total)
        all_parts.append(parts)
        image += images
    torch.testing.assert_close(torch.stack(totals).sum(), expected, rtol=1e-13, atol=0)
    for name, value in expected_parts.items():
        torch.testing.assert_close(sum(parts[name] for parts in all_parts), value, rtol=1e-13, atol=0)
    summed, whole_batch = gradients(torch.stack(totals).sum(), predicted), gradients(expected, predicted)
    for gradient, reference in zip(summed, whole_batch, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_converted_to_fp32(dtype: torch.dtype) -> None:
    counts = [2, 3]
    half = outputs(2, dtype)
    upcast = {name: value.detach().float().requires_grad_() for name, value in half.items()}
    total, parts = loss(half, counts)
    expected, _ = loss(upcast, counts)
    assert total.dtype == torch.float32 and all(part.dtype == torch.float32 for part in parts.values())
    assert torch.equal(total, expected)
    for gradient, reference in zip(gradients(total, half), gradients(expected, upcast), strict=True):
        assert torch.equal(gradient, reference.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fp32_and_fp64_are_not_converted(dtype: torch.dtype) -> None:
    total, parts = loss(outputs(2, dtype), [2, 3])
    assert total.dtype == dtype and all(part.dtype == dtype for part in parts.values())


def test_parts_are_detached_and_add_up() -> None:
    total, parts = loss(outputs(2), [2, 3])
    assert list(parts) == ["class", "box", "giou", "auxiliary"]
    assert not any(part.requires_grad for part in parts.values())
    torch.testing.assert_close(sum(parts.values()), total.detach(), rtol=1e-13, atol=0)


def test_one_layer_has_no_auxiliary_part() -> None:
    total, parts = loss(outputs(2, layers=1), [2, 3])
    assert list(parts) == ["class", "box", "giou"]
    torch.testing.assert_close(sum(parts.values()), total.detach(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("key, part", [("class_weight", "class"), ("box_weight", "box"), ("giou_weight", "giou")])
def test_each_term_is_multiplied_by_its_weight(key: str, part: str) -> None:
    options = {"class_weight": 1.0, "box_weight": 1.0, "giou_weight": 1.0, "no_object": 0.1, **SOFTMAX}
    predicted = outputs(2)
    _, parts = loss(predicted, [2, 3], LossOptions(**options))
    _, weighted = loss(predicted, [2, 3], LossOptions(**{**options, key: 3.0}))
    for name in ("class", "box", "giou"):
        torch.testing.assert_close(weighted[name], parts[name] * (3 if name == part else 1))


def test_the_order_of_objects_changes_nothing() -> None:
    predicted, (labels, boxes) = outputs(2), targets([3, 2])
    order = torch.tensor([2, 0, 1, 4, 3])
    expected, _ = loss(predicted, [3, 2])
    total, _ = set_loss(OPTIONS, predicted, labels[order], boxes[order], [3, 2], step_normalisers([3, 2]))
    torch.testing.assert_close(total, expected, rtol=1e-13, atol=0)


def test_perfect_outputs_have_no_loss_in_any_order_of_queries() -> None:
    labels, boxes = targets([QUERIES])
    order = torch.tensor([3, 1, 4, 0, 2])
    predicted = {
        "logits": 1e3 * torch.nn.functional.one_hot(labels[order], CLASSES + 1).float()[None, None],
        "boxes_cxcywh": boxes[order][None, None],
    }
    total, _ = loss(predicted, [QUERIES])
    assert total.item() == pytest.approx(0, abs=1e-6)


def test_boxes_without_area_have_a_finite_loss_and_gradient() -> None:
    """The reference divides zero by zero if prediction and target are the same point."""
    predicted = outputs(1, torch.float32)
    point = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    with torch.no_grad():
        predicted["boxes_cxcywh"][:] = point
    total, _ = set_loss(OPTIONS, predicted, torch.tensor([1]), point, [1], step_normalisers([1]))
    assert total.isfinite() and all(gradient.isfinite().all() for gradient in gradients(total, predicted))


@pytest.mark.parametrize("name", ["logits", "boxes_cxcywh"])
def test_outputs_that_are_not_finite_make_the_loss_nan(name: str) -> None:
    predicted: dict[str, Any] = outputs(2)
    with torch.no_grad():
        predicted[name][:] = torch.nan
    total, _ = loss(predicted, [2, 3])
    assert total.isnan()


def test_the_loss_copies_to_the_host_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is the matcher's; nothing else waits for the device."""
    predicted, (labels, boxes), whole = outputs(2, torch.float32), targets([2, 3]), step_normalisers([2, 3])
    calls: list[str] = []

    def count_calls(name: str) -> Any:
        original = getattr(Tensor, name)

        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return original(self, *args, **kwargs)

        return call

    for name in ("cpu", "item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(Tensor, name, count_calls(name))
    set_loss(OPTIONS, predicted, labels, boxes, [2, 3], whole)
    monkeypatch.undo()
    assert calls == ["cpu"]
