"""Cross-entropy of target tokens with label smoothing (Szegedy et al. 2016, arXiv 1512.00567, section 7).

Vaswani et al. 2017 (arXiv 1706.03762, section 5.4) use it with 0.1.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.types import Fraction
from seq2seq.tokenizers.bpe import PAD


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """smoothing: the share of a target's probability that is spread evenly over all V entries, its own among them."""

    smoothing: Fraction


def cross_entropy(options: LossOptions, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the real target tokens, in nats: the smoothed loss, and the plain one (detached) for perplexities.

    Logits (B, T, V), targets (B, T) int64, padded with 0 -> two scalars, at least fp32.
    """
    logs = _logs(logits)  # (B, T, V)
    plain = _chosen(logs, targets).sum()
    if not options.smoothing:
        return plain, plain.detach()
    spread = -(logs.mean(-1) * (targets != PAD)).sum()
    return (1 - options.smoothing) * plain + options.smoothing * spread, plain.detach()


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Of each target token in nats, without smoothing, zero for padding: (B, T, V), (B, T) -> (B, T)."""
    return _chosen(_logs(logits), targets)


def _logs(logits: Tensor) -> Tensor:
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def _chosen(logs: Tensor, targets: Tensor) -> Tensor:
    return -logs.gather(-1, targets[..., None])[..., 0] * (targets != PAD)
