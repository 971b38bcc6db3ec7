"""The set loss against a plain computation with loops, against transformers' DETR, and for any cut of the batch."""

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
OPTIONS = LossOptions(class_weight=1.0, box_weight=5.0, giou_weight=2.0, no_object=0.1, **SOFTMAX)  # appendix A.4
MATCHER = MatcherOptions(class_cost=1.0, box_cost=5.0, giou_cost=2.0)
LAYERS, QUERIES, CLASSES = 3, 5, 4
EVERY_KIND = pytest.mark.parametrize(
    "counts", [[2, 3], [0, 0], [4, 0, 1], [7, 1], [5, 6], [1]], ids=str
)  # none, unequal, more than queries


def outputs(images: int, dtype: torch.dtype = torch.float64, layers: int = LAYERS) -> dict[str, Tensor]:
    """As a model gives them, leaves of the graph."""
    drawn = generator("outputs", images)
    logits = torch.randn(layers, images, QUERIES, CLASSES + 1, dtype=torch.float64, generator=drawn)
    boxes = torch.rand(layers, images, QUERIES, 4, dtype=torch.float64, generator=drawn)
    return {
        "logits": logits.to(dtype).requires_grad_(),
        "boxes_cxcywh": (0.1 + 0.5 * boxes).to(dtype).requires_grad_(),
    }


def targets(counts: list[int]) -> tuple[Tensor, Tensor]:
    drawn = generator("targets")
    labels = torch.randint(CLASSES, (sum(counts),), generator=drawn)
    return labels, 0.1 + 0.5 * torch.rand(sum(counts), 4, generator=drawn)


def normalisers(counts: list[int]) -> dict[str, float]:
    return Criterion(OPTIONS, MATCHER).normalisers("queries", counts, [QUERIES] * len(counts))


def step_normalisers(counts: list[int]) -> dict[str, float]:
    """As the trainer divides: only a sum of exactly zero becomes one."""
    return {name: value or 1.0 for name, value in normalisers(counts).items()}


def set_loss(
    options: LossOptions,
    outputs: dict[str, Tensor],
    labels: Tensor,
    boxes: Tensor,
    counts: list[int],
    divisors: dict[str, float],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of all layers' outputs (L, B, Q, ...)."""
    criterion = Criterion(options, MATCHER)
    return sum_terms(
        {"queries": criterion("queries", unstack_layers(outputs), Targets(counts, labels, boxes), divisors)}
    )


def loss(
    made: dict[str, Tensor], counts: list[int], options: LossOptions = OPTIONS
) -> tuple[Tensor, dict[str, Tensor]]:
    return set_loss(options, made, *targets(counts), counts, step_normalisers(counts))


def gradients(total: Tensor, made: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(total, list(made.values())))


def plain_loss(made: dict[str, Tensor], counts: list[int]) -> dict[str, Tensor]:
    """Sections 3.1 and A.2 one layer, image and query at a time: class, box and GIoU terms of each layer."""
    labels, target = targets(counts)
    terms = []
    for logits, boxes in zip(made["logits"], made["boxes_cxcywh"], strict=True):
        nll = weight = distance = overlap = torch.zeros((), dtype=torch.float64)
        start = 0
        for image, count in enumerate(counts):
            probabilities = logits[image].softmax(-1)
            own, box = labels[start : start + count], target[start : start + count].to(boxes.dtype)
            giou = generalized_box_iou(box_convert(boxes[image], "cxcywh", "xyxy"), box_convert(box, "cxcywh", "xyxy"))
            l1 = torch.stack([(boxes[image] - one).abs().sum(-1) for one in box], -1) if count else giou
            cost = 5 * l1 - probabilities[:, own] - 2 * giou
            taken = dict(zip(*linear_sum_assignment(cost.detach().numpy()), strict=True))
            for query in range(QUERIES):
                label = int(own[taken[query]]) if query in taken else CLASSES
                importance = 1.0 if query in taken else 0.1
                nll = nll - importance * probabilities[query, label].log()
                weight = weight + importance
            for query, one in taken.items():
                distance = distance + l1[query, one]
                overlap = overlap + 1 - giou[query, one]
            start += count
        objects = max(sum(counts), 1)
        terms.append(torch.stack([nll / weight, 5 * distance / objects, 2 * overlap / objects]))
    return dict(zip(("class", "box", "giou"), torch.stack(terms, 1), strict=True))


@EVERY_KIND
def test_loss_its_parts_and_gradients_are_those_of_plain_loops(counts: list[int]) -> None:
    made = outputs(len(counts))
    total, parts = loss(made, counts)
    expected = plain_loss(made, counts)
    whole = torch.stack(list(expected.values())).sum()
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=0)
    for name, term in expected.items():
        torch.testing.assert_close(parts[name], term[-1].detach(), rtol=1e-12, atol=1e-15)
    auxiliary = sum(term[:-1].sum() for term in expected.values())
    torch.testing.assert_close(parts["auxiliary"], auxiliary.detach(), rtol=1e-12, atol=0)
    for got, wanted in zip(gradients(total, made), gradients_or_zero(whole, made), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-14)


def gradients_or_zero(total: Tensor, made: dict[str, Tensor]) -> list[Tensor]:
    """Without objects the loops never touch a box."""
    found = torch.autograd.grad(total, list(made.values()), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, made.values(), strict=True)]


@EVERY_KIND
def test_loss_its_parts_and_gradients_are_those_of_transformers(counts: list[int]) -> None:
    """In fp32, as there; its divisors agree with ours in one process with whole batches."""
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

    made = outputs(len(counts), torch.float32)
    total, parts = loss(made, counts)
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
        made["logits"][-1],
        [{"class_labels": a, "boxes": b} for a, b in zip(labels, boxes, strict=True)],
        made["logits"].device,
        made["boxes_cxcywh"][-1],
        config,
        made["logits"],
        made["boxes_cxcywh"],
    )
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    for name, theirs, weight in [("class", "loss_ce", 1), ("box", "loss_bbox", 5), ("giou", "loss_giou", 2)]:
        torch.testing.assert_close(parts[name], weight * named[theirs].detach(), rtol=1e-5, atol=1e-6)
    for got, wanted in zip(gradients(total, made), gradients_or_zero(expected, made), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_normalisers_come_from_the_targets_alone() -> None:
    """Two images of 5 queries: 2 objects give 2 + 0.1 * 3, and 7 objects take all 5 queries."""
    assert normalisers([2, 7]) == {"queries.class": pytest.approx(2.3 + 5.0), "queries.box": 9.0, "queries.giou": 9.0}
    assert normalisers([0, 0]) == {"queries.class": pytest.approx(1.0), "queries.box": 0.0, "queries.giou": 0.0}


@pytest.mark.parametrize("cut", [[4], [3, 1], [1, 1, 2], [1, 1, 1, 1]], ids=str)
def test_losses_of_micro_batches_add_up_to_the_batchs(cut: list[int]) -> None:
    counts = [2, 0, 7, 1]
    made, (labels, boxes), whole = outputs(4), targets(counts), step_normalisers(counts)
    expected, expected_parts = set_loss(OPTIONS, made, labels, boxes, counts, whole)

    totals, all_parts, image = [], [], 0
    for images in cut:
        own, first = counts[image : image + images], sum(counts[:image])
        piece = {name: value[:, image : image + images] for name, value in made.items()}
        here = slice(first, first + sum(own))
        total, parts = set_loss(OPTIONS, piece, labels[here], boxes[here], own, whole)
        totals.append(total)
        all_parts.append(parts)
        image += images
    torch.testing.assert_close(torch.stack(totals).sum(), expected, rtol=1e-13, atol=0)
    for name, value in expected_parts.items():
        torch.testing.assert_close(sum(parts[name] for parts in all_parts), value, rtol=1e-13, atol=0)
    for got, wanted in zip(gradients(torch.stack(totals).sum(), made), gradients(expected, made), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_to_fp32(dtype: torch.dtype) -> None:
    counts = [2, 3]
    half = outputs(2, dtype)
    raised = {name: value.detach().float().requires_grad_() for name, value in half.items()}
    total, parts = loss(half, counts)
    expected, _ = loss(raised, counts)
    assert total.dtype == torch.float32 and all(part.dtype == torch.float32 for part in parts.values())
    assert torch.equal(total, expected)
    for got, wanted in zip(gradients(total, half), gradients(expected, raised), strict=True):
        assert torch.equal(got, wanted.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_types_stay(dtype: torch.dtype) -> None:
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
def test_each_term_weighs_by_its_own_key(key: str, part: str) -> None:
    one = {"class_weight": 1.0, "box_weight": 1.0, "giou_weight": 1.0, "no_object": 0.1, **SOFTMAX}
    made = outputs(2)
    _, parts = loss(made, [2, 3], LossOptions(**one))
    _, weighed = loss(made, [2, 3], LossOptions(**{**one, key: 3.0}))
    for name in ("class", "box", "giou"):
        torch.testing.assert_close(weighed[name], parts[name] * (3 if name == part else 1))


def test_the_order_of_objects_changes_nothing() -> None:
    made, (labels, boxes) = outputs(2), targets([3, 2])
    order = torch.tensor([2, 0, 1, 4, 3])
    expected, _ = loss(made, [3, 2])
    got, _ = set_loss(OPTIONS, made, labels[order], boxes[order], [3, 2], step_normalisers([3, 2]))
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)


def test_right_answers_cost_nothing_in_any_order_of_queries() -> None:
    labels, boxes = targets([QUERIES])
    order = torch.tensor([3, 1, 4, 0, 2])
    made = {
        "logits": 1e3 * torch.nn.functional.one_hot(labels[order], CLASSES + 1).float()[None, None],
        "boxes_cxcywh": boxes[order][None, None],
    }
    total, _ = loss(made, [QUERIES])
    assert total.item() == pytest.approx(0, abs=1e-6)


def test_boxes_without_area_have_a_finite_loss_and_gradient() -> None:
    """The reference divides zero by zero when prediction and target are the same point."""
    made = outputs(1, torch.float32)
    point = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    with torch.no_grad():
        made["boxes_cxcywh"][:] = point
    total, _ = set_loss(OPTIONS, made, torch.tensor([1]), point, [1], step_normalisers([1]))
    assert total.isfinite() and all(gradient.isfinite().all() for gradient in gradients(total, made))


@pytest.mark.parametrize("name", ["logits", "boxes_cxcywh"])
def test_outputs_that_are_not_finite_reach_the_trainer_as_such(name: str) -> None:
    made: dict[str, Any] = outputs(2)
    with torch.no_grad():
        made[name][:] = torch.nan
    total, _ = loss(made, [2, 3])
    assert total.isnan()


def test_the_loss_copies_to_the_host_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matcher's copy: nothing else waits for the device."""
    made, (labels, boxes), whole = outputs(2, torch.float32), targets([2, 3]), step_normalisers([2, 3])
    calls: list[str] = []

    def counted(name: str) -> Any:
        original = getattr(Tensor, name)

        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return original(self, *args, **kwargs)

        return call

    for name in ("cpu", "item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(Tensor, name, counted(name))
    set_loss(OPTIONS, made, labels, boxes, [2, 3], whole)
    monkeypatch.undo()
    assert calls == ["cpu"]
