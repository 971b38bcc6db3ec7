"""Terms and costs of sigmoid classification against torchvision and transformers, in float64; padding; fixed pairs."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from common.machine.seeds import generator
from detr.criterion import set_loss
from detr.criterion.answers import Matches, Targets, detections, probabilities, unstack_layers
from detr.criterion.matcher import FocalCost, MatcherOptions, match, total_cost
from detr.criterion.set_loss import Criterion, LossOptions, sum_terms
from detr.criterion.terms import Comparison, CrossEntropy, Focal, Term

LAYERS, QUERIES, CLASSES = 3, 5, 4
WEIGHTS: dict[str, Any] = {"class_weight": 2.0, "box_weight": 5.0, "giou_weight": 2.0, "no_object": 0.1}
SIGMOID = LossOptions(**WEIGHTS, classification="sigmoid", focal_alpha=0.25, focal_gamma=2.0)
MATCHER = MatcherOptions(class_cost=2.0, box_cost=5.0, giou_cost=2.0)
COUNTS = [2, 0, 4]


def outputs(images: int = len(COUNTS), logits: int = CLASSES) -> dict[str, Tensor]:
    drawn = generator("outputs", images, logits)
    shape = (LAYERS, images, QUERIES)
    return {
        "logits": 2 * torch.randn(*shape, logits, dtype=torch.float64, generator=drawn).requires_grad_(),
        "boxes_cxcywh": 0.1 + 0.5 * torch.rand(*shape, 4, dtype=torch.float64, generator=drawn).requires_grad_(),
    }


def targets(counts: list[int]) -> Targets:
    drawn = generator("targets")
    labels = torch.randint(CLASSES, (sum(counts),), generator=drawn)
    return Targets(counts, labels, 0.1 + 0.5 * torch.rand(sum(counts), 4, dtype=torch.float64, generator=drawn))


def of_transformers(objects: Targets) -> list[dict[str, Tensor]]:
    parts = zip(objects.labels.split(objects.counts), objects.boxes.split(objects.counts), strict=True)
    return [{"class_labels": labels, "boxes": boxes} for labels, boxes in parts]


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.6, 0.0), (0.0, 1.5), (1.0, 3.0)])
def test_focal_loss_and_its_gradient_are_torchvisions(alpha: float, gamma: float) -> None:
    made, objects = outputs(), targets(COUNTS)
    matches = match(Criterion(SIGMOID, MATCHER).costs, made, objects)
    truth = torch.zeros(LAYERS, len(COUNTS), QUERIES, CLASSES, dtype=torch.float64)
    for layer, image, query, target in zip(*(part.tolist() for part in matches), strict=True):
        truth[layer, image, query, objects.labels[target]] = 1
    ours = Focal(1.0, alpha, gamma)(Comparison(made, objects, matches))
    theirs = sigmoid_focal_loss(made["logits"], truth, alpha, gamma).sum((1, 2, 3))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    direction = torch.arange(1.0, LAYERS + 1, dtype=torch.float64)
    gradients = [torch.autograd.grad((loss * direction).sum(), made["logits"])[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_costs_are_those_of_transformers_deformable_detr(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read off what it assigns."""
    from transformers.loss import loss_deformable_detr as theirs

    made, objects = outputs(), targets([2, 1, 4])
    seen: list[np.ndarray] = []
    assign = theirs.linear_sum_assignment
    monkeypatch.setattr(theirs, "linear_sum_assignment", lambda cost: (seen.append(np.asarray(cost)), assign(cost))[1])
    matcher = theirs.DeformableDetrHungarianMatcher(class_cost=2.0, bbox_cost=5.0, giou_cost=2.0)
    ours = total_cost(Criterion(SIGMOID, MATCHER).costs, made, objects.padded())
    for layer in range(LAYERS):
        seen.clear()
        answers = {"logits": made["logits"][layer].detach(), "pred_boxes": made["boxes_cxcywh"][layer].detach()}
        matcher(answers, of_transformers(objects))
        for image, (count, cost) in enumerate(zip(objects.counts, seen, strict=True)):
            np.testing.assert_allclose(ours[layer, image, :, :count].numpy(), cost, rtol=0, atol=1e-12)


def test_the_loss_and_its_gradient_are_those_of_transformers_deformable_detr() -> None:
    from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

    made, objects = outputs(), targets(COUNTS)
    criterion = Criterion(SIGMOID, MATCHER)
    normalisers = criterion.normalisers("queries", COUNTS, [QUERIES] * len(COUNTS))
    assert set(normalisers.values()) == {6.0}
    loss, parts = sum_terms({"queries": criterion("queries", unstack_layers(made), objects, normalisers)})
    matcher = DeformableDetrHungarianMatcher(class_cost=2.0, bbox_cost=5.0, giou_cost=2.0)
    theirs = DeformableDetrImageLoss(matcher, CLASSES, focal_alpha=0.25, losses=["labels", "boxes"])
    expected = torch.zeros((), dtype=torch.float64)
    for logits, boxes in zip(made["logits"], made["boxes_cxcywh"], strict=True):
        named = theirs({"logits": logits, "pred_boxes": boxes}, of_transformers(objects))
        terms = 2 * named["loss_ce"], 5 * named["loss_bbox"], 2 * named["loss_giou"]
        expected = expected + sum(terms)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for name, term in zip(("class", "box", "giou"), terms, strict=True):
        torch.testing.assert_close(parts[name], term.detach(), rtol=1e-12, atol=0)
    for value in made.values():
        ours, reference = (torch.autograd.grad(x, value, retain_graph=True)[0] for x in (loss, expected))
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_rows_that_are_padding_have_no_loss_and_no_object(kind: Any) -> None:
    """Even where an image has fewer rows than objects: as if the padding were not there."""
    criterion = Criterion(LossOptions(**WEIGHTS, classification=kind, focal_alpha=0.25, focal_gamma=2.0), MATCHER)
    made, objects = outputs(1, CLASSES + (kind == "softmax")), targets([4])
    short = {name: value[:, :, :3] for name, value in made.items()}
    real = torch.tensor([[True, True, True, False, False]])
    divisors = {f"x.{term.name}": 1.0 for term in criterion.terms}
    padded = [{**layer, "real": real} for layer in unstack_layers(made)]
    expected = criterion("x", unstack_layers(short), objects, divisors)
    got = criterion("x", padded, objects, divisors)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=0)
    assert max(match(criterion.costs, {**made, "real": real}, objects).queries) < 3


def test_fixed_pairs_pass_the_matcher_by(monkeypatch: pytest.MonkeyPatch) -> None:
    made, objects = outputs(), targets(COUNTS)
    criterion = Criterion(SIGMOID, MATCHER)
    divisors = {f"hints.{term.name}": 1.0 for term in criterion.terms}
    monkeypatch.delattr(set_loss, "match")
    pairs = Matches(*torch.tensor([[0, 0], [0, 2], [4, 1], [1, 3]]))  # layer, image, row, object
    got = criterion("hints", unstack_layers(made), objects, divisors, pairs)["box"]
    rows = made["boxes_cxcywh"][:, [0, 2], [4, 1]]
    torch.testing.assert_close(got, 5 * (rows - objects.boxes[[1, 3]]).abs().sum((1, 2)), rtol=1e-12, atol=0)


def test_a_term_of_the_last_layer_sees_no_other() -> None:
    class Last(CrossEntropy):
        name = "last"
        layers = "last"

    made, objects = outputs(logits=CLASSES + 1), targets(COUNTS)
    softmax = LossOptions(**WEIGHTS, classification="softmax", focal_alpha=0.25, focal_gamma=2.0)
    criterion = Criterion(softmax, MATCHER)
    criterion.terms.append(Last(2.0, 0.1))
    divisors = {f"queries.{term.name}": 3.0 for term in criterion.terms}
    values = criterion("queries", unstack_layers(made), objects, divisors)
    assert values["last"].tolist() == [0, 0, values["class"][-1].item()]


def test_each_term_has_a_normaliser_of_its_own_in_each_set() -> None:
    terms: list[Term] = [CrossEntropy(1.0, 0.1), Focal(1.0, 0.25, 2.0)]
    assert [term.normaliser([2, 9], [5, 4]) for term in terms] == [pytest.approx(2.3 + 4), 11.0]
    criterion = Criterion(SIGMOID, MATCHER)
    assert criterion.normalisers("hints", [4], [4]) == dict.fromkeys(("hints.class", "hints.box", "hints.giou"), 4.0)


def test_a_query_answers_with_its_most_probable_class() -> None:
    logits = torch.tensor([[[0.0, 2.0, -1.0, 5.0]]])
    corners = torch.tensor([[[0.5, 0.5, 0.2, 0.4]]])
    answers = {kind: detections(kind, {"logits": logits, "boxes_cxcywh": corners}) for kind in ("softmax", "sigmoid")}
    assert answers["softmax"][1].item() == 1 and answers["sigmoid"][1].item() == 3
    assert answers["sigmoid"][0].item() == pytest.approx(1 / (1 + np.exp(-5)))
    torch.testing.assert_close(answers["softmax"][0], logits.softmax(-1)[..., 1])
    torch.testing.assert_close(answers["softmax"][2], torch.tensor([[[0.4, 0.3, 0.6, 0.7]]]))
    assert probabilities("softmax", logits).shape[-1] == 3 and probabilities("sigmoid", logits).shape[-1] == 4


def test_numbers_that_are_not_finite_are_cheaper_than_padding() -> None:
    made, objects = outputs(1), targets([2])
    with torch.no_grad():
        made["logits"][:] = torch.nan
    real = torch.tensor([[False, True, True, False, False]])
    pairs = match([FocalCost(1.0, 0.25, 2.0)], {**made, "real": real}, objects)
    assert set(pairs.queries.tolist()) == {1, 2} and len(pairs.queries) == 2 * LAYERS
