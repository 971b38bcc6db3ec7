"""From a model's next-token probabilities to translations: greedy search, beam search, sampling, and given pairs.

Beam search with the length penalties of Wu et al. 2016 (arXiv 1609.08144, equation 14), as in "Attention Is All You
Need" (Vaswani et al. 2017, arXiv 1706.03762, section 6.1); top-k from Fan et al. 2018 (arXiv 1805.04833), top-p from
Holtzman et al. 2020 (arXiv 1904.09751). Any model that speaks `Decoder` can be searched.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from common.errors import UserError
from common.machine.seeds import generator
from common.types import Count, NonNegativeFloat, Positive, PositiveFloat, Range
from seq2seq.tokenizers.bpe import BOS, EOS, PAD

Share = Annotated[float, Range(above=0.0, high=1.0)]


class Decoder(Protocol):
    """What decoding asks of a model. A state is the model's own: it is handed back as it came, and used once.

    Sentences are in the batch with equally many rows each (one, or one for each hypothesis of a beam), those of one
    sentence side by side, before and after `reorder`: what belongs to a source need not be kept for every row.
    """

    def encode(self, source: Tensor, lengths: Tensor) -> Any:
        """The state of B rows with no token yet, from sources (B, S) int64 right-padded and their lengths (B,)."""

    def step(self, state: Any, tokens: Tensor) -> Tensor:
        """Append a token to every row, (R,) int64, BOS first -> logits or log probabilities of the next (R, V).

        The state is extended in place. The result is the caller's, who writes into it.
        """

    def reorder(self, state: Any, rows: Tensor) -> Any:
        """The state of these rows, (R',) int64: some repeated, some left out."""


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How translations are looked for. Lengths count tokens with EOS.

    method: "greedy", "beam", "sample" (a token at random by its probability), or "given" (scores given translations).
    beam: how many hypotheses of a sentence are followed at once.
    penalty: what a hypothesis's log probability is divided by, for n tokens: "gnmt" ((5 + n) / 6)^alpha, "average"
        n^alpha (fairseq's, Marian's and transformers' length penalty), "none" 1.
    alpha: the penalty's exponent; 0 is none.
    stop: what ends a sentence that has `beam` finished hypotheses: "first" just that (fairseq's rule, transformers'
        early_stopping=True); "bound" that the best unfinished one would not beat the worst of these if it ended where
        it is (early_stopping=False; longer ones may yet be better); "never" that it would not even if it went on to
        the limit and lost no more probability (early_stopping="never"; nothing in reach of the beam is missed).
    candidates: how many translations of each sentence are returned, at most: of the beam the best, of samples as drawn.
    longest_factor, longest_extra: a translation of S source tokens has at most longest_factor * S + longest_extra.
    at_limit: what the last token in the limit is: "end", always EOS at its own probability, as in fairseq; or "cut",
        any, which leaves a translation without its end, as in transformers.
    temperature: logits are divided by it before a token is drawn.
    top_k: only this many of the likeliest tokens are drawn from; 0 = all.
    top_p: only from the likeliest tokens that have this probability together; 1 = all.
    seed: what is drawn is a function of it and of a sentence's id, whatever else is in the batch.
    attention: also give the last layer's cross-attention of the best translation, for pictures.
    """

    method: Literal["greedy", "beam", "sample", "given"]
    beam: Positive
    penalty: Literal["gnmt", "average", "none"]
    alpha: NonNegativeFloat
    stop: Literal["first", "bound", "never"]
    candidates: Positive
    longest_factor: NonNegativeFloat
    longest_extra: Count
    at_limit: Literal["end", "cut"]
    temperature: PositiveFloat
    top_k: Count
    top_p: Share
    seed: int
    attention: bool

    def __post_init__(self) -> None:
        """Refuse to return more candidates than a method looks for."""
        most = {"greedy": 1, "given": 1, "beam": self.beam, "sample": self.candidates}[self.method]
        if self.candidates > most:
            advice = "raise task.predict.beam" if self.method == "beam" else "use task.predict.method=beam or sample"
            raise UserError(
                f"task.predict.candidates={self.candidates}: expected at most {most} with method={self.method}"
                f"{f' and beam={most}' if self.method == 'beam' else ''}; {advice}."
            )

    def divisor(self, tokens: int) -> float:
        """What the log probability of so many tokens is divided by."""
        form: float = {"gnmt": (5 + tokens) / 6, "average": tokens, "none": 1}[self.penalty]
        return form**self.alpha

    def limits(self, lengths: Tensor) -> Tensor:
        """The most tokens that a translation may have, for source lengths (B,): (B,) int64 on the CPU, at least 1."""
        most = [int(self.longest_factor * length) + self.longest_extra for length in lengths.tolist()]
        return torch.tensor(most, dtype=torch.int64).clamp(min=1)


class Hypothesis(NamedTuple):
    """One translation."""

    tokens: list[int]  # without BOS and EOS
    score: float  # log_probability over the length penalty
    log_probability: float  # of its tokens, EOS included, in nats
    ended: bool  # by EOS; False where it was cut at the limit


@torch.no_grad()
def decode(
    model: Decoder, source: Tensor, lengths: Tensor, options: DecodingOptions, ids: Sequence[int | str] | None = None
) -> list[list[Hypothesis]]:
    """Translations of sources (B, S) int64 with `lengths` (B,), one to `options.candidates` for each, best first.

    Samples come in the order of drawing and may repeat; `ids` name the sentences for the seed (default 0 to B - 1).
    Raises UserError when the model's probabilities are not numbers.
    """
    if not len(source):
        return []
    if options.method == "beam":
        return _search(model, source, lengths, options)
    draws = options.candidates
    names = [(name, number) for name in (range(len(source)) if ids is None else ids) for number in range(draws)]
    found = _walk(model, source.repeat_interleave(draws, 0), lengths.repeat_interleave(draws), options, names)
    return [found[start : start + draws] for start in range(0, len(found), draws)]


@torch.no_grad()
def score(
    model: Decoder, source: Tensor, lengths: Tensor, target: Tensor, target_lengths: Tensor
) -> list[tuple[float, int]]:
    """Log probability of each given target (B, T), EOS included, in nats; and its number of tokens (B,), as given."""
    if not len(source):
        return []
    totals = torch.zeros(len(source), dtype=torch.float64)
    counts, live = target_lengths.cpu(), torch.arange(len(source))  # (B,), (R,): which targets are not over
    state = model.encode(source, lengths)
    words = torch.full_like(target[:, 0], BOS)  # (R,)
    for n in range(int(counts.max())):
        state, going = _leave(model, state, counts[live] > n, source.device)
        live, words = live[going], words[going.to(words.device)]
        logits, normaliser = _step(model, state, words)
        words = target[live.to(target.device), n]
        logs = logits.gather(1, words[:, None]) - normaliser  # (R, 1)
        totals[live] += _numbers(logs.cpu().double())[:, 0]
    return list(zip(totals.tolist(), counts.tolist(), strict=True))


def _step(model: Decoder, state: Any, words: Tensor) -> tuple[Tensor, Tensor]:
    """One more token for each row (R,) -> logits of the next (R, V), at least fp32, and their normaliser (R, 1)."""
    logits = model.step(state, words)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits, logits.logsumexp(-1, keepdim=True)


def _allow(logits: Tensor, at_limit: Tensor, options: DecodingOptions) -> None:
    """Forbid, in logits (R, V), what no translation holds, and all but EOS where `at_limit` (R,) says so.

    Nothing is normalised again, so a hypothesis has the log probability that `score` gives it.
    """
    for word in (PAD, BOS):  # a list of both as an index would have to be copied to the device
        logits[:, word] = -math.inf
    if options.at_limit == "end" and at_limit.any():
        others = torch.arange(logits.shape[1], device=logits.device) != EOS
        logits.masked_fill_(at_limit.to(logits.device)[:, None] & others, -math.inf)


def _numbers(logs: Tensor) -> Tensor:
    """The log probabilities, if they are numbers."""
    if logs.isnan().any():
        raise UserError(
            "the model's probabilities are not numbers; its weights are broken, or the precision is too low (try "
            "trainer.precision=fp32)."
        )
    return logs


def _leave(model: Decoder, state: Any, stays: Tensor, device: torch.device) -> tuple[Any, Tensor]:
    """The state without the rows that do not stay (R,), and the numbers of those that do (on the CPU)."""
    going = stays.nonzero()[:, 0]
    if 0 < len(going) < len(stays):
        state = model.reorder(state, going.to(device))
    return state, going


def _walk(
    model: Decoder, source: Tensor, lengths: Tensor, options: DecodingOptions, names: list[tuple[int | str, int]]
) -> list[Hypothesis]:
    """One hypothesis for each source, one token at a time, which is never taken back: greedily or by chance."""
    limits = options.limits(lengths)
    seeds = [generator(options.seed, "sample", *name) for name in names] if options.method == "sample" else []
    chances = [torch.rand(int(limit), generator=seed) for limit, seed in zip(limits, seeds, strict=False)]
    chance = pad_sequence(chances, batch_first=True) if chances else None  # (B, longest limit), uniform in [0, 1)
    found: dict[int, Hypothesis] = {}
    live = torch.arange(len(source))  # (R,): which sentences are not finished
    totals = torch.zeros(len(source), dtype=torch.float64)  # (R,)
    words = torch.full((len(source), 1), BOS)  # (R, 1 + tokens)
    state = model.encode(source, lengths)
    while len(live):
        n = words.shape[1]  # tokens of each hypothesis after this step
        at_limit = limits[live] == n
        logits, normaliser = _step(model, state, words[:, -1].to(source.device))
        _allow(logits, at_limit, options)
        new = logits.argmax(-1) if chance is None else draw(logits, chance[live, n - 1], options)  # (R,)
        logs = logits.gather(1, new[:, None]) - normaliser  # (R, 1)
        totals = totals + _numbers(logs.cpu().double())[:, 0]
        words = torch.cat([words, new.cpu()[:, None]], 1)
        over = at_limit | (words[:, -1] == EOS)
        for row in over.nonzero()[:, 0].tolist():
            found[int(live[row])] = _hypothesis(words[row, 1:].tolist(), float(totals[row]), options)
        state, going = _leave(model, state, ~over, source.device)
        live, totals, words = live[going], totals[going], words[going]
    return [found[sentence] for sentence in range(len(source))]


def draw(logits: Tensor, chance: Tensor, options: DecodingOptions) -> Tensor:
    """The token (R,) of each row of logits (R, V) at which the summed probability passes `chance` (R,) in [0, 1)."""
    count = min(options.top_k or logits.shape[1], logits.shape[1])
    likeliest, words = (logits / options.temperature).topk(count)  # (R, k), falling
    shares = likeliest.softmax(-1)
    if options.top_p < 1:
        likelier = shares.cumsum(-1) - shares  # what the tokens before have together
        shares = shares.masked_fill(likelier >= options.top_p, 0)
    sums = shares.cumsum(-1)
    places = torch.searchsorted(sums, chance.to(sums)[:, None] * sums[:, -1:], right=True)  # (R, 1)
    possible = (shares > 0).sum(-1, keepdim=True).clamp(min=1)  # none where they are not numbers
    return words.gather(1, places.minimum(possible - 1))[:, 0]  # a chance of almost 1 may round up to the whole sum


def _search(model: Decoder, source: Tensor, lengths: Tensor, options: DecodingOptions) -> list[list[Hypothesis]]:
    """Beam search: the best finished hypotheses of each source, by falling score.

    Of the 2 * beam best continuations of a sentence's hypotheses, which hold at least `beam` without EOS, those with
    EOS are finished if they are among the first `beam`, and the first `beam` without go on. All sentences still
    searched have the same number of hypotheses W, 1 at first; impossible ones have a total of minus infinity. Where
    one step finishes more than the pool has room for, the best of all stay (in fairseq the earlier ones do).
    """
    limits, beam = options.limits(lengths), options.beam
    pools: list[list[Hypothesis]] = [[] for _ in source]
    live = torch.arange(len(source))  # (G,): which sentences are still searched
    totals = torch.zeros(len(source), 1, dtype=torch.float64)  # (G, W), falling along W
    words = torch.full((len(source), 1, 1), BOS)  # (G, W, 1 + tokens)
    state = model.encode(source, lengths)
    while True:
        n = words.shape[2]  # tokens of each hypothesis after this step
        at_limit = limits[live] == n
        logits, normaliser = _step(model, state, words[:, :, -1].flatten().to(source.device))
        _allow(logits, at_limit.repeat_interleave(words.shape[1]), options)
        totals, parents, new = _continuations(logits, normaliser, totals, 2 * beam)
        finished = (new == EOS) | at_limit[:, None]
        for group, place in (finished & (totals > -math.inf))[:, :beam].nonzero().tolist():
            tokens = [*words[group, parents[group, place], 1:].tolist(), int(new[group, place])]
            pools[live[group]].append(_hypothesis(tokens, float(totals[group, place]), options))
        totals, kept = totals.masked_fill(finished, -math.inf).topk(min(beam, totals.shape[1]))  # (G, W)
        states = zip(live.tolist(), totals[:, 0].tolist(), limits[live].tolist(), strict=True)
        over = [_over(pools[sentence], best, n, limit, options) for sentence, best, limit in states]
        if all(over):
            assert all(pools), "no token has any probability"
            return [pool[: options.candidates] for pool in pools]
        stays = (~torch.tensor(over)).nonzero()[:, 0]
        rows = parents.gather(1, kept) + torch.arange(0, len(live) * words.shape[1], words.shape[1])[:, None]
        words = torch.cat([words.flatten(0, 1)[rows], new.gather(1, kept)[:, :, None]], 2)[stays]
        live, totals, rows = live[stays], totals[stays], rows[stays].flatten()  # (G',), (G', W), (G' * W,)
        if len(rows) != len(logits) or not torch.equal(rows, torch.arange(len(rows))):
            state = model.reorder(state, rows.to(source.device))


def _continuations(logits: Tensor, normaliser: Tensor, totals: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` best ways to go on of each sentence (or all, if there are fewer), (G, K) on the CPU, best first.

    From logits (G * W, V), their normaliser (G * W, 1) and the hypotheses' log probabilities (G, W): log probability,
    number of the hypothesis in its sentence, and token. A row's own best are enough to choose from: no (R, V) sums.
    """
    likeliest, tokens = logits.topk(min(count, logits.shape[1]))  # (G * W, k)
    logs = _numbers((likeliest - normaliser).cpu().double())
    sums = (totals.flatten()[:, None] + logs).view(len(totals), -1)  # (G, W * k)
    best, places = sums.topk(min(count, sums.shape[1]))
    return best, places // logs.shape[1], tokens.cpu().view(len(totals), -1).gather(1, places)


def _over(pool: list[Hypothesis], best: float, n: int, limit: int, options: DecodingOptions) -> bool:
    """Whether a sentence is done; also cuts its pool to the best. `best`: of its live hypotheses of n tokens."""
    pool.sort(key=lambda hypothesis: -hypothesis.score)
    del pool[options.beam :]
    if n == limit or best == -math.inf:
        return True
    if len(pool) < options.beam or options.stop == "first":
        return len(pool) == options.beam
    return best / options.divisor(limit if options.stop == "never" else n) <= pool[-1].score


def _hypothesis(words: list[int], total: float, options: DecodingOptions) -> Hypothesis:
    ended = words[-1] == EOS
    return Hypothesis(words[:-1] if ended else words, total / options.divisor(len(words)), total, ended)
