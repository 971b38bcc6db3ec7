"""The set prediction loss (Carion et al. 2020, arXiv 2005.12872, section 3.1 and appendix A.2): a list of terms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from common.types import Fraction, NonNegativeFloat
from detr.criterion.answers import Classification, Matches, Outputs, Targets, stack_last_layer, stack_layers
from detr.criterion.matcher import ClassCost, Cost, FocalCost, GiouCost, L1Cost, MatcherOptions, match
from detr.criterion.terms import L1, Comparison, CrossEntropy, Focal, Giou, Term


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Weights of the terms, and how classes are learnt.

    classification: "softmax" over all classes and "no object", or "sigmoid", focal loss of each class by itself.
    no_object: with softmax, the class weight of queries that took nothing (A.4: 0.1).
    focal_alpha, focal_gamma: with sigmoid (Lin et al. 2017, arXiv 1708.02002: 0.25 and 2).
    """

    class_weight: NonNegativeFloat
    box_weight: NonNegativeFloat
    giou_weight: NonNegativeFloat
    no_object: NonNegativeFloat
    classification: Classification
    focal_alpha: Fraction
    focal_gamma: NonNegativeFloat


class Criterion:
    """Terms of a loss, and the costs by which rows are matched to objects; a task may add to both lists."""

    def __init__(self, loss: LossOptions, matcher: MatcherOptions):
        focal = (loss.focal_alpha, loss.focal_gamma)
        softmax = loss.classification == "softmax"
        self.terms: list[Term] = [
            CrossEntropy(loss.class_weight, loss.no_object) if softmax else Focal(loss.class_weight, *focal),
            L1(loss.box_weight),
            Giou(loss.giou_weight),
        ]
        self.costs: list[Cost] = [
            L1Cost(matcher.box_cost),
            ClassCost(matcher.class_cost) if softmax else FocalCost(matcher.class_cost, *focal),
            GiouCost(matcher.giou_cost),
        ]

    def normalisers(self, name: str, counts: Sequence[int], rows: Sequence[int]) -> dict[str, float]:
        """What the terms of the set `name` are divided by, from the objects and the rows of each image alone."""
        return {f"{name}.{term.name}": term.normaliser(counts, rows) for term in self.terms}

    def __call__(
        self,
        name: str,
        layers: Outputs | Sequence[Outputs],
        targets: Targets,
        normalisers: Mapping[str, float],
        matches: Matches | None = None,
    ) -> dict[str, Tensor]:
        """The weighted terms (L,) of the set `name`, for the answers of its L layers, a list or already stacked.

        Every layer is matched anew, unless `matches` gives the pairs of a layer; `normalisers` are of the whole step.
        """
        outputs = stack_layers(layers)
        count = len(outputs["logits"])
        targets = targets._replace(boxes=targets.boxes.to(outputs["boxes_cxcywh"].dtype))
        matches = match(self.costs, outputs, targets) if matches is None else matches.repeat(count)
        compared = {"all": Comparison(outputs, targets, matches)}
        if any(term.layers == "last" for term in self.terms):
            compared["last"] = Comparison(stack_last_layer(layers), targets, matches.of_last_layer(count))
        values = {}
        for term in self.terms:
            if term.reads in compared[term.layers].outputs:
                sums = term(compared[term.layers])
                sums = F.pad(sums, (count - len(sums), 0)) if term.layers == "last" else sums  # (L,)
                values[term.name] = term.weight * (sums / _divisor(normalisers, f"{name}.{term.name}"))
        return values


def sum_terms(sets: Mapping[str, Mapping[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of all sets' weighted terms, and its parts.

    Those are the terms of the last layer of "queries", the sum of the earlier layers' as "auxiliary", and the whole of
    each set beside.
    """
    totals: list[Tensor] = []
    parts: dict[str, Tensor] = {}
    for name, values in sets.items():
        weighted = torch.stack(list(values.values()))  # (terms, L)
        totals.append(weighted.sum())
        if name != "queries":
            parts[name] = totals[-1].detach()
            continue
        parts |= dict(zip(values, weighted[:, -1].detach(), strict=True))
        if weighted.shape[1] > 1:
            parts["auxiliary"] = weighted[:, :-1].sum().detach()
    return sum(totals[1:], totals[0]), parts


def _divisor(normalisers: Mapping[str, float], key: str) -> float:
    if key not in normalisers:
        raise UserError(
            f'the model answers with a set "{key.partition(".")[0]}" of which the task knows no normalisers; let its '
            "method answer_sets name the objects and rows of each image there."
        )
    return normalisers[key]
