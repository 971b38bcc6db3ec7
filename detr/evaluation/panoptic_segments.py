"""From the mask logits of queries to a panoptic segmentation: each pixel belongs to at most one segment.

Kirillov et al. 2019 (arXiv 1801.00868) define the task: "things" are countable, "stuff" is not. DETR's rule is in
Carion et al. 2020 (arXiv 2005.12872), appendix A.3, and MaskFormer's in Cheng et al. 2021 (arXiv 2107.06278), section
3.4.

Differs from the official code of DETR: padding is cut off before masks are resized, the ids of segments begin at 1 (0
means "no segment"), and stuff of one class stays one segment also after small segments were dropped.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Rule = Literal["detr", "maskformer"]
MIN_AREA = 5  # pixels of a segment in the original image; DETR's rule drops smaller ones
MIN_VISIBLE = 0.8  # of the pixels of a query's mask; MaskFormer's rule drops queries of which others hide more


def panoptic(
    rule: Rule, scores: Tensor, labels: Tensor, logits: Tensor, things: Sequence[bool], size: Sequence[int]
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Assign the pixels of an image to n queries.

    Args:
        rule: "detr" assigns each pixel to the query with the highest mask logit. "maskformer" assigns a pixel to the
            query with the highest product of score and mask probability, unless this probability is below 0.5, and
            drops queries whose masks are mostly hidden by others, which are duplicates.
        scores: (n,) score of the class of each query; the caller leaves out queries with low scores.
        labels: (n,) class index of each query.
        logits: (n, h, w) mask logits, without padding.
        things: whether a class, by index, is a thing; queries of the same stuff class form one segment.
        size: height and width of the original image.

    Returns:
        The segment ids (H, W) int64 of the original image, 0 where there is no segment, and for each segment a dict
        with `id`, `label` (class index), `score` and `area` (in pixels of the original image).
    """
    of_rule = _by_logit if rule == "detr" else _by_probability
    return of_rule(scores, labels, logits, things, size)


def _by_logit(
    scores: Tensor, labels: Tensor, logits: Tensor, things: Sequence[bool], size: Sequence[int]
) -> tuple[Tensor, list[dict[str, Any]]]:
    kept = torch.arange(len(scores), device=logits.device)
    while len(kept):
        first = _first_of_segment(labels[kept].tolist(), things)  # (n,) index of the segment's first query
        owners = _resize(first.to(logits.device)[logits[kept].argmax(0)], size)
        areas = owners.flatten().bincount(minlength=len(kept))
        large = (areas >= MIN_AREA)[first]
        if large.all():
            return _number(owners, scores[kept].tolist(), labels[kept].tolist())
        kept = kept[large.to(kept.device)]
    return torch.zeros(*size, dtype=torch.int64), []


def _by_probability(
    scores: Tensor, labels: Tensor, logits: Tensor, things: Sequence[bool], size: Sequence[int]
) -> tuple[Tensor, list[dict[str, Any]]]:
    if not len(scores):
        return torch.zeros(*size, dtype=torch.int64), []
    probabilities = logits.sigmoid()
    owners = (scores[:, None, None] * probabilities).argmax(0)  # (h, w)
    inside = probabilities >= 0.5  # (n, h, w)
    visible = (inside & (owners == torch.arange(len(scores), device=owners.device)[:, None, None])).sum((1, 2))
    kept = (visible > 0) & (visible >= MIN_VISIBLE * inside.sum((1, 2)))  # (n,)
    owners = owners.masked_fill(~(inside & kept[:, None, None]).gather(0, owners[None])[0], -1)
    chosen = kept.nonzero()[:, 0]
    index = torch.full((len(scores) + 1,), -1, device=owners.device)  # the last entry is that of no query
    index[chosen] = chosen[_first_of_segment(labels[chosen].tolist(), things).to(chosen.device)]
    return _number(_resize(index[owners], size), scores.tolist(), labels.tolist())


def _first_of_segment(labels: Sequence[int], things: Sequence[bool]) -> Tensor:
    """Return for each query the index of the first query of its segment: itself, or the first of its stuff class."""
    return torch.tensor([i if things[x] else labels.index(x) for i, x in enumerate(labels)], dtype=torch.int64)


def _resize(owners: Tensor, size: Sequence[int]) -> Tensor:
    """Resize indices (h, w) of queries to the height and width `size`, on the CPU."""
    return F.interpolate(owners[None, None].float(), size=tuple(size))[0, 0].long().cpu()


def _number(owners: Tensor, scores: Sequence[float], labels: Sequence[int]) -> tuple[Tensor, list[dict[str, Any]]]:
    """Number segments from 1, in the order of their first queries, whose index `owners` (H, W) holds; -1 = none."""
    areas = (owners + 1).flatten().bincount(minlength=len(scores) + 1)
    areas[0] = 0
    firsts = areas.nonzero()[:, 0]
    ids = torch.zeros_like(areas).index_put((firsts,), torch.arange(1, len(firsts) + 1))
    segments = [
        {"id": i, "label": labels[first - 1], "score": scores[first - 1], "area": int(areas[first])}
        for i, first in enumerate(firsts.tolist(), 1)
    ]
    return ids[owners + 1], segments
