"""Cross-entropy of target tokens with label smoothing (Szegedy et al. 2016, arXiv 1512.00567, section 7).

Vaswani et al. 2017 (arXiv 1706.03762, section 5.4) use a smoothing of 0.1.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.types import Fraction
from seq2seq.tokenizers.bpe import PAD


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """smoothing: the fraction of the target probability that is distributed uniformly over all V entries."""

    smoothing: Fraction


def cross_entropy(options: LossOptions, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The smoothed loss, and the loss without smoothing (detached, for perplexity): sums over real tokens, in nats.

    Logits (B, T, V), targets (B, T) int64 padded with 0 -> two scalars, at least fp32.
    """
    log_probabilities = _log_probabilities(logits)  # (B, T, V)
    plain = _negative_log_likelihoods(log_probabilities, targets).sum()
    if not options.smoothing:
        return plain, plain.detach()
    uniform = -(log_probabilities.mean(-1) * (targets != PAD)).sum()
    return (1 - options.smoothing) * plain + options.smoothing * uniform, plain.detach()


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of each target token in nats, without smoothing, 0 for padding: (B, T, V), (B, T) -> (B, T)."""
    return _negative_log_likelihoods(_log_probabilities(logits), targets)


def _log_probabilities(logits: Tensor) -> Tensor:
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def _negative_log_likelihoods(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    return -log_probabilities.gather(-1, targets[..., None])[..., 0] * (targets != PAD)
