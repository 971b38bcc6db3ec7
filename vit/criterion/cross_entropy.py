"""Cross-entropy with label smoothing (Szegedy et al. 2016, arXiv 1512.00567, section 7) and with mixed labels."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.types import Fraction


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """smoothing: how much of a label is spread over all classes evenly."""

    smoothing: Fraction


def cross_entropy(
    options: LossOptions, logits: Tensor, labels: Tensor, other: Tensor | None = None, shares: Tensor | None = None
) -> Tensor:
    """The sum over the batch, in nats and at least fp32: logits (B, K), labels (B,) -> ().

    With `other` (B,) and `shares` (B,) a target is `shares` of the label and the rest of the other, as mixup and CutMix
    make it. Smoothing the mixed target is the same as mixing smoothed ones: both are linear.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    own = F.cross_entropy(logits, labels, reduction="none", label_smoothing=options.smoothing)  # (B,)
    if other is None or shares is None:
        return own.sum()
    others = F.cross_entropy(logits, other, reduction="none", label_smoothing=options.smoothing)
    return (shares * own + (1 - shares) * others).sum()
