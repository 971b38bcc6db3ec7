"""SimCut: the output distributions of a sentence pair and of the same pair with cut tokens shall agree.

Gao et al. 2022, "Bi-SimCut: A Simple Strategy for Boosting Neural Machine Translation", arXiv 2206.02368.
"""

from torch import Tensor

from seq2seq.criterion.cross_entropy import MASKED_LOG_PROBABILITY, log_softmax
from seq2seq.tokenizers.bpe import PAD


def divergence(logits: Tensor, cut_logits: Tensor, targets: Tensor, *, masked_entries: bool = False) -> Tensor:
    """The divergence KL(original || cut) in nats, a scalar of at least fp32: summed over tokens that are not padding.

    Both logits are (B, T, V), without and with cut tokens; the targets (B, T) int64 are padded with 0. Both
    distributions get a gradient ("bidirectional backpropagation" in the paper, which found a stopped gradient to be
    worse). `masked_entries` is as in `cross_entropy`.
    """
    original, cut = log_softmax(logits), log_softmax(cut_logits)  # (B, T, V)
    differences = original - cut
    if masked_entries:  # in fp16, both are -inf, and the difference is NaN
        differences = differences.masked_fill(original < MASKED_LOG_PROBABILITY, 0)
    return ((original.exp() * differences).sum(-1) * (targets != PAD)).sum()
