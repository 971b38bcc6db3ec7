"""Bipartite matching of queries to objects (Carion et al. 2020, arXiv 2005.12872, section 3.1, equations 1 and 2)."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from common.types import NonNegativeFloat
from detr.criterion.boxes import pairwise_giou, to_xyxy


@dataclass(frozen=True, kw_only=True)
class MatcherOptions:
    """Weights of the three costs of taking a query for an object (appendix A.2: the loss's own weights)."""

    class_cost: NonNegativeFloat
    box_cost: NonNegativeFloat
    giou_cost: NonNegativeFloat


class Matches(NamedTuple):
    """The M chosen pairs of all layers and images, each an (M,) int64 tensor on the outputs' device."""

    layers: Tensor
    images: Tensor
    queries: Tensor
    targets: Tensor  # rows of the batch's labels and boxes


@torch.no_grad()
def costs(
    options: MatcherOptions, logits: Tensor, boxes_cxcywh: Tensor, labels: Tensor, target_cxcywh: Tensor
) -> Tensor:
    """What each query costs for each object of its image, over all layers at once.

    logits (L, B, Q, K+1), boxes_cxcywh (L, B, Q, 4); labels (B, T) and target_cxcywh (B, T, 4) padded to the largest
    count; boxes relative to the image -> (L, B, Q, T).
    """
    chosen = labels[None, :, None].expand(*logits.shape[:3], -1)  # (L, B, Q, T)
    probability = logits.softmax(-1).gather(-1, chosen)
    distance = torch.cdist(boxes_cxcywh, target_cxcywh.expand(len(logits), -1, -1, -1), p=1)  # (L, B, Q, T)
    overlap = pairwise_giou(to_xyxy(boxes_cxcywh), to_xyxy(target_cxcywh)[None])
    return options.box_cost * distance - options.class_cost * probability - options.giou_cost * overlap


def match(
    options: MatcherOptions,
    logits: Tensor,
    boxes_cxcywh: Tensor,
    labels: Tensor,
    target_cxcywh: Tensor,
    counts: list[int],
) -> Matches:
    """The cheapest one-to-one assignment of each layer and image.

    logits (L, B, Q, K+1), boxes_cxcywh (L, B, Q, 4); labels (T,) and target_cxcywh (T, 4) of all images one after
    another, `counts` of them in each. With more objects than queries, Q objects are matched. The costs go to the host
    in one copy, and the pairs come back in one.
    """
    most = max(counts, default=0)
    table: np.ndarray = np.zeros((4, 0), dtype=np.int64)
    if most:
        cost = costs(options, logits, boxes_cxcywh, *_padded(labels, target_cxcywh, counts))
        # A model that has diverged must reach the trainer's guard, which names the step, and not fail here.
        host = cost.float().nan_to_num(nan=1e8, posinf=1e8, neginf=-1e8).cpu().numpy()
        table = _assign(host, counts)
    return Matches(*torch.from_numpy(table).to(logits.device, non_blocking=True))


def _padded(labels: Tensor, boxes: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """(T,), (T, 4) of all images to (B, most), (B, most, 4), zero where an image has fewer."""
    image = np.repeat(np.arange(len(counts)), counts)
    place = np.concatenate([np.arange(count) for count in counts])
    where = torch.from_numpy(np.stack((image, place))).to(labels.device, non_blocking=True)
    shape = (len(counts), max(counts))
    padded_labels = labels.new_zeros(shape).index_put(tuple(where), labels)
    return padded_labels, boxes.new_zeros(*shape, 4).index_put(tuple(where), boxes)


def _assign(cost: np.ndarray, counts: list[int]) -> np.ndarray:
    """cost (L, B, Q, most) -> (4, M): layer, image, query and target row of each pair."""
    starts = np.cumsum([0, *counts[:-1]])
    rows = []
    for layer, of_layer in enumerate(cost):
        for image, count in enumerate(counts):
            queries, targets = linear_sum_assignment(of_layer[image, :, :count])
            same = np.full_like(queries, layer), np.full_like(queries, image)
            rows.append(np.stack((*same, queries, targets + starts[image])))
    return np.concatenate(rows, axis=1)
