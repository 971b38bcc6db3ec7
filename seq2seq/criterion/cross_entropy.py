"""Cross-entropy of target tokens with label smoothing (Szegedy et al. 2016, arXiv 1512.00567, section 7).

Vaswani et al. 2017 (arXiv 1706.03762, section 5.4) use a smoothing of 0.1.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.types import Fraction, NonNegativeFloat
from seq2seq.tokenizers.bpe import PAD

# A vocabulary entry whose log probability is below this value counts as masked. Imported models mask entries by logits
# of -1e9 (seq2seq/importing/layouts.py).
MASKED_LOG_PROBABILITY = -1e8


@dataclass(frozen=True, kw_only=True)
class SimCutOptions:
    """Options of SimCut (Gao et al. 2022, arXiv 2206.02368), a term of the loss.

    weight: the term's factor, alpha in the paper, which uses 3; 0 = no SimCut. With SimCut, a step computes twice as
        many tokens.
    cutoff: the probability with which the embedding of a token is cut, p_cut in the paper, which uses 0.05.
    """

    weight: NonNegativeFloat
    cutoff: Fraction


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Options of the loss.

    smoothing: the fraction of the target probability that is distributed uniformly over all vocabulary entries, or over
        the unmasked ones if the model masks entries.
    simcut: see SimCutOptions; None = no SimCut.
    """

    smoothing: Fraction
    simcut: SimCutOptions | None = None  # users' tasks and their yaml may be older than this key


def cross_entropy(
    options: LossOptions, logits: Tensor, targets: Tensor, *, masked_entries: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the loss with smoothing, and without it (detached, for perplexity), in nats.

    Logits (B, T, V), targets (B, T) int64 padded with 0 -> two scalars, at least fp32: sums over the tokens that are
    not padding. `masked_entries` is whether the model masks vocabulary entries by logits of about -1e9. If it is true,
    smoothing omits these entries. False saves the time and memory of looking for them.
    """
    log_probabilities = log_softmax(logits)  # (B, T, V)
    plain = _negative_log_likelihoods(log_probabilities, targets).sum()
    if not options.smoothing:
        return plain, plain.detach()
    means = _mean_of_unmasked(log_probabilities) if masked_entries else log_probabilities.mean(-1)  # (B, T)
    uniform = -(means * (targets != PAD)).sum()
    return (1 - options.smoothing) * plain + options.smoothing * uniform, plain.detach()


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Each target token's loss in nats, without smoothing; 0 for padding: (B, T, V), (B, T) int64 -> (B, T)."""
    return _negative_log_likelihoods(log_softmax(logits), targets)


def _mean_of_unmasked(log_probabilities: Tensor) -> Tensor:
    """The mean over unmasked entries, (B, T, V) -> (B, T); without masked entries, it equals `mean(-1)` bit for bit."""
    masked = log_probabilities < MASKED_LOG_PROBABILITY
    entries = log_probabilities.shape[-1]
    return log_probabilities.masked_fill(masked, 0).mean(-1) * (entries / (entries - masked.sum(-1)))


def log_softmax(logits: Tensor) -> Tensor:
    """The logarithms of the probabilities, in fp32 or higher: (..., V) -> (..., V)."""
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def _negative_log_likelihoods(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    # Losses at padding are set to 0 and not multiplied by 0. If PAD is masked, its logit is -inf in fp16 and its loss
    # is infinite. Infinity times 0 would be NaN.
    return -log_probabilities.gather(-1, targets[..., None])[..., 0].masked_fill(targets == PAD, 0)
