"""Given answers: how probable a model finds them."""

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
    """Log probability in nats of each target (B, T) with its end, and its number of tokens, `target_lengths` (B,).

    `prompts`, which are not scored, are what the targets continue; see `common.decoding.decode.decode`.
    """
    scores: dict[int, tuple[float, int]] = {}
    for rows, latest in group_by_length(prompts or [[special.begin]] * len(source), source.device):
        totals = torch.zeros(len(rows), dtype=torch.float64)
        counts, live = target_lengths[rows].cpu(), torch.arange(len(rows))  # (B,), (R,): the unfinished targets
        state, words = model.encode(source[rows], lengths[rows]), target[rows]
        for n in range(int(counts.max())):
            state, remaining = remove_finished(model, state, counts[live] > n, source.device)
            live, latest = live[remaining], latest[remaining.to(latest.device)]
            logits, normaliser = next_logits(model, state, latest)
            latest = words[live.to(words.device), n]
            logs = logits.gather(1, latest[:, None]) - normaliser  # (R, 1)
            totals[live] += refuse_nan(logs.cpu().double())[:, 0]
        scores |= zip(rows, zip(totals.tolist(), counts.tolist(), strict=True), strict=True)
    return [scores[row] for row in range(len(source))]
