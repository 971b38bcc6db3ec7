"""Beam search as in Vaswani et al. 2017 (arXiv 1706.03762, section 6.1).

Length penalties are those of Wu et al. 2016 (arXiv 1609.08144, equation 14).
"""

import math

import torch
from torch import Tensor

from common.decoding.contract import Decoder, Hypothesis, SpecialIds, forbid_tokens, next_logits, refuse_nan
from common.decoding.options import DecodingOptions


def beam_search(
    model: Decoder, source: Tensor, lengths: Tensor, prompts: Tensor, options: DecodingOptions, special: SpecialIds
) -> list[list[Hypothesis]]:
    """The best finished hypotheses of each source (B, S) after its prompt (B, P), by decreasing score.

    Each step takes the 2 * beam best continuations of a sentence's hypotheses, of which at least `beam` do not end with
    EOS. Those that end are finished if they are among the first `beam`; the first `beam` others are continued. All
    unfinished sentences have the same number of hypotheses W, initially 1; impossible hypotheses have a log probability
    of minus infinity.

    Differs: if a sentence has more than `beam` finished hypotheses, the best are kept (in fairseq the earliest).
    """
    limits, beam = options.limits(lengths), options.beam
    pools: list[list[Hypothesis]] = [[] for _ in source]  # the finished hypotheses of each sentence
    live = torch.arange(len(source))  # (G,): the unfinished sentences
    totals = torch.zeros(len(source), 1, dtype=torch.float64)  # (G, W): log probabilities, decreasing along W
    tokens = torch.empty(len(source), 1, 0, dtype=torch.int64)  # (G, W, tokens after the prompt)
    state, latest = model.encode(source, lengths), prompts  # latest tokens (G * W,), initially the prompts
    while True:
        n, width = tokens.shape[2] + 1, tokens.shape[1]  # tokens of each hypothesis after this step; W
        at_limit = limits[live] == n
        logits, normaliser = next_logits(model, state, latest)
        must_end = at_limit & (options.at_limit == "end")
        forbid_tokens(logits, special.never, special.end, must_end.repeat_interleave(width))
        totals, parents, new = _continuations(logits, normaliser, totals, 2 * beam)
        finished = (new == special.end) | at_limit[:, None]
        for group, rank in (finished & (totals > -math.inf))[:, :beam].nonzero().tolist():
            answer = [*tokens[group, parents[group, rank]].tolist(), int(new[group, rank])]
            pools[live[group]].append(hypothesis(answer, float(totals[group, rank]), options, special))
        totals, ranks = totals.masked_fill(finished, -math.inf).topk(min(beam, totals.shape[1]))  # (G, W)
        complete = []
        for sentence, best, limit in zip(live.tolist(), totals[:, 0].tolist(), limits[live].tolist(), strict=True):
            pools[sentence] = sorted(pools[sentence], key=lambda hypothesis: -hypothesis.score)[:beam]
            complete.append(_is_complete(pools[sentence], best, n, limit, options))
        if all(complete):
            assert all(pools), "no token has any probability"
            return [pool[: options.candidates] for pool in pools]
        incomplete = (~torch.tensor(complete)).nonzero()[:, 0]  # (G',)
        rows = parents.gather(1, ranks) + torch.arange(0, len(live) * width, width)[:, None]
        tokens = torch.cat([tokens.flatten(0, 1)[rows], new.gather(1, ranks)[:, :, None]], 2)[incomplete]
        live, totals = live[incomplete], totals[incomplete]  # (G',), (G', W)
        rows = rows[incomplete].flatten()  # (G, W) -> (G' * W,)
        if len(rows) != len(logits) or not torch.equal(rows, torch.arange(len(rows))):
            state = model.reorder(state, rows.to(source.device))
        latest = tokens[:, :, -1].flatten().to(source.device)


def hypothesis(tokens: list[int], total: float, options: DecodingOptions, special: SpecialIds) -> Hypothesis:
    """The hypothesis with these tokens, which may include the end, and with their log probability `total`."""
    ended = tokens[-1] == special.end
    return Hypothesis(tokens[:-1] if ended else tokens, total / options.divisor(len(tokens)), total, ended)


def _continuations(logits: Tensor, normaliser: Tensor, totals: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The K best continuations of each sentence, (G, K) on the CPU, best first; K is at most `count`.

    From logits (G * W, V), their normaliser (G * W, 1) and the hypotheses' log probabilities (G, W): log probability,
    index of the hypothesis in its sentence, and token. Only the best tokens of each row are candidates, not all V.
    """
    likeliest, tokens = logits.topk(min(count, logits.shape[1]))  # (G * W, k)
    log_probabilities = refuse_nan((likeliest - normaliser).cpu().double())
    sums = (totals.flatten()[:, None] + log_probabilities).view(len(totals), -1)  # (G, W * k)
    best, columns = sums.topk(min(count, sums.shape[1]))
    return best, columns // tokens.shape[1], tokens.cpu().view(len(totals), -1).gather(1, columns)


def _is_complete(pool: list[Hypothesis], best: float, n: int, limit: int, options: DecodingOptions) -> bool:
    """Whether the search for a sentence ends after n tokens, by `options.stop`.

    `pool` are its best finished hypotheses, sorted; `best` is the highest log probability of its unfinished ones.
    """
    if n == limit or best == -math.inf:
        return True
    if len(pool) < options.beam or options.stop == "first":
        return len(pool) == options.beam
    return best / options.divisor(limit if options.stop == "never" else n) <= pool[-1].score
