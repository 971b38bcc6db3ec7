"""From mask logits to masks in pixels of the original image: of single detections, and of a panoptic segmentation.

Carion et al. 2020, arXiv 2005.12872, section 4.4 and appendix A.3. Kirillov et al. 2019 (arXiv 1801.00868) define
panoptic segmentation: each pixel belongs to at most one segment; "things" are countable, "stuff" is not.

Differs from the official code: padding is cut off before masks are resized, the ids of segments begin at 1 (0 means "no
segment"), and stuff of one class stays one segment also after small segments were dropped.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr.criterion.masks import resize_logits
from detr.data.masks import encode_arrays

MIN_AREA = 5  # pixels of a segment in the original image; smaller ones are dropped
MASKS_AT_ONCE = 16


def instance_masks(
    logits: Tensor, queries: Tensor, shape: Sequence[int], size: Sequence[int], original_size: Sequence[int]
) -> Tensor:
    """Compute the masks of D detections of an image from the mask logits (Q, H', W') of all its queries.

    `queries` (D,) are the detections' queries, `shape` is the padded (H, W) of the batch, `size` the height and width
    of the image without padding, and `original_size` those before resizing. Returns boolean (D, *original_size), True
    where the probability is above 0.5.
    """
    if not len(queries):
        return logits.new_zeros(0, *original_size, dtype=torch.bool)
    used, inverse = queries.unique(return_inverse=True)
    masks = [
        F.interpolate((resize_logits(logits[part], shape, size) > 0).byte()[None], size=tuple(original_size))[0].bool()
        for part in used.split(MASKS_AT_ONCE)
    ]
    return torch.cat(masks)[inverse]


def panoptic(
    scores: Tensor, labels: Tensor, logits: Tensor, things: Sequence[bool], size: Sequence[int]
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Assign each pixel of an image to the one of n queries with the highest mask logit.

    Args:
        scores: (n,) score of the class of each query; the caller leaves out queries with low scores.
        labels: (n,) class index of each query.
        logits: (n, h, w) mask logits, without padding.
        things: whether a class, by index, is a thing; queries of the same stuff class form one segment.
        size: height and width of the original image.

    Returns:
        The segment ids (H, W) int64 of the original image, 0 where there is no segment, and for each segment a dict
        with `id`, `label` (class index), `score` and `area` (in pixels of the original image).
    """
    kept = torch.arange(len(scores), device=logits.device)
    while len(kept):
        first = _first_of_segment(labels[kept].tolist(), things)  # (n,) index of the segment's first query
        owners = first.to(logits.device)[logits[kept].argmax(0)]  # (h, w)
        owners = F.interpolate(owners[None, None].float(), size=tuple(size))[0, 0].long().cpu()
        areas = owners.flatten().bincount(minlength=len(kept))
        large = (areas >= MIN_AREA)[first]
        if large.all():
            return _number(owners, areas, scores[kept].tolist(), labels[kept].tolist())
        kept = kept[large.to(kept.device)]
    return torch.zeros(*size, dtype=torch.int64), []


def resize_probabilities(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Resize the probabilities (n, h, w) of masks to the height and width `size` by bilinear interpolation."""
    if not len(masks):
        return masks.new_zeros(0, *size)
    return torch.cat([F.interpolate(part[None], size=tuple(size), mode="bilinear")[0]
                      for part in masks.split(MASKS_AT_ONCE)])  # fmt: skip


def encode(masks: Tensor | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Encode boolean masks (n, H, W) as COCO's compressed run-length codes, with strings for JSON; codes are kept."""
    if isinstance(masks, Tensor):
        return encode_arrays(masks.numpy())
    texts = [counts.decode() if isinstance(counts := code["counts"], bytes) else counts for code in masks]
    return [{"size": code["size"], "counts": text} for code, text in zip(masks, texts, strict=True)]


def number_pixels(masks: Tensor, scores: Tensor) -> Tensor:
    """Number the pixels of n masks (n, H, W) from 1 to n; where masks overlap, the one with the highest score counts.

    Returns int64 (H, W), 0 where there is no mask.
    """
    ids = torch.zeros(masks.shape[1:], dtype=torch.int64)
    for i in scores.argsort(stable=True).tolist():
        ids[masks[i]] = i + 1
    return ids


def colours_of(ids: Tensor) -> Tensor:
    """Convert ids (H, W) to the colours (3, H, W), uint8, of COCO's panoptic format: id = R + 256 G + 65536 B."""
    return torch.stack([ids >> shift & 255 for shift in (0, 8, 16)]).byte()


def _first_of_segment(labels: Sequence[int], things: Sequence[bool]) -> Tensor:
    """Return for each query the index of the first query of its segment: itself, or the first of its stuff class."""
    return torch.tensor([i if things[label] else labels.index(label) for i, label in enumerate(labels)])


def _number(
    owners: Tensor, areas: Tensor, scores: Sequence[float], labels: Sequence[int]
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Number the segments from 1, in the order of their first queries."""
    firsts = areas.nonzero()[:, 0]
    ids = torch.zeros_like(areas).index_put((firsts,), torch.arange(1, len(firsts) + 1))
    segments = [
        {"id": i, "label": labels[first], "score": scores[first], "area": int(areas[first])}
        for i, first in enumerate(firsts.tolist(), 1)
    ]
    return ids[owners], segments
