"""Terms and costs of sigmoid classification against torchvision and transformers, in float64; padding; matches."""

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
    rng = generator("outputs", images, logits)
    shape = (LAYERS, images, QUERIES)
    return {
        "logits": 2 * torch.randn(*shape, logits, dtype=torch.float64, generator=rng).requires_grad_(),
        "boxes_cxcywh": 0.1 + 0.5 * torch.rand(*shape, 4, dtype=torch.float64, generator=rng).requires_grad_(),
    }


def targets(counts: list[int]) -> Targets:
    rng = generator("targets")
    labels = torch.randint(CLASSES, (sum(counts),), generator=rng)
    return Targets(counts, labels, 0.1 + 0.5 * torch.rand(sum(counts), 4, dtype=torch.float64, generator=rng))


def of_transformers(objects: Targets) -> list[dict[str, Tensor]]:
    parts = zip(objects.labels.split(objects.counts), objects.boxes.split(objects.counts), strict=True)
    return [{"class_labels": labels, "boxes": boxes} for labels, boxes in parts]


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.6, 0.0), (0.0, 1.5), (1.0, 3.0)])
def test_focal_loss_and_its_gradient_are_torchvisions(alpha: float, gamma: float) -> None:
    model_outputs, objects = outputs(), targets(COUNTS)
    matches = match(Criterion(SIGMOID, MATCHER).costs, model_outputs, objects)
    truth = torch.zeros(LAYERS, len(COUNTS), QUERIES, CLASSES, dtype=torch.float64)
    for layer, image, query, target in zip(*(part.tolist() for part in matches), strict=True):
        truth[layer, image, query, objects.labels[target]] = 1
    ours = Focal(1.0, alpha, gamma)(Comparison(model_outputs, objects, matches))
    theirs = sigmoid_focal_loss(model_outputs["logits"], truth, alpha, gamma).sum((1, 2, 3))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    direction = torch.arange(1.0, LAYERS + 1, dtype=torch.float64)
    gradients = [torch.autograd.grad((loss * direction).sum(), model_outputs["logits"])[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_costs_are_those_of_transformers_deformable_detr(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded from the matrices that transformers assigns."""
    from transformers.loss import loss_deformable_detr as theirs

    model_outputs, objects = outputs(), targets([2, 1, 4])
    matrices: list[np.ndarray] = []
    assign = theirs.linear_sum_assignment
    monkeypatch.setattr(
        theirs, "linear_sum_assignment", lambda cost: (matrices.append(np.asarray(cost)), assign(cost))[1]
    )
    matcher = theirs.DeformableDetrHungarianMatcher(class_cost=2.0, bbox_cost=5.0, giou_cost=2.0)
    costs = total_cost(Criterion(SIGMOID, MATCHER).costs, model_outputs, objects.padded())
    for layer in range(LAYERS):
        matrices.clear()
        theirs_outputs = {
            "logits": model_outputs["logits"][layer].detach(),
            "pred_boxes": model_outputs["boxes_cxcywh"][layer].detach(),
        }
        matcher(theirs_outputs, of_transformers(objects))
        for image, (count, cost) in enumerate(zip(objects.counts, matrices, strict=True)):
            np.testing.assert_allclose(costs[layer, image, :, :count].numpy(), cost, rtol=0, atol=1e-12)


def test_the_loss_and_its_gradient_are_those_of_transformers_deformable_detr() -> None:
    from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

    model_outputs, objects = outputs(), targets(COUNTS)
    criterion = Criterion(SIGMOID, MATCHER)
    normalisers = criterion.normalisers("queries", COUNTS, [QUERIES] * len(COUNTS))
    assert set(normalisers.values()) == {6.0}
    loss, parts = sum_terms({"queries": criterion("queries", unstack_layers(model_outputs), objects, normalisers)})
    matcher = DeformableDetrHungarianMatcher(class_cost=2.0, bbox_cost=5.0, giou_cost=2.0)
    theirs = DeformableDetrImageLoss(matcher, CLASSES, focal_alpha=0.25, losses=["labels", "boxes"])
    expected = torch.zeros((), dtype=torch.float64)
    for logits, boxes in zip(model_outputs["logits"], model_outputs["boxes_cxcywh"], strict=True):
        named = theirs({"logits": logits, "pred_boxes": boxes}, of_transformers(objects))
        terms = 2 * named["loss_ce"], 5 * named["loss_bbox"], 2 * named["loss_giou"]
        expected = expected + sum(terms)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for name, term in zip(("class", "box", "giou"), terms, strict=True):
        torch.testing.assert_close(parts[name], term.detach(), rtol=1e-12, atol=0)
    for value in model_outputs.values():
        ours, reference = (torch.autograd.grad(x, value, retain_graph=True)[0] for x in (loss, expected))
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_padding_rows_have_no_loss_and_no_match(kind: Any) -> None:
    """Also in an image with fewer rows than objects: the loss is that without padding."""
    criterion = Criterion(LossOptions(**WEIGHTS, classification=kind, focal_alpha=0.25, focal_gamma=2.0), MATCHER)
    model_outputs, objects = outputs(1, CLASSES + (kind == "softmax")), targets([4])
    short = {name: value[:, :, :3] for name, value in model_outputs.items()}
    real = torch.tensor([[True, True, True, False, False]])
    divisors = {f"x.{term.name}": 1.0 for term in criterion.terms}
    padded = [{**layer, "real": real} for layer in unstack_layers(model_outputs)]
    expected = criterion("x", unstack_layers(short), objects, divisors)
    values = criterion("x", padded, objects, divisors)
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value, rtol=1e-12, atol=0)
    assert max(match(criterion.costs, {**model_outputs, "real": real}, objects).queries) < 3


def test_fixed_matches_bypass_the_matcher(monkeypatch: pytest.MonkeyPatch) -> None:
    model_outputs, objects = outputs(), targets(COUNTS)
    criterion = Criterion(SIGMOID, MATCHER)
    divisors = {f"hints.{term.name}": 1.0 for term in criterion.terms}
    monkeypatch.delattr(set_loss, "match")
    matches = Matches(*torch.tensor([[0, 0], [0, 2], [4, 1], [1, 3]]))  # layer, image, row, object
    loss = criterion("hints", unstack_layers(model_outputs), objects, divisors, matches)["box"]
    rows = model_outputs["boxes_cxcywh"][:, [0, 2], [4, 1]]
    torch.testing.assert_close(loss, 5 * (rows - objects.boxes[[1, 3]]).abs().sum((1, 2)), rtol=1e-12, atol=0)


def test_a_term_of_the_last_layer_is_zero_for_the_others() -> None:
    class Last(CrossEntropy):
        name = "last"
        layers = "last"

    model_outputs, objects = outputs(logits=CLASSES + 1), targets(COUNTS)
    softmax = LossOptions(**WEIGHTS, classification="softmax", focal_alpha=0.25, focal_gamma=2.0)
    criterion = Criterion(softmax, MATCHER)
    criterion.terms.append(Last(2.0, 0.1))
    divisors = {f"queries.{term.name}": 3.0 for term in criterion.terms}
    values = criterion("queries", unstack_layers(model_outputs), objects, divisors)
    assert values["last"].tolist() == [0, 0, values["class"][-1].item()]


def test_each_term_has_its_own_normaliser_in_each_set() -> None:
    terms: list[Term] = [CrossEntropy(1.0, 0.1), Focal(1.0, 0.25, 2.0)]
    assert [term.normaliser([2, 9], [5, 4]) for term in terms] == [pytest.approx(2.3 + 4), 11.0]
    criterion = Criterion(SIGMOID, MATCHER)
    assert criterion.normalisers("hints", [4], [4]) == dict.fromkeys(("hints.class", "hints.box", "hints.giou"), 4.0)


def test_a_query_predicts_its_most_probable_class() -> None:
    logits = torch.tensor([[[0.0, 2.0, -1.0, 5.0]]])
    corners = torch.tensor([[[0.5, 0.5, 0.2, 0.4]]])
    predicted = {kind: detections(kind, {"logits": logits, "boxes_cxcywh": corners}) for kind in ("softmax", "sigmoid")}
    assert predicted["softmax"][1].item() == 1 and predicted["sigmoid"][1].item() == 3
    assert predicted["sigmoid"][0].item() == pytest.approx(1 / (1 + np.exp(-5)))
    torch.testing.assert_close(predicted["softmax"][0], logits.softmax(-1)[..., 1])
    torch.testing.assert_close(predicted["softmax"][2], torch.tensor([[[0.4, 0.3, 0.6, 0.7]]]))
    assert probabilities("softmax", logits).shape[-1] == 3 and probabilities("sigmoid", logits).shape[-1] == 4


def test_outputs_that_are_not_finite_are_matched_before_padding() -> None:
    model_outputs, objects = outputs(1), targets([2])
    with torch.no_grad():
        model_outputs["logits"][:] = torch.nan
    real = torch.tensor([[False, True, True, False, False]])
    matches = match([FocalCost(1.0, 0.25, 2.0)], {**model_outputs, "real": real}, objects)
    assert set(matches.queries.tolist()) == {1, 2} and len(matches.queries) == 2 * LAYERS
