"""One hypothesis at a time: greedy search and sampling, where a token is never taken back.

Top-k is Fan et al. 2018 (arXiv 1805.04833), top-p Holtzman et al. 2020 (arXiv 1904.09751).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from common.decoding.beam import hypothesis
from common.decoding.contract import (
    Decoder,
    Hypothesis,
    SpecialIds,
    forbid_tokens,
    next_logits,
    refuse_nan,
    remove_finished,
)
from common.decoding.options import DecodingOptions
from common.machine.seeds import generator

SampleKey = tuple[int | str, int]  # a sentence's id and the number of the sample


def greedy_or_sample(
    model: Decoder,
    source: Tensor,
    lengths: Tensor,
    prompts: Tensor,
    options: DecodingOptions,
    special: SpecialIds,
    ids: Sequence[int | str],
) -> list[list[Hypothesis]]:
    """The hypotheses of each source (B, S) after its prompt (B, P): greedily, or by the chance of its id and number."""
    count = options.candidates
    names = [(name, number) for name in ids for number in range(count)]
    source, lengths, prompts = (x.repeat_interleave(count, 0) for x in (source, lengths, prompts))
    limits = options.limits(lengths)
    chance = _chances(limits, options, names) if options.method == "sample" else None
    hypotheses: dict[int, Hypothesis] = {}
    live = torch.arange(len(source))  # (R,): the unfinished sentences
    totals = torch.zeros(len(source), dtype=torch.float64)  # (R,)
    words = torch.empty(len(source), 0, dtype=torch.int64)  # (R, tokens after the prompt)
    state, latest = model.encode(source, lengths), prompts  # (R,), or the prompts at first
    while len(live):
        n = words.shape[1] + 1  # tokens of each hypothesis after this step
        at_limit = limits[live] == n
        logits, normaliser = next_logits(model, state, latest)
        forbid_tokens(logits, special.never, special.end, at_limit & (options.at_limit == "end"))
        new = logits.argmax(-1) if chance is None else sample_tokens(logits, chance[live, n - 1], options)  # (R,)
        logs = logits.gather(1, new[:, None]) - normaliser  # (R, 1)
        totals = totals + refuse_nan(logs.cpu().double())[:, 0]
        words = torch.cat([words, new.cpu()[:, None]], 1)
        over = at_limit | (words[:, -1] == special.end)
        for row in over.nonzero()[:, 0].tolist():
            hypotheses[int(live[row])] = hypothesis(words[row].tolist(), float(totals[row]), options, special)
        state, rows = remove_finished(model, state, ~over, source.device)
        live, totals, words = live[rows], totals[rows], words[rows]
        latest = words[:, -1].to(source.device)
    return [[hypotheses[row] for row in range(start, start + count)] for start in range(0, len(source), count)]


def sample_tokens(logits: Tensor, chance: Tensor, options: DecodingOptions) -> Tensor:
    """The token (R,) of each row of logits (R, V) at which the summed probability passes `chance` (R,) in [0, 1)."""
    count = min(options.top_k or logits.shape[1], logits.shape[1])
    likeliest, words = (logits / options.temperature).topk(count)  # (R, k), falling
    shares = likeliest.softmax(-1)
    if options.top_p < 1:
        likelier = shares.cumsum(-1) - shares  # the sum of the tokens before
        shares = shares.masked_fill(likelier >= options.top_p, 0)
    sums = shares.cumsum(-1)
    columns = torch.searchsorted(sums, chance.to(sums)[:, None] * sums[:, -1:], right=True)  # (R, 1)
    possible = (shares > 0).sum(-1, keepdim=True).clamp(min=1)  # 0 where they are not numbers
    return words.gather(1, columns.minimum(possible - 1))[:, 0]  # a chance of almost 1 may round up to the whole sum


def _chances(limits: Tensor, options: DecodingOptions, names: list[SampleKey]) -> Tensor:
    """Uniform random numbers in [0, 1), one for each token that a row may have: (B, longest limit)."""
    seeds = [generator(options.seed, "sample", *name) for name in names]
    rows = [torch.rand(int(limit), generator=seed) for limit, seed in zip(limits, seeds, strict=True)]
    return pad_sequence(rows, batch_first=True)
