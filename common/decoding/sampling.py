"""Greedy search and sampling, which extend each hypothesis by one token in every step, without a beam.

Top-k sampling is that of Fan et al. 2018 (arXiv 1805.04833), top-p that of Holtzman et al. 2020 (arXiv 1904.09751).
"""

from collections.abc import Callable, Sequence

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

SampleKey = tuple[int | str, int]  # a sentence's id and the index of the sample


def greedy_or_sample(
    model: Decoder,
    source: Tensor,
    lengths: Tensor,
    prompts: Tensor,
    options: DecodingOptions,
    special: SpecialIds,
    ids: Sequence[int | str],
    on_tokens: Callable[[Tensor, Tensor], None] | None = None,
) -> list[list[Hypothesis]]:
    """For each source (B, S) and prompt (B, P), find the greedy hypothesis or `options.candidates` samples.

    `lengths` (B,) are the lengths of the sources. `ids` are the ids of the B sentences. Each sample is seeded by
    `options.seed`, the sentence's id and the index of the sample. After each step, `on_tokens` receives the indices of
    the unfinished hypotheses (R,), in 0 to B * candidates - 1, and their new tokens (R,), on the CPU.
    """
    count = options.candidates
    keys = [(sentence_id, index) for sentence_id in ids for index in range(count)]
    source, lengths, prompts = (x.repeat_interleave(count, 0) for x in (source, lengths, prompts))
    limits = options.limits(lengths)
    uniforms = _sample_uniforms(limits, options, keys) if options.method == "sample" else None
    hypotheses: dict[int, Hypothesis] = {}
    live = torch.arange(len(source))  # (R,): the indices of the unfinished hypotheses
    totals = torch.zeros(len(source), dtype=torch.float64)  # (R,): log probabilities
    tokens = torch.empty(len(source), 0, dtype=torch.int64)  # (R, tokens after the prompt)
    state, latest = model.encode(source, lengths), prompts  # `latest`: last tokens (R,), or the prompts at first
    while len(live):
        n = tokens.shape[1] + 1  # tokens of each hypothesis after this step
        at_limit = limits[live] == n
        logits, log_probabilities = next_logits(model, state, latest)
        forbid_tokens(logits, special.never, special.end, at_limit & (options.at_limit == "end"))
        if uniforms is None:
            new = logits.max(-1).indices  # (R,); the first of equal logits, as of `argmax`, in half its time on a CPU
        else:
            new = sample_tokens(logits, uniforms[live, n - 1], options)
        chosen = log_probabilities.gather(1, new[:, None])  # (R, 1)
        totals = totals + refuse_nan(chosen.cpu().double())[:, 0]
        tokens = torch.cat([tokens, new.cpu()[:, None]], 1)
        if on_tokens is not None:
            on_tokens(live, tokens[:, -1])
        finished = at_limit | (tokens[:, -1] == special.end)
        for row in finished.nonzero()[:, 0].tolist():
            hypotheses[int(live[row])] = hypothesis(tokens[row].tolist(), float(totals[row]), options, special)
        state, rows = remove_finished(model, state, ~finished, source.device)
        live, totals, tokens = live[rows], totals[rows], tokens[rows]
        latest = tokens[:, -1].to(source.device)
    return [[hypotheses[row] for row in range(start, start + count)] for start in range(0, len(source), count)]


def sample_tokens(logits: Tensor, uniforms: Tensor, options: DecodingOptions) -> Tensor:
    """Sample a token (R,) for each row of logits (R, V), with one uniform random number in [0, 1) for each row: (R,).

    The candidates are the tokens that top-k and top-p retain, sorted by decreasing probability. Their probabilities are
    divided by their sum. The sample is the first candidate at which the cumulative probability exceeds the random
    number.
    """
    count = min(options.top_k or logits.shape[1], logits.shape[1])
    likeliest, tokens = (logits / options.temperature).topk(count)  # (R, k), decreasing
    probabilities = likeliest.softmax(-1)
    if options.top_p < 1:
        preceding = probabilities.cumsum(-1) - probabilities  # the sum over likelier tokens
        probabilities = probabilities.masked_fill(preceding >= options.top_p, 0)
    sums = probabilities.cumsum(-1)
    columns = torch.searchsorted(sums, uniforms.to(sums)[:, None] * sums[:, -1:], right=True)  # (R, 1)
    possible = (probabilities > 0).sum(-1, keepdim=True).clamp(min=1)  # the sum is 0 if the probabilities are NaN
    columns = columns.minimum(possible - 1)  # rounding may move a number near 1 beyond the last token
    return tokens.gather(1, columns)[:, 0]


def _sample_uniforms(limits: Tensor, options: DecodingOptions, keys: list[SampleKey]) -> Tensor:
    """Draw uniform random numbers in [0, 1): one row for each of `keys`, one column for each token (R, longest limit).

    `limits` (R,) are the maximum lengths of the samples. A row holds as many random numbers as its limit, followed by
    zeros.
    """
    generators = [generator(options.seed, "sample", *key) for key in keys]
    rows = [torch.rand(int(limit), generator=rng) for limit, rng in zip(limits, generators, strict=True)]
    return pad_sequence(rows, batch_first=True)
