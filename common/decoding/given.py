"""Given answers: how probable a model finds them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.decoding.contract import Decoder, SpecialIds, equal_prompts, finite, next_logits, without_finished


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
    if not len(source):
        return []
    if prompts is None:
        begin = torch.full((len(source),), special.begin, device=source.device)
        return _score(model, source, lengths, target, target_lengths, begin)
    scores: dict[int, tuple[float, int]] = {}
    for rows, group in equal_prompts(prompts, source.device):
        part = _score(model, source[rows], lengths[rows], target[rows], target_lengths[rows], group)
        scores |= zip(rows, part, strict=True)
    return [scores[row] for row in range(len(source))]


def _score(
    model: Decoder, source: Tensor, lengths: Tensor, target: Tensor, target_lengths: Tensor, prompts: Tensor
) -> list[tuple[float, int]]:
    """The same for prompts of one length, (B,) or (B, P)."""
    totals = torch.zeros(len(source), dtype=torch.float64)
    counts, live = target_lengths.cpu(), torch.arange(len(source))  # (B,), (R,): the unfinished targets
    state, latest = model.encode(source, lengths), prompts
    for n in range(int(counts.max())):
        state, rows = without_finished(model, state, counts[live] > n, source.device)
        live, latest = live[rows], latest[rows.to(latest.device)]
        logits, normaliser = next_logits(model, state, latest)
        latest = target[live.to(target.device), n]
        logs = logits.gather(1, latest[:, None]) - normaliser  # (R, 1)
        totals[live] += finite(logs.cpu().double())[:, 0]
    return list(zip(totals.tolist(), counts.tolist(), strict=True))
