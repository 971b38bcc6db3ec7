"""The loss of a teacher's predictions against loops over all assignments, and what padding and masks change."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss

from common.machine.seeds import generator
from detr.criterion.answers import Targets, unstack_layers
from detr.criterion.distillation import DetectionDistillationOptions, confident_predictions, teacher_criterion
from detr.criterion.matcher import MatcherOptions
from detr.criterion.set_loss import Criterion, LossOptions

LAYERS, ROWS, CLASSES = 2, 4, 3
MATCHER = MatcherOptions(class_cost=1.5, box_cost=5.0, giou_cost=2.0)
EVERY_KIND = pytest.mark.parametrize("kind", ["soft", "hard"])
EVERY_CLASSIFICATION = pytest.mark.parametrize("classification", ["softmax", "sigmoid"])


def loss_options(classification: Any) -> LossOptions:
    weights = {"class_weight": 1.5, "box_weight": 5.0, "giou_weight": 2.0, "no_object": 0.1}
    return LossOptions(**weights, classification=classification, focal_alpha=0.25, focal_gamma=2.0)


def options(kind: Any, temperature: float = 2.0) -> DetectionDistillationOptions:
    return DetectionDistillationOptions(teacher="file", kind=kind, weight=0.5, temperature=temperature, min_score=0.5)


def outputs(classification: str, images: int, rows: int = ROWS, layers: int = LAYERS, seed: int = 0) -> dict[str, Any]:
    rng = generator("outputs", seed)
    count = CLASSES + (classification == "softmax")
    logits = torch.randn(layers, images, rows, count, dtype=torch.float64, generator=rng)
    boxes = 0.2 + 0.4 * torch.rand(layers, images, rows, 4, dtype=torch.float64, generator=rng)
    return {"logits": logits.requires_grad_(), "boxes_cxcywh": boxes.requires_grad_()}


def targets(classification: str, counts: list[int]) -> Targets:
    """The predictions of a teacher that has counts[i] confident ones in image i."""
    rng = generator("teacher")
    width, total = CLASSES + (classification == "softmax"), sum(counts)
    logits = 2 * torch.randn(total, width, dtype=torch.float64, generator=rng)
    boxes = 0.2 + 0.4 * torch.rand(total, 4, dtype=torch.float64, generator=rng)
    return Targets(counts, logits[:, :CLASSES].argmax(1), boxes, logits=logits)


def class_cost(classification: str, logits: Tensor, label: Tensor) -> float:
    if classification == "softmax":
        return -float(logits.softmax(0)[label])
    p = float(logits[label].sigmoid())
    return -0.25 * (1 - p) ** 2 * math.log(p) + 0.75 * p**2 * math.log(1 - p)


def class_loss(classification: str, kind: str, temperature: float, student: Tensor, teacher: Tensor) -> Tensor:
    """The loss of one pair of logits (K',)."""
    label = int(teacher[:CLASSES].argmax())
    if kind == "hard" and classification == "softmax":
        return -student.log_softmax(0)[label]
    if kind == "hard":
        truth = torch.zeros_like(student)
        truth[label] = 1
        return sigmoid_focal_loss(student, truth, alpha=0.25, gamma=2.0, reduction="sum")
    if classification == "softmax":
        p, q = ((logits / temperature).softmax(0) for logits in (teacher, student))
        return temperature**2 * (p * (p / q).log()).sum()
    p, q = ((logits / temperature).sigmoid() for logits in (teacher, student))
    return temperature**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()


def cheapest(costs: Tensor) -> list[tuple[int, int]]:
    """The pairs of the cheapest of all assignments of rows to objects: costs (rows, objects)."""
    count = min(costs.shape)
    candidates = (
        list(zip(rows, numbers, strict=True))
        for rows in itertools.permutations(range(costs.shape[0]), count)
        for numbers in itertools.combinations(range(costs.shape[1]), count)
    )
    return min(candidates, key=lambda pairs: sum(float(costs[pair]) for pair in pairs))


def pair_values(classification: str, kind: str, predicted: dict[str, Any], objects: Targets) -> Tensor:
    """The weighted terms summed over the pairs of the cheapest assignment: (L, 3)."""
    values = torch.zeros(LAYERS, 3, dtype=torch.float64)
    starts = [0, *itertools.accumulate(objects.counts)]
    assert objects.logits is not None
    for layer, image in itertools.product(range(LAYERS), range(len(objects.counts))):
        logits, boxes = (predicted[name][layer, image] for name in ("logits", "boxes_cxcywh"))
        labels, true_boxes, teacher = (x[starts[image] : starts[image + 1]] for x in (*objects[1:3], objects.logits))
        giou = generalized_box_iou(*(box_convert(x, "cxcywh", "xyxy") for x in (boxes, true_boxes)))
        l1 = (boxes[:, None] - true_boxes).abs().sum(-1)
        costs = [[1.5 * class_cost(classification, row, label) for label in labels] for row in logits.detach()]
        costs_of_boxes = (5 * l1 - 2 * giou).detach()
        for row, number in cheapest(torch.tensor(costs).view_as(costs_of_boxes) + costs_of_boxes):
            of_class = class_loss(classification, kind, 2.0, logits[row], teacher[number])
            values[layer] += torch.stack((1.5 * of_class, 5 * l1[row, number], 2 * (1 - giou[row, number])))
    return values


@EVERY_KIND
@EVERY_CLASSIFICATION
@pytest.mark.parametrize("counts", [[2, 3], [0, 1], [4, 0, 1], [5, 1], [0, 0]], ids=str)
def test_the_loss_is_that_of_the_cheapest_of_all_assignments(classification: str, kind: str, counts: list[int]) -> None:
    """For no prediction, empty images, unequal numbers, and more predictions than rows; with gradients."""
    predicted, objects = outputs(classification, len(counts)), targets(classification, counts)
    divisors = {f"teacher.{name}": 7.0 for name in ("class", "box", "giou")}
    criterion = teacher_criterion(loss_options(classification), MATCHER, options(kind))
    values = torch.stack([*criterion("teacher", unstack_layers(predicted), objects, divisors).values()], dim=1)
    expected = pair_values(classification, kind, predicted, objects) / 7
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-12)
    reached = sum(0 * value.sum() for value in predicted.values())  # also without a pair
    losses = (values.sum() + reached, expected.sum() + reached)
    computed, plain = (torch.autograd.grad(loss, [*predicted.values()], retain_graph=True) for loss in losses)
    for gradients in zip(computed, plain, strict=True):
        torch.testing.assert_close(*gradients)


@EVERY_CLASSIFICATION
def test_the_hard_loss_is_that_of_the_labels_in_rows_that_are_all_matched(classification: str) -> None:
    predicted, objects = outputs(classification, 2), targets(classification, [ROWS, ROWS])
    divisors = {f"{name}.{term}": 1.0 for name in ("teacher", "queries") for term in ("class", "box", "giou")}
    loss = loss_options(classification)
    of_teacher = teacher_criterion(loss, MATCHER, options("hard"))("teacher", predicted, objects, divisors)
    of_labels = Criterion(loss, MATCHER)("queries", predicted, objects, divisors)
    torch.testing.assert_close(of_teacher, of_labels)


@EVERY_CLASSIFICATION
def test_a_student_with_the_teachers_outputs_has_no_soft_loss(classification: str) -> None:
    predicted = outputs(classification, 1, layers=1)
    last = {name: value[0].detach() for name, value in predicted.items()}
    objects = confident_predictions(classification, last, 0.0)
    assert objects.counts == [ROWS]
    criterion = teacher_criterion(loss_options(classification), MATCHER, options("soft"))
    divisors = {f"teacher.{name}": 1.0 for name in ("class", "box", "giou")}
    for name, values in criterion("teacher", predicted, objects, divisors).items():
        assert values.abs().max() < 1e-9, name


@EVERY_CLASSIFICATION
def test_confident_predictions_have_a_class_above_the_min_score_and_no_object_is_none(classification: str) -> None:
    last = {name: value[0].detach() for name, value in outputs(classification, 3, rows=9).items()}
    with_none = last["logits"].softmax(-1) if classification == "softmax" else last["logits"].sigmoid()
    kept = confident_predictions(classification, last, 0.6)
    expected = [
        (image, row, int(with_none[image, row, :CLASSES].argmax()))
        for image in range(3)
        for row in range(9)
        if max(with_none[image, row, :CLASSES].tolist()) >= 0.6
    ]
    assert kept.counts == [sum(image == i for image, *_ in expected) for i in range(3)] and 0 < len(expected) < 27
    assert kept.labels.tolist() == [label for *_, label in expected]
    rows = [(image, row) for image, row, _ in expected]
    assert torch.equal(kept.boxes, torch.stack([last["boxes_cxcywh"][pair] for pair in rows]))
    assert kept.logits is not None and torch.equal(kept.logits, torch.stack([last["logits"][pair] for pair in rows]))
    none = confident_predictions(classification, last, 1.0)
    assert none.counts == [0, 0, 0] and none.boxes.shape == (0, 4)


def test_half_precision_is_computed_in_fp32() -> None:
    predicted = {name: value.detach().bfloat16() for name, value in outputs("softmax", 2).items()}
    objects = confident_predictions("softmax", {name: value[-1] for name, value in predicted.items()}, 0.3)
    criterion = teacher_criterion(loss_options("softmax"), MATCHER, options("soft"))
    divisors = {f"teacher.{name}": 1.0 for name in ("class", "box", "giou")}
    values = criterion("teacher", predicted, objects, divisors)
    upcast = criterion("teacher", {name: value.float() for name, value in predicted.items()}, objects, divisors)
    assert all(value.dtype == torch.float32 for value in values.values())
    torch.testing.assert_close(values, upcast, rtol=0, atol=0)
    assert F.relu(values["class"]).sum() > 0
