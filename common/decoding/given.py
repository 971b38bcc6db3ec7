"""The scores of given answers, which are the log probabilities that a model assigns to them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.decoding.contract import Decoder, SpecialIds, group_by_length, next_logits, refuse_nan, remove_finished


@torch.no_grad()
def score(
    model: Decoder,
    source: Tensor,
    lengths: Tensor,
    target: Tensor,
    target_lengths: Tensor,
    special: SpecialIds,
    prompts: Sequence[Sequence[int]] | None = None,
) -> list[tuple[float, int]]:
    """Return for each target its log probability in nats and its length in tokens; both include the end.

    `source` (B, S) and `target` (B, T) are right-padded; `lengths` (B,) and `target_lengths` (B,) are their lengths.
    Every target ends with `special.end`, which its length includes. The tokens of `prompts`, by default
    `special.begin`, precede the targets and are not scored. Raises UserError if the model's probabilities are NaN.
    """
    scores: dict[int, tuple[float, int]] = {}
    for rows, latest in group_by_length(prompts or [[special.begin]] * len(source), source.device):
        totals = torch.zeros(len(rows), dtype=torch.float64)
        counts, live = target_lengths[rows].cpu(), torch.arange(len(rows))  # counts (B,); live (R,): unfinished targets
        state, tokens = model.encode(source[rows], lengths[rows]), target[rows]
        for n in range(int(counts.max())):
            state, remaining = remove_finished(model, state, counts[live] > n, source.device)
            live, latest = live[remaining], latest[remaining.to(latest.device)]
            _, log_probabilities = next_logits(model, state, latest)
            latest = tokens[live.to(tokens.device), n]
            chosen = log_probabilities.gather(1, latest[:, None])  # (R, 1)
            totals[live] += refuse_nan(chosen.cpu().double())[:, 0]
        scores |= zip(rows, zip(totals.tolist(), counts.tolist(), strict=True), strict=True)
    return [scores[row] for row in range(len(source))]
