"""Beam search with the length penalties of Wu et al. 2016 (arXiv 1609.08144, equation 14).

As in "Attention Is All You Need" (Vaswani et al. 2017, arXiv 1706.03762, section 6.1).
"""

import math

import torch
from torch import Tensor

from common.decoding.contract import Decoder, Hypothesis, SpecialIds, forbid_tokens, next_logits, refuse_nan
from common.decoding.options import DecodingOptions


def beam_search(
    model: Decoder, source: Tensor, lengths: Tensor, prompts: Tensor, options: DecodingOptions, special: SpecialIds
) -> list[list[Hypothesis]]:
    """The best finished hypotheses of each source (B, S) after its prompt (B, P), by falling score.

    Of the 2 * beam best continuations of a sentence's hypotheses, which hold at least `beam` without EOS, those with
    EOS are finished if they are among the first `beam`, and the first `beam` without continue. All unfinished
    sentences have the same number of hypotheses W, 1 at first; impossible ones have a total of minus infinity. Where
    one step finishes more than the pool has room for, the best of all stay (in fairseq the earlier ones do).
    """
    limits, beam = options.limits(lengths), options.beam
    pools: list[list[Hypothesis]] = [[] for _ in source]
    live = torch.arange(len(source))  # (G,): the unfinished sentences
    totals = torch.zeros(len(source), 1, dtype=torch.float64)  # (G, W), falling along W
    words = torch.empty(len(source), 1, 0, dtype=torch.int64)  # (G, W, tokens after the prompt)
    state, latest = model.encode(source, lengths), prompts  # (G * W,), or the prompts at first
    while True:
        n, width = words.shape[2] + 1, words.shape[1]  # tokens of each hypothesis after this step; W
        at_limit = limits[live] == n
        logits, normaliser = next_logits(model, state, latest)
        must_end = at_limit & (options.at_limit == "end")
        forbid_tokens(logits, special.never, special.end, must_end.repeat_interleave(width))
        totals, parents, new = _continuations(logits, normaliser, totals, 2 * beam)
        finished = (new == special.end) | at_limit[:, None]
        for group, rank in (finished & (totals > -math.inf))[:, :beam].nonzero().tolist():
            tokens = [*words[group, parents[group, rank]].tolist(), int(new[group, rank])]
            pools[live[group]].append(hypothesis(tokens, float(totals[group, rank]), options, special))
        totals, ranks = totals.masked_fill(finished, -math.inf).topk(min(beam, totals.shape[1]))  # (G, W)
        states = zip(live.tolist(), totals[:, 0].tolist(), limits[live].tolist(), strict=True)
        over = [_over(pools[sentence], best, n, limit, options) for sentence, best, limit in states]
        if all(over):
            assert all(pools), "no token has any probability"
            return [pool[: options.candidates] for pool in pools]
        stays = (~torch.tensor(over)).nonzero()[:, 0]
        rows = parents.gather(1, ranks) + torch.arange(0, len(live) * width, width)[:, None]
        words = torch.cat([words.flatten(0, 1)[rows], new.gather(1, ranks)[:, :, None]], 2)[stays]
        live, totals, rows = live[stays], totals[stays], rows[stays].flatten()  # (G',), (G', W), (G' * W,)
        if len(rows) != len(logits) or not torch.equal(rows, torch.arange(len(rows))):
            state = model.reorder(state, rows.to(source.device))
        latest = words[:, :, -1].flatten().to(source.device)


def hypothesis(tokens: list[int], total: float, options: DecodingOptions, special: SpecialIds) -> Hypothesis:
    """An answer of these tokens, its end among them, with the score of its total log probability."""
    ended = tokens[-1] == special.end
    return Hypothesis(tokens[:-1] if ended else tokens, total / options.divisor(len(tokens)), total, ended)


def _continuations(logits: Tensor, normaliser: Tensor, totals: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` best continuations of each sentence (or all, if there are fewer), (G, K) on the CPU, best first.

    From logits (G * W, V), their normaliser (G * W, 1) and the hypotheses' log probabilities (G, W): log probability,
    number of the hypothesis in its sentence, and token. A row's own best are enough to choose from: no (R, V) sums.
    """
    likeliest, tokens = logits.topk(min(count, logits.shape[1]))  # (G * W, k)
    logs = refuse_nan((likeliest - normaliser).cpu().double())
    sums = (totals.flatten()[:, None] + logs).view(len(totals), -1)  # (G, W * k)
    best, columns = sums.topk(min(count, sums.shape[1]))
    return best, columns // logs.shape[1], tokens.cpu().view(len(totals), -1).gather(1, columns)


def _over(pool: list[Hypothesis], best: float, n: int, limit: int, options: DecodingOptions) -> bool:
    """Whether a sentence is done; also cuts its pool to the best. `best`: of its live hypotheses of n tokens."""
    pool.sort(key=lambda hypothesis: -hypothesis.score)
    del pool[options.beam :]
    if n == limit or best == -math.inf:
        return True
    if len(pool) < options.beam or options.stop == "first":
        return len(pool) == options.beam
    return best / options.divisor(limit if options.stop == "never" else n) <= pool[-1].score
