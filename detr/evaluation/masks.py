"""From mask logits to the masks of single detections in pixels of the original image, and their codes and colours.

Carion et al. 2020, arXiv 2005.12872, section 4.4. panoptic_segments.py computes panoptic segmentations.

Differs from the official code: padding is cut off before masks are resized.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr.criterion.masks import resize_logits
from detr.data.masks import encode_arrays

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
