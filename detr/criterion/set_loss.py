"""The set prediction loss (Carion et al. 2020, arXiv 2005.12872, section 3.1 and appendix A.2)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.types import NonNegativeFloat
from detr.criterion.boxes import giou, to_xyxy
from detr.criterion.matcher import MatcherOptions, match


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Weights of the terms; `no_object` is the class weight of queries that took nothing (A.4: 0.1)."""

    class_weight: NonNegativeFloat
    box_weight: NonNegativeFloat
    giou_weight: NonNegativeFloat
    no_object: NonNegativeFloat


def sizes(options: LossOptions, counts: list[int], queries: int) -> dict[str, float]:
    """What the terms are divided by, from the targets alone: the class weights of all queries, and the objects.

    An image with n objects and Q queries has min(n, Q) matched queries and Q - min(n, Q) of weight `no_object`.
    """
    taken = [min(count, queries) for count in counts]
    return {
        "classes": float(sum(n + options.no_object * (queries - n) for n in taken)),
        "boxes": float(sum(counts)),
    }


def set_loss(
    options: LossOptions,
    matcher: MatcherOptions,
    outputs: dict[str, Tensor],
    labels: Tensor,
    target_cxcywh: Tensor,
    counts: list[int],
    sizes: dict[str, float],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum over all decoder layers, and its parts: the last layer's three terms and the earlier layers' sum.

    outputs: logits (L, B, Q, K+1) with "no object" last, boxes_cxcywh (L, B, Q, 4) relative to each image;
    labels (T,), target_cxcywh (T, 4), counts per image; `sizes` of the whole step. Every layer is matched anew.
    """
    logits, boxes = (_at_least_fp32(outputs[name]) for name in ("logits", "boxes_cxcywh"))
    target_cxcywh = target_cxcywh.to(boxes.dtype)
    matches = match(matcher, logits, boxes, labels, target_cxcywh, counts)
    where = (matches.layers, matches.images, matches.queries)

    no_object = logits.shape[-1] - 1
    classes = labels.new_full(logits.shape[:3], no_object).index_put(where, labels[matches.targets])  # (L, B, Q)
    nll = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction="none").view_as(classes)
    weight = torch.ones_like(nll).masked_fill(classes == no_object, options.no_object)
    class_term = (nll * weight).sum((1, 2)) / sizes["classes"]  # (L,)

    chosen, truth = boxes[where], target_cxcywh[matches.targets]  # (M, 4)
    box_term = _per_layer((chosen - truth).abs().sum(-1), matches.layers, len(logits)) / sizes["boxes"]
    overlap = giou(to_xyxy(chosen), to_xyxy(truth))  # (M,)
    giou_term = _per_layer(1 - overlap, matches.layers, len(logits)) / sizes["boxes"]

    weighted = torch.stack(
        (options.class_weight * class_term, options.box_weight * box_term, options.giou_weight * giou_term)
    )  # (3, L)
    parts = dict(zip(("class", "box", "giou"), weighted[:, -1].detach(), strict=True))
    if len(logits) > 1:
        parts["auxiliary"] = weighted[:, :-1].sum().detach()
    return weighted.sum(), parts


def _per_layer(values: Tensor, layers: Tensor, count: int) -> Tensor:
    """Sum values (M,) by their layer (M,) -> (count,)."""
    return values.new_zeros(count).index_add(0, layers, values)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
