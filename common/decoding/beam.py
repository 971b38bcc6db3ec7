"""Beam search as in Vaswani et al. 2017 (arXiv 1706.03762, section 6.1).

The length penalty "gnmt" is that of Wu et al. 2016 (arXiv 1609.08144, equation 14).
"""

import math

import torch
from torch import Tensor

from common.decoding.contract import Decoder, Hypothesis, SpecialIds, forbid_tokens, next_logits, refuse_nan
from common.decoding.options import DecodingOptions


def beam_search(
    model: Decoder, source: Tensor, lengths: Tensor, prompts: Tensor, options: DecodingOptions, special: SpecialIds
) -> list[list[Hypothesis]]:
    """Return the best finished hypotheses of each source (B, S), by decreasing score, at most `options.candidates`.

    `prompts` (B, P) are the first tokens of the answers; `lengths` (B,) are the lengths of the sources.

    In each step, the 2 * beam best continuations of a sentence's hypotheses are considered. At least `beam` of them do
    not end with EOS, because only one continuation of each hypothesis does. A continuation that ends with EOS becomes a
    finished hypothesis if it is among the `beam` best. The `beam` best continuations that do not end with EOS are the
    hypotheses of the next step. At the maximum length, the `beam` best continuations become finished hypotheses, with
    or without EOS.

    The tensors hold W hypotheses for each unfinished sentence; W is 1 in the first step. If a sentence has fewer than W
    hypotheses, they are followed by placeholders with a log probability of minus infinity.

    Differs: if a sentence has more than `beam` finished hypotheses, the `beam` best are kept; fairseq keeps the
    earliest.
    """
    limits, beam = options.limits(lengths), options.beam
    pools: list[list[Hypothesis]] = [[] for _ in source]  # the finished hypotheses of each sentence
    live = torch.arange(len(source))  # (G,): the indices of the unfinished sentences
    totals = torch.zeros(len(source), 1, dtype=torch.float64)  # (G, W): log probabilities, decreasing along W
    tokens = torch.empty(len(source), 1, 0, dtype=torch.int64)  # (G, W, tokens after the prompt)
    # `latest`: the last token of each hypothesis (G * W,); in the first step, the prompts (B, P)
    state, latest = model.encode(source, lengths), prompts
    while True:
        n, width = tokens.shape[2] + 1, tokens.shape[1]  # n: length of a hypothesis after this step; width: W
        at_limit = limits[live] == n
        logits, log_probabilities = next_logits(model, state, latest)
        must_end = at_limit & (options.at_limit == "end")
        forbid_tokens(logits, special.never, special.end, must_end.repeat_interleave(width))
        totals, parents, new = _continuations(logits, log_probabilities, totals, 2 * beam)
        finished = (new == special.end) | at_limit[:, None]
        for group, rank in (finished & (totals > -math.inf))[:, :beam].nonzero().tolist():
            answer = [*tokens[group, parents[group, rank]].tolist(), int(new[group, rank])]
            pool = pools[int(live[group])]
            pool.append(hypothesis(answer, float(totals[group, rank]), options, special))
            pool.sort(key=lambda hypothesis: -hypothesis.score)  # stable: of equal scores, the earlier first
            del pool[beam:]
        totals, ranks = totals.masked_fill(finished, -math.inf).topk(min(beam, totals.shape[1]))  # (G, W)
        complete = []
        for sentence, best, limit in zip(live.tolist(), totals[:, 0].tolist(), limits[live].tolist(), strict=True):
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
    """Make a hypothesis from its tokens after the prompt, and the sum `total` of their log probabilities in nats.

    If the last token is the end, it is removed, but it still counts in the length penalty.
    """
    ended = tokens[-1] == special.end
    return Hypothesis(tokens[:-1] if ended else tokens, total / options.divisor(len(tokens)), total, ended)


def _continuations(
    logits: Tensor, log_probabilities: Tensor, totals: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The K best continuations of each sentence, best first; K is at most `count`.

    G is the number of sentences, W the number of hypotheses of each sentence, and V the size of the vocabulary. Takes
    logits (G * W, V), which are minus infinity for forbidden tokens, log probabilities (G * W, V) of all tokens, and
    the hypotheses' log probabilities `totals` (G, W). Returns three tensors (G, K) on the CPU: the log probability of
    each continuation, the index (0 to W - 1) of the hypothesis that it continues, and its new token. Only the `count`
    likeliest tokens of each hypothesis are considered, not all V.
    """
    likeliest, tokens = logits.topk(min(count, logits.shape[1]))  # (G * W, k)
    chosen = log_probabilities.gather(1, tokens).masked_fill_(likeliest == -math.inf, -math.inf)
    sums = (totals.flatten()[:, None] + refuse_nan(chosen.cpu().double())).view(len(totals), -1)  # (G, W * k)
    best, columns = sums.topk(min(count, sums.shape[1]))
    return best, columns // tokens.shape[1], tokens.cpu().view(len(totals), -1).gather(1, columns)


def _is_complete(pool: list[Hypothesis], best: float, n: int, limit: int, options: DecodingOptions) -> bool:
    """Whether the search for a sentence ends after n tokens.

    It ends if n is the maximum length `limit`, if no unfinished hypothesis is left, or if the rule `options.stop` is
    met. `pool` holds the best finished hypotheses, sorted by decreasing score. `best` is the highest log probability of
    an unfinished hypothesis.
    """
    if n == limit or best == -math.inf:
        return True
    if len(pool) < options.beam or options.stop == "first":
        return len(pool) == options.beam
    return best / options.divisor(limit if options.stop == "never" else n) <= pool[-1].score
