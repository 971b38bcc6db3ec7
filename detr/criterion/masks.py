"""Mask logits in the resolution of an image, and the mask terms of the loss: focal and dice.

Carion et al. 2020, arXiv 2005.12872, section 4.4; the focal loss is from Lin et al. 2017 (arXiv 1708.02002), and the
dice loss from Milletari et al. 2016, V-Net (arXiv 1606.04797).

Differs: The official code resizes logits to the padded size of the batch, and padding counts as negatives; here, each
image is treated as if it were alone in its batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from detr.criterion.terms import Comparison, Term, sigmoid_focal


def resize_logits(logits: Tensor, shape: Sequence[int], size: Sequence[int]) -> Tensor:
    """Resize the mask logits (N, H', W') of an image to its height and width `size` without padding: (N, h, w).

    `shape` is the padded (H, W) of the image's batch. The cells in padding are cut off before the bilinear resampling.
    """
    stride = _stride(logits.shape[-2:], shape)
    rows, columns = ((side - 1) // stride + 1 for side in size)
    return F.interpolate(logits[:, None, :rows, :columns], size=tuple(size), mode="bilinear")[:, 0]


def _stride(map_shape: Sequence[int], shape: Sequence[int]) -> int:
    """Return the stride of a map (H', W') of images (H, W), a power of two; H' = ceil(H / stride), likewise for W'.

    If H' = W' = 1, several strides are possible, and the result does not matter.
    """
    stride = 1
    while any((side - 1) // stride + 1 > cells for side, cells in zip(shape, map_shape, strict=True)):
        stride *= 2
    return stride


def compare_masks(comparison: Comparison) -> list[tuple[Tensor, Tensor]]:
    """Return the mask logits and the masks (m, h, w) of the matched pairs of each image, in the image's resolution."""
    if comparison.mask_pairs is None:
        comparison.mask_pairs = _mask_pairs(comparison)
    return comparison.mask_pairs


def _mask_pairs(comparison: Comparison) -> list[tuple[Tensor, Tensor]]:
    targets = comparison.targets
    assert targets.masks is not None and targets.sizes is not None
    _, images, _ = comparison.rows
    logits, masks = comparison.answers("masks"), comparison.objects(targets.masks)  # (M, H', W'), (M, H, W)
    pairs = []
    for image, (height, width) in enumerate(targets.sizes.tolist()):
        mine = images == image
        resized = resize_logits(logits[mine], masks.shape[-2:], (height, width))
        pairs.append((resized, masks[mine][:, :height, :width].to(resized.dtype)))
    return pairs


@dataclass(frozen=True)
class MaskFocal(Term):
    """The sigmoid focal loss of the masks, averaged over the pixels of the image."""

    alpha: float = 0.25  # as in the official code, for every classification
    gamma: float = 2.0
    name = "mask"
    reads = "masks"
    layers = "last"

    def __call__(self, comparison: Comparison) -> Tensor:
        """See Term."""
        losses = [
            sigmoid_focal(logits, truth, self.alpha, self.gamma).mean((1, 2)).sum()
            for logits, truth in compare_masks(comparison)
        ]
        return torch.stack(losses).sum()[None]


class Dice(Term):
    """One minus the dice coefficient of the predicted mask (as probabilities) and the object's mask.

    1 is added to numerator and denominator, so that the loss of an empty prediction of an empty mask is 0.
    """

    name = "dice"
    reads = "masks"
    layers = "last"

    def __call__(self, comparison: Comparison) -> Tensor:
        """See Term."""
        losses = []
        for logits, truth in compare_masks(comparison):
            probability = logits.sigmoid()
            overlap, total = (probability * truth).sum((1, 2)), (probability + truth).sum((1, 2))
            losses.append((1 - (2 * overlap + 1) / (total + 1)).sum())
        return torch.stack(losses).sum()[None]
