"""Cross-entropy with label smoothing (Szegedy et al. 2016, arXiv 1512.00567, section 7) and mixed labels (mixup)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.types import Fraction


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Options of the loss.

    smoothing: the fraction of each target's probability that is spread evenly over all classes.
    """

    smoothing: Fraction


def cross_entropy(
    options: LossOptions,
    logits: Tensor,
    labels: Tensor,
    other_labels: Tensor | None = None,
    shares: Tensor | None = None,
) -> Tensor:
    """Compute cross-entropy summed over the batch, in nats, in fp32 or higher: logits (B, K), labels (B,) -> ().

    For images mixed by mixup or CutMix, `other_labels` (B,) are the labels of the images that they are mixed with, and
    `shares` (B,) in [0, 1] are the weights of `labels`. The loss is shares * CE(labels) + (1 - shares) *
    CE(other_labels), where CE uses smoothed targets. This equals the cross-entropy with the mixed and smoothed target,
    since cross-entropy is linear in the target. For images that are not mixed, `other_labels` and `shares` are None.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    own = F.cross_entropy(logits, labels, reduction="none", label_smoothing=options.smoothing)  # (B,)
    if other_labels is None or shares is None:
        return own.sum()
    partner = F.cross_entropy(logits, other_labels, reduction="none", label_smoothing=options.smoothing)  # (B,)
    return (shares * own + (1 - shares) * partner).sum()
