"""Cross-entropy with label smoothing (Szegedy et al. 2016, arXiv 1512.00567, section 7) and with mixed labels."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.types import Fraction


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """smoothing: share of a target that is spread evenly over all classes."""

    smoothing: Fraction


def cross_entropy(
    options: LossOptions,
    logits: Tensor,
    labels: Tensor,
    other_labels: Tensor | None = None,
    shares: Tensor | None = None,
) -> Tensor:
    """Cross-entropy summed over the batch, in nats and at least fp32: logits (B, K), labels (B,) -> ().

    With `other_labels` (B,) and `shares` (B,), as from mixup and CutMix, a target holds `shares` of the label and the
    rest of the other label. Smoothing a mixed target equals mixing smoothed targets: both are linear.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    own = F.cross_entropy(logits, labels, reduction="none", label_smoothing=options.smoothing)  # (B,)
    if other_labels is None or shares is None:
        return own.sum()
    partner = F.cross_entropy(logits, other_labels, reduction="none", label_smoothing=options.smoothing)  # (B,)
    return (shares * own + (1 - shares) * partner).sum()
