"""The loss of promptable masks (Kirillov et al. 2023, arXiv 2304.02643, appendix A): focal, dice and predicted IoU."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from common.types import Fraction, NonNegativeFloat
from detr.criterion.terms import sigmoid_focal


@dataclass(frozen=True, kw_only=True)
class MaskLossOptions:
    """The weights of the terms, and the parameters of the focal loss (Lin et al. 2017, arXiv 1708.02002).

    `others` is the total weight of the masks of an ambiguous prompt that are not the best; the best one has the weight
    1 - `others`. SAM has 0: a mask that is never the best then learns nothing. A small number lets all masks learn, and
    they still specialise (Rupprecht et al. 2017, arXiv 1612.00197, equation 7).
    """

    focal_weight: NonNegativeFloat
    dice_weight: NonNegativeFloat
    iou_weight: NonNegativeFloat
    focal_alpha: Fraction  # weight of an object's cells; that of the other cells is 1 - focal_alpha
    focal_gamma: NonNegativeFloat
    others: Fraction


class MaskLosses(NamedTuple):
    """The terms of each of N prompts, in fp32 or more, without their weights."""

    focal: Tensor  # (N,)
    dice: Tensor  # (N,)
    iou: Tensor  # (N,) squared error of the predicted IoU


def mask_losses(
    logits: Tensor, predicted_ious: Tensor, targets: Tensor, real: Tensor, options: MaskLossOptions
) -> MaskLosses:
    """Compute the terms of N prompts with k masks each, mainly of the mask with the lowest loss (see `others`).

    The error of the predicted IoU is the mean over all k masks. A term of a prompt depends on nothing but this prompt.

    Args:
        logits: (N, k, M, M).
        predicted_ious: (N, k).
        targets: (N, M, M) boolean masks of the objects.
        real: (N, M, M) boolean, False in the padding of the prompts' images, which does not count.
        options: weights and parameters.
    """
    wide = logits.float() if logits.dtype.itemsize < 4 else logits
    focal, dice = _focal(wide, targets, real, options), _dice(wide, targets, real)  # (N, k) each
    best = (options.focal_weight * focal + options.dice_weight * dice).detach().argmin(1, keepdim=True)  # (N, 1)
    actual = ious(logits > 0, targets, real)
    squared = (predicted_ious.to(wide.dtype) - actual.to(wide.dtype)).square().mean(1)
    weights = _mask_weights(best, logits.shape[1], options.others).to(wide.dtype)  # (N, k)
    return MaskLosses((focal * weights).sum(1), (dice * weights).sum(1), squared)


def ious(masks: Tensor, targets: Tensor, real: Tensor) -> Tensor:
    """IoU of k masks with each prompt's object: boolean (N, k, M, M), (N, M, M), (N, M, M) -> (N, k).

    The IoU of two empty masks is 0.
    """
    inside, targets = masks & real[:, None], (targets & real)[:, None]
    both, either = ((a).flatten(2).sum(2) for a in (inside & targets, inside | targets))
    return both / either.clamp(min=1)


def _mask_weights(best: Tensor, masks: int, others: float) -> Tensor:
    """The weights of k masks, of which `best` (N, 1) is the index of the best one: (N, k), each row sums to 1."""
    if masks == 1:
        return torch.ones_like(best)
    is_best = torch.arange(masks, device=best.device) == best
    return torch.where(is_best, 1 - others, others / (masks - 1))


def _focal(logits: Tensor, targets: Tensor, real: Tensor, options: MaskLossOptions) -> Tensor:
    """The focal loss, averaged over the cells in the image: (N, k)."""
    objects = targets[:, None].to(logits.dtype).expand_as(logits)
    inside = real[:, None].to(logits.dtype)
    losses = sigmoid_focal(logits, objects, options.focal_alpha, options.focal_gamma) * inside
    return losses.flatten(2).sum(2) / inside.flatten(2).sum(2)


def _dice(logits: Tensor, targets: Tensor, real: Tensor) -> Tensor:
    """1 - (2 p . t + 1) / (|p| + |t| + 1) over the cells in the image, with sums |.|: (N, k). Milletari et al. 2016."""
    probability = logits.sigmoid() * real[:, None]
    objects = (targets & real)[:, None].to(logits.dtype)
    both = (probability * objects).flatten(2).sum(2)
    total = probability.flatten(2).sum(2) + objects.flatten(2).sum(2)
    return 1 - (2 * both + 1) / (total + 1)
