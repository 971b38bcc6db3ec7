"""The set prediction loss (Carion et al. 2020, arXiv 2005.12872, section 3.1 and appendix A.2), as a list of terms.

An answer set is a group of output rows that has its own matching and loss, such as "queries". answers.py defines output
rows and the letters in shapes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from common.types import Fraction, NonNegativeFloat
from detr.criterion.answers import Classification, Matches, Outputs, Targets, stack_last_layer, stack_layers
from detr.criterion.masks import Dice, MaskFocal
from detr.criterion.matcher import ClassCost, Cost, FocalCost, GiouCost, L1Cost, MatcherOptions, match
from detr.criterion.terms import L1, Comparison, CrossEntropy, Focal, Giou, OnRequest, Term


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The weights of the terms, and the choice of the classification loss.

    class_weight, box_weight, giou_weight: weights of the classification, L1 and GIoU terms in the loss.
    classification: "softmax" is a cross-entropy over the classes and "no object"; "sigmoid" is a focal loss per class.
    no_object: weight of unmatched queries in the cross-entropy (0.1 in section 3.1); matched queries have weight 1.
    focal_alpha, focal_gamma: alpha and gamma of the focal loss (0.25 and 2 in Lin et al. 2017, arXiv 1708.02002).
    mask_weight, dice_weight: weights of the focal and dice terms of masks; only detectors with masks have them.
    """

    class_weight: NonNegativeFloat
    box_weight: NonNegativeFloat
    giou_weight: NonNegativeFloat
    no_object: NonNegativeFloat
    classification: Classification
    focal_alpha: Fraction
    focal_gamma: NonNegativeFloat
    mask_weight: NonNegativeFloat = 1.0
    dice_weight: NonNegativeFloat = 1.0


class Criterion:
    """Matches output rows to objects by `costs`, and computes the `terms` of the loss.

    A task may append to both lists.
    """

    def __init__(self, loss: LossOptions, matcher: MatcherOptions, masks: bool = False):
        focal = (loss.focal_alpha, loss.focal_gamma)
        softmax = loss.classification == "softmax"
        self.terms: list[Term] = [
            CrossEntropy(loss.class_weight, loss.no_object) if softmax else Focal(loss.class_weight, *focal),
            L1(loss.box_weight),
            Giou(loss.giou_weight),
        ]
        if masks:
            self.terms += [MaskFocal(loss.mask_weight), Dice(loss.dice_weight)]
        self.costs: list[Cost] = [
            L1Cost(matcher.box_cost),
            ClassCost(matcher.class_cost) if softmax else FocalCost(matcher.class_cost, *focal),
            GiouCost(matcher.giou_cost),
        ]

    def normalisers(self, name: str, counts: Sequence[int], rows: Sequence[int]) -> dict[str, float]:
        """Return what a batch adds to the divisor of each term of the answer set `name`, by keys like "queries.class".

        Image i has counts[i] objects and rows[i] output rows in one layer.
        """
        return {f"{name}.{term.name}": term.normaliser(counts, rows) for term in self.terms}

    def __call__(
        self,
        name: str,
        layers: Outputs | Sequence[Outputs],
        targets: Targets,
        normalisers: Mapping[str, float],
        matches: Matches | None = None,
        on_request: OnRequest | None = None,
    ) -> dict[str, Tensor]:
        """Compute the weighted terms of the answer set `name`; returns the values (L,) of each term by its name.

        `layers` are the outputs of L layers: a list of dicts, or one dict of tensors (L, B, R, ...). `normalisers`
        holds the divisor of each term, summed over all batches of the step, by the keys of the method `normalisers`.
        Each layer is matched separately. But if `matches` is given, nothing is matched: the pairs in `matches`, which
        are those of one layer, are used for every layer. A term is omitted if the outputs lack the entry that it reads.
        A term that is computed for the last layer only is 0 for all other layers, and may also read the outputs of the
        last layer that `on_request` computes (see `Comparison`). Raises UserError when a term has no
        normaliser.
        """
        outputs = stack_layers(layers)
        depth = len(outputs["logits"])  # L
        targets = targets.to(outputs["logits"].dtype)
        matches = match(self.costs, outputs, targets) if matches is None else matches.repeat(depth)
        comparisons = {"all": Comparison(outputs, targets, matches)}
        if any(term.layers == "last" for term in self.terms):
            comparisons["last"] = Comparison(
                stack_last_layer(layers), targets, matches.of_last_layer(depth), on_request
            )
        values = {}
        for term in self.terms:
            comparison = comparisons[term.layers]
            if comparison.has(term.reads):
                sums = term(comparison)
                sums = F.pad(sums, (depth - len(sums), 0)) if term.layers == "last" else sums  # (L,)
                values[term.name] = term.weight * (sums / _divisor(normalisers, f"{name}.{term.name}"))
        return values


def sum_terms(sets: Mapping[str, Mapping[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum the weighted terms of all answer sets; returns the total, and its detached parts for the log by name.

    `sets` holds the result of `Criterion` for each answer set. The total and the parts are scalars. The set "queries"
    gives one part per term: its value for the last layer. If there are earlier layers, the sum of all terms over these
    layers is the part "auxiliary". Any other set gives one part with the name of the set: the sum of all its terms over
    all layers.
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
            f'the model returns the answer set "{key.partition(".")[0]}", for which the task has no normalisers; add '
            "that set to the task's method answer_sets, with the numbers of objects and rows of each image."
        )
    return normalisers[key]
