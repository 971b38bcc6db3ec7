import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import MarianConfig, MarianMTModel

from common.decoding.contract import Hypothesis, SpecialIds
from common.decoding.decode import decode
from common.decoding.given import score
from common.decoding.options import DecodingOptions
from common.decoding.sampling import sample_tokens
from common.errors import UserError
from common.machine.seeds import generator
from tests.searching import BEAM as OPTIONS

PAD, BOS, EOS = 0, 1, 2
SPECIAL = SpecialIds(begin=BOS, end=EOS, never=(PAD, BOS))
A, B = 4, 5  # two words


class Prefixes:
    """What a model without a cache knows of its rows: the source's tokens and those of the translation so far."""

    def __init__(self, sources: Tensor, words: Tensor):
        self.sources, self.words = sources, words  # (R, ...), (R, n) with BOS


class Table:
    """A model that speaks the contract and looks its log probabilities up: `table(source's first token, prefix)`."""

    def __init__(self, table):
        self.table = table
        self.rows: list[int] = []  # of each step

    def encode(self, source: Tensor, lengths: Tensor) -> Prefixes:
        return Prefixes(source[:, 0], source.new_empty(len(source), 0))

    def step(self, state: Prefixes, tokens: Tensor) -> Tensor:
        self.rows.append(len(tokens))
        state.words = torch.cat([state.words, tokens[:, None]], 1)
        assert (state.words[:, 0] == BOS).all()
        pairs = zip(state.sources.tolist(), state.words[:, 1:].tolist(), strict=True)
        return torch.stack([self.table(source, tuple(words)) for source, words in pairs])

    def reorder(self, state: Prefixes, rows: Tensor) -> Prefixes:
        counts = Counter(state.sources[rows].tolist())
        assert len({*counts.values()}) == 1, "equally many rows for each sentence"
        assert len(list(itertools.groupby(state.sources[rows].tolist()))) == len(counts), "rows of one side by side"
        return Prefixes(state.sources[rows], state.words[rows])


def random_table(words: int, sharp: float = 1.5, ends: float = 0.0):
    """Random logits for any prefix of any source, always the same; `ends` is added to the one of EOS."""

    def table(source: int, prefix: tuple[int, ...]) -> Tensor:
        logits = sharp * torch.randn(4 + words, generator=generator(source, *prefix), dtype=torch.float64)
        logits[EOS] += ends
        return logits

    return table


def sources(count: int, longest: int = 9) -> tuple[Tensor, Tensor]:
    """Sources of any lengths, whose first token is their number, from 10."""
    lengths = torch.randint(1, longest, (count,), generator=torch.Generator().manual_seed(1))
    source = torch.full((count, longest), PAD)
    source[:, 0] = torch.arange(10, 10 + count)
    return source, lengths


def close(found: list[list[Hypothesis]], expected: list[list[Hypothesis]], tolerance: float = 1e-9) -> None:
    """The same hypotheses in the same order."""
    assert len(found) == len(expected)
    for some, others in zip(found, expected, strict=True):
        assert [one.tokens for one in some] == [other.tokens for other in others]
        for one, other in zip(some, others, strict=True):
            assert one.ended == other.ended
            assert one.score == pytest.approx(other.score, abs=tolerance)
            assert one.log_probability == pytest.approx(other.log_probability, abs=tolerance)


# fairseq's fixed table: probabilities of EOS, A and B after a prefix, for two sentences
TABLE = {
    (10, ()): (0.0, 0.9, 0.1),
    (10, (A,)): (1.0, 0.0, 0.0),
    (10, (B,)): (0.0, 0.9, 0.1),
    (10, (B, A)): (0.0, 0.1, 0.9),
    (10, (B, B)): (0.6, 0.2, 0.2),
    (10, (B, A, B)): (1.0, 0.0, 0.0),
    (10, (B, A, A)): (1.0, 0.0, 0.0),
    (11, ()): (0.0, 0.7, 0.3),
    (11, (A,)): (0.25, 0.35, 0.4),
    (11, (B,)): (0.0, 0.1, 0.9),
    (11, (A, B)): (0.6, 0.4, 0.0),
    (11, (B, B)): (0.01, 0.0, 0.99),
    (11, (B, B, B)): (0.1, 0.5, 0.4),
    (11, (A, B, A)): (1.0, 0.0, 0.0),
}
SHORT, LONG = ([A], [0.9, 1.0]), ([B, A, B], [0.1, 0.9, 0.9, 1.0])  # of sentence 10
EARLY, LATE = ([A, B], [0.7, 0.4, 0.6]), ([A, B, A], [0.7, 0.4, 0.4, 1.0])  # of sentence 11
CASES = {
    "normalised": ({}, [SHORT, LONG], [LATE, EARLY]),
    "not normalised": ({"penalty": "none"}, [SHORT, LONG], [EARLY, LATE]),
    "favouring the short": ({"alpha": 0.6}, [SHORT, LONG], [EARLY, LATE]),
    "favouring the long": ({"alpha": 5.0}, [LONG, SHORT], [LATE, EARLY]),
    "two words at most": (
        {"longest_extra": 3},
        [SHORT, ([B, B], [0.1, 0.1, 0.6])],
        [EARLY, ([B, B], [0.3, 0.9, 0.01])],
    ),
}


def of_table(source: int, prefix: tuple[int, ...]) -> Tensor:
    end, a, b = TABLE[source, prefix]
    return torch.tensor([0, 0, end, 0, a, b], dtype=torch.float64).log()


@pytest.mark.parametrize("case", CASES)
def test_beam_search_gives_what_fairseq_finds_in_its_table(case):
    options, *expected = CASES[case]
    options = replace(OPTIONS, **options)
    model = Table(of_table)
    found = decode(model, *sources(2), options, SPECIAL)
    for hypotheses, pairs in zip(found, expected, strict=True):
        assert [one.tokens for one in hypotheses] == [tokens for tokens, _ in pairs]
        for one, (_, probabilities) in zip(hypotheses, pairs, strict=True):
            total = math.log(math.prod(probabilities))
            assert one.ended and one.log_probability == pytest.approx(total)
            divisor = 1 if options.penalty == "none" else len(probabilities) ** options.alpha
            assert one.score == pytest.approx(total / divisor)
    assert model.rows == [2, 4, 4] + [4] * (case != "two words at most")  # one row of each sentence at first


def test_the_penalties_of_a_hypothesis_of_seven_tokens():
    gnmt, average, none = (replace(OPTIONS, penalty=name, alpha=0.6).divisor(7) for name in ("gnmt", "average", "none"))
    assert (gnmt, average, none) == pytest.approx((2**0.6, 7**0.6, 1))


def exhaustive(table, source: int, limit: int, options: DecodingOptions) -> list[Hypothesis]:
    """Every translation there is, best first."""
    found = []

    def follow(prefix: tuple[int, ...], total: float) -> None:
        logs = table(source, prefix).log_softmax(0).tolist()
        n = len(prefix) + 1
        for word in (word for word in range(len(logs)) if word not in (PAD, BOS)):
            now = total + logs[word]
            if word == EOS:
                found.append(Hypothesis([*prefix], now / options.divisor(n), now, True))
            elif n < limit:
                follow((*prefix, word), now)
            elif options.at_limit == "cut":
                found.append(Hypothesis([*prefix, word], now / options.divisor(n), now, False))

    follow((), 0.0)
    return sorted(found, key=lambda hypothesis: -hypothesis.score)


@pytest.mark.parametrize("at_limit", ["end", "cut"])
@pytest.mark.parametrize(("penalty", "alpha"), [("none", 1.0), ("average", 1.0), ("gnmt", 0.6)])
@pytest.mark.parametrize("stop", ["first", "bound", "never"])
def test_a_wide_beam_finds_every_translation_in_order(at_limit, penalty, alpha, stop):
    """Three words (with UNK) and at most 1 to 4 tokens: up to 121 translations of each sentence."""
    source, lengths = sources(5, longest=5)
    assert {*lengths.tolist()} > {1, 4}
    options = replace(OPTIONS, beam=121, candidates=121, longest_factor=1.0, longest_extra=0)
    options = replace(options, at_limit=at_limit, penalty=penalty, alpha=alpha, stop=stop)
    table = random_table(2)
    limits = zip(source[:, 0].tolist(), lengths.tolist(), strict=True)
    close(
        decode(Table(table), source, lengths, options, SPECIAL), [exhaustive(table, *pair, options) for pair in limits]
    )


def plain(table, source: int, limit: int, options: DecodingOptions) -> list[Hypothesis]:
    """Beam search of one sentence in plain loops, in which every hypothesis goes on until the limit."""
    live, pool = [((), 0.0)], []
    for n in range(1, limit + 1):
        ways = []
        for prefix, total in live:
            for word, log in enumerate(table(source, prefix).log_softmax(0).tolist()):
                if word not in (PAD, BOS) and (n < limit or word == EOS):
                    ways.append(((*prefix, word), total + log))
        ways.sort(key=lambda way: -way[1])
        pool += [way for way in ways[: options.beam] if way[0][-1] == EOS]
        live = [way for way in ways if way[0][-1] != EOS][: options.beam]
    found = [Hypothesis([*words[:-1]], total / options.divisor(len(words)), total, True) for words, total in pool]
    return sorted(found, key=lambda hypothesis: -hypothesis.score)[: options.candidates]


@pytest.mark.parametrize(("penalty", "alpha"), [("none", 1.0), ("average", 1.0), ("gnmt", 0.6)])
def test_the_rule_never_misses_nothing_that_an_endless_search_finds(penalty, alpha):
    source, lengths = sources(12)
    options = replace(OPTIONS, beam=3, candidates=3, longest_factor=2.0, penalty=penalty, alpha=alpha, stop="never")
    table = random_table(6, ends=1.0)
    limits = zip(source[:, 0].tolist(), options.limits(lengths).tolist(), strict=True)
    model = Table(table)
    close(decode(model, source, lengths, options, SPECIAL), [plain(table, *pair, options) for pair in limits])
    if penalty == "none":
        assert len(model.rows) < options.limits(lengths).max()  # it stops as soon as nothing better can come


@pytest.mark.parametrize("at_limit", ["end", "cut"])
def test_a_beam_of_one_is_greedy(at_limit):
    source, lengths = sources(20)
    options = replace(OPTIONS, beam=1, candidates=1, longest_factor=1.0, longest_extra=3, at_limit=at_limit)
    model = Table(random_table(6))
    found = decode(model, source, lengths, options, SPECIAL)
    close(decode(model, source, lengths, replace(options, method="greedy"), SPECIAL), found)
    assert len({len(one.tokens) for (one,) in found}) > 4
    assert {one.ended for (one,) in found} == ({True} if at_limit == "end" else {True, False})


def test_greedy_takes_the_likeliest_token_each_time():
    table = random_table(6)
    ((found,),) = decode(Table(table), *sources(1), replace(OPTIONS, method="greedy", candidates=1), SPECIAL)
    prefix: list[int] = []
    while len(prefix) < 4 and (word := max((2, *range(3, 10)), key=table(10, tuple(prefix)).__getitem__)) != EOS:
        prefix.append(word)
    assert found.tokens == prefix and found.tokens


@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
@pytest.mark.parametrize("stop", ["first", "bound", "never"])
def test_a_sentence_in_a_batch_is_translated_as_it_is_alone(method, stop):
    source, lengths = sources(8)
    options = replace(OPTIONS, method=method, stop=stop, beam=3, candidates=1, longest_factor=1.0)
    table = random_table(6, ends=0.5)
    ids = list(range(8))
    together = Table(table)
    found = decode(together, source, lengths, options, SPECIAL, ids)
    alone = [Table(table) for _ in ids]
    each = [decode(alone[i], source[[i]], lengths[[i]], options, SPECIAL, [i]) for i in ids]
    close(found, [hypotheses for (hypotheses,) in each])
    assert sum(together.rows) == sum(sum(model.rows) for model in alone)  # a finished sentence costs nothing more
    assert together.rows[-1] < max(together.rows) and len({len(model.rows) for model in alone}) > 2


def test_hypotheses_are_sorted_and_distinct():
    source, lengths = sources(10)
    found = decode(Table(random_table(6)), source, lengths, replace(OPTIONS, beam=6, candidates=4), SPECIAL)
    for hypotheses in found:
        scores = [one.score for one in hypotheses]
        assert len(scores) == 4 and scores == sorted(scores, reverse=True)
        assert len({tuple(one.tokens) for one in hypotheses}) == 4


def test_a_limit_holds_in_tokens_with_the_end():
    """1.5 * 5 + 1 = 8 tokens: seven words and EOS, or eight words; and one token at least."""
    options = replace(OPTIONS, longest_factor=1.5, longest_extra=1)
    assert options.limits(torch.tensor([5, 1])).tolist() == [8, 2]
    assert replace(OPTIONS, longest_extra=0).limits(torch.tensor([5])).tolist() == [1]
    source, lengths = sources(1)[0], torch.tensor([5])
    model = Table(random_table(4, ends=-9.0))
    for method in ("greedy", "beam", "sample"):
        for at_limit, words in (("end", 7), ("cut", 8)):
            cut = replace(options, method=method, candidates=1, at_limit=at_limit)
            ((found,),) = decode(model, source, lengths, cut, SPECIAL)
            assert (len(found.tokens), found.ended) == (words, at_limit == "end")


@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
def test_a_hypothesis_is_as_likely_as_scoring_it_says(method):
    source, lengths = sources(6)
    table = random_table(6)
    found = [
        one
        for (one, *_) in decode(Table(table), source, lengths, replace(OPTIONS, method=method, candidates=1), SPECIAL)
    ]
    counts = torch.tensor([len(one.tokens) + 1 for one in found])
    target = torch.full((6, int(counts.max()) + 2), PAD)
    for row, one in zip(target, found, strict=True):
        row[: len(one.tokens) + 1] = torch.tensor([*one.tokens, EOS])
    model = Table(table)
    totals = score(model, source, lengths, target, counts, SPECIAL)
    assert len({*counts.tolist()}) > 1 and sum(model.rows) == counts.sum()  # a target that is over leaves the batch
    for one, count, (total, tokens) in zip(found, counts.tolist(), totals, strict=True):
        assert tokens == count and total == pytest.approx(one.log_probability, abs=1e-9)


def test_no_sentences_have_no_translations():
    nothing = torch.zeros(0, 3, dtype=torch.int64)
    for method in ("greedy", "beam", "sample"):
        options = replace(OPTIONS, method=method, candidates=1)
        assert decode(Table(random_table(2)), nothing, nothing[:, 0], options, SPECIAL) == []
    assert score(Table(random_table(2)), nothing, nothing[:, 0], nothing, nothing[:, 0], SPECIAL) == []


def test_nothing_but_words_and_the_end_is_ever_said():
    """PAD and BOS are the likeliest here, and UNK is a word like others."""

    def table(source: int, prefix: tuple[int, ...]) -> Tensor:
        return torch.tensor([9.0, 8.0, 0.0, 1.0, 0.5])

    for method in ("greedy", "beam", "sample"):
        hypotheses = decode(Table(table), *sources(5), replace(OPTIONS, method=method, candidates=1), SPECIAL)
        said = {word for (one,) in hypotheses for word in one.tokens}
        assert said and said <= {3, 4}
        total, _ = next(iter(score(Table(table), *sources(1), torch.tensor([[3, EOS]]), torch.tensor([2]), SPECIAL)))
        assert total < -14  # what they take of the probability is lost, not handed to the others


@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
def test_a_model_that_is_broken_says_so(method):
    def table(source: int, prefix: tuple[int, ...]) -> Tensor:
        return torch.tensor([0.0, 0.0, -99.0, 0.0, math.nan if prefix else 0.0])

    with pytest.raises(UserError, match="probabilities are NaN"):
        decode(Table(table), *sources(2), replace(OPTIONS, method=method, candidates=1, seed=3), SPECIAL)


# sampling


def test_samples_come_as_often_as_softmax_says():
    """4,000 draws of five tokens: a frequency's standard deviation is at most 0.008."""
    logits = torch.tensor([-math.inf, -math.inf, 0.3, 1.0, -1.0, 2.0, 0.0])
    options = replace(OPTIONS, method="sample", candidates=4000, temperature=0.7, longest_extra=1, at_limit="cut")
    ((*found,),) = decode(Table(lambda source, prefix: logits), *sources(1), options, SPECIAL)
    times = Counter(one.tokens[0] if one.tokens else EOS for one in found)
    for word, probability in enumerate((logits / 0.7).softmax(0).tolist()):
        assert times[word] / 4000 == pytest.approx(probability, abs=0.03)
    logs = logits.log_softmax(0)  # what a sample is worth is told by the model, whatever the temperature
    assert all(one.score == pytest.approx(float(logs[one.tokens[0] if one.tokens else EOS])) for one in found)


def kept(probabilities: list[float], top_k: int, top_p: float) -> list[float]:
    """The probabilities of what may be drawn, in plain loops."""
    order = sorted(range(len(probabilities)), key=lambda word: -probabilities[word])
    order = order[:top_k] if top_k else order
    whole = sum(probabilities[word] for word in order)
    result, sum_ = [0.0] * len(probabilities), 0.0
    for word in order:
        if sum_ < top_p:
            result[word] = probabilities[word] / whole
        sum_ += probabilities[word] / whole
    return [share / sum(result) for share in result]


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (1, 1.0), (3, 1.0), (99, 1.0), (0, 0.01), (0, 0.7), (5, 0.8)])
def test_top_k_and_top_p_leave_what_plain_loops_leave(top_k, top_p):
    """At 5,000 even chances each token comes by its share, to a chance or two for each border."""
    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chances = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    options = replace(OPTIONS, top_k=top_k, top_p=top_p)
    for row in logits:
        words = sample_tokens(row.repeat(5000, 1), chances, options)
        shares = (words.bincount(minlength=12) / 5000).tolist()
        expected = kept(row.softmax(0).tolist(), top_k, top_p)
        assert shares == pytest.approx(expected, abs=3 / 5000)
        assert [share > 0 for share in shares] == [share > 0 for share in expected]


def test_the_last_chance_below_one_draws_something_possible():
    logits = torch.tensor([[0.1, -math.inf, 0.2, 0.3, -math.inf]])
    for share in (1.0, 0.9, 0.4):
        (word,) = sample_tokens(logits, torch.tensor([1.0]), replace(OPTIONS, top_p=share)).tolist()
        assert word in (0, 2, 3)


def test_samples_depend_on_the_seed_the_sentence_and_the_draw():
    source, lengths = sources(1)[0].repeat(2, 1), torch.tensor([6, 6])
    model = Table(lambda source, prefix: torch.zeros(40))  # forty tokens, all alike
    options = replace(OPTIONS, method="sample", candidates=2, longest_extra=6)
    model.reorder = lambda state, rows: Prefixes(state.sources[rows], state.words[rows])

    def tokens(ids, **changes) -> list[list[int]]:
        return [
            one.tokens
            for found in decode(model, source, lengths, replace(options, **changes), SPECIAL, ids)
            for one in found
        ]

    first = tokens([3, 4])
    assert len({tuple(words) for words in first}) == 4
    assert tokens([4, 3]) == [*first[2:], *first[:2]] and tokens([3, 4], seed=1) != first
    assert tokens([3, 4], candidates=1) == first[::2]


# transformers


class Marian:
    """transformers' Marian without a cache behind our contract."""

    def __init__(self, model: MarianMTModel):
        self.model = model

    def encode(self, source: Tensor, lengths: Tensor) -> Prefixes:
        mask = torch.arange(source.shape[1]) < lengths[:, None]
        memory = self.model.model.encoder(source, attention_mask=mask.long()).last_hidden_state
        return Prefixes(torch.cat([memory, mask[:, :, None]], 2), source.new_empty(len(source), 0))

    def step(self, state: Prefixes, tokens: Tensor) -> Tensor:
        state.words = torch.cat([state.words, tokens[:, None]], 1)
        memory, mask = state.sources[:, :, :-1], state.sources[:, :, -1].long()
        states = (memory.contiguous(),)
        answer = self.model(encoder_outputs=states, attention_mask=mask, decoder_input_ids=state.words, use_cache=False)
        return answer.logits[:, -1]

    def reorder(self, state: Prefixes, rows: Tensor) -> Prefixes:
        return Prefixes(state.sources[rows], state.words[rows])


@pytest.fixture(scope="module")
def marian() -> MarianMTModel:
    """Two small layers a side with large random weights, so that probabilities differ, that end after some tokens."""
    torch.manual_seed(0)
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in
             (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
    ids = {"pad_token_id": PAD, "bos_token_id": BOS, "decoder_start_token_id": BOS, "eos_token_id": EOS}
    config = MarianConfig(
        vocab_size=24,
        d_model=16,
        max_position_embeddings=64,
        forced_eos_token_id=None,
        tie_word_embeddings=False,
        **ids,
        **sizes,
    )
    model = MarianMTModel(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.3)
    model.final_logits_bias[0, EOS] = 3.0
    return model


def generated(model: MarianMTModel, source: Tensor, lengths: Tensor, **options) -> list[list[tuple[list[int], float]]]:
    """transformers' tokens (without BOS and what comes after EOS) and scores, a list for each sentence."""
    mask = (torch.arange(source.shape[1]) < lengths[:, None]).long()
    common = {"bad_words_ids": [[PAD], [BOS]], "return_dict_in_generate": True, "output_scores": True}
    answer = model.generate(source, attention_mask=mask, do_sample=False, **common, **options)
    scores = getattr(answer, "sequences_scores", None)
    scores = [math.nan] * len(answer.sequences) if scores is None else scores.tolist()
    rows = [
        list(itertools.takewhile(lambda word: word not in (EOS, PAD), row[1:])) for row in answer.sequences.tolist()
    ]
    count = len(rows) // len(source)
    return [list(zip(rows, scores, strict=True))[start : start + count] for start in range(0, len(rows), count)]


def random_sources() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(2, 12, (30,), generator=generator)
    source = torch.randint(4, 24, (30, 11), generator=generator)
    return source.masked_fill(torch.arange(11) >= lengths[:, None], PAD), lengths


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("stop", "early"), [("first", True), ("bound", False), ("never", "never")])
def test_four_beams_find_what_transformers_finds(marian, alpha, stop, early):
    """Tokens and scores of all four candidates, of translations that end and that the limit cuts."""
    pairs = random_sources()
    options = replace(OPTIONS, beam=4, candidates=4, alpha=alpha, stop=stop, longest_extra=14, at_limit="cut")
    found = decode(Marian(marian), *pairs, options, SPECIAL)
    beams = {"num_beams": 4, "num_return_sequences": 4, "length_penalty": alpha, "early_stopping": early}
    expected = generated(marian, *pairs, max_new_tokens=14, **beams)
    for hypotheses, others in zip(found, expected, strict=True):
        assert [one.tokens for one in hypotheses] == [tokens for tokens, _ in others]
        # float32 sums of up to 14 log probabilities
        assert [one.score for one in hypotheses] == pytest.approx([score for _, score in others], abs=2e-5)
    ended = Counter(one.ended for hypotheses in found for one in hypotheses)
    assert ended[True] > 9 and len({len(one.tokens) for hypotheses in found for one in hypotheses}) > 3


def test_greedy_search_finds_what_transformers_finds(marian):
    pairs = random_sources()
    found = decode(
        Marian(marian),
        *pairs,
        replace(OPTIONS, method="greedy", candidates=1, longest_extra=14, at_limit="cut"),
        SPECIAL,
    )
    expected = generated(marian, *pairs, max_new_tokens=14, num_beams=1)
    assert [one.tokens for (one,) in found] == [tokens for ((tokens, _),) in expected]
    assert len({len(one.tokens) for (one,) in found}) > 3


# options


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "greedy"}, "at most 1 with method=greedy; use task.predict.method=beam or sample"),
        ({"candidates": 3}, "candidates=3: expected at most 2 with method=beam and beam=2; raise task.predict.beam"),
    ],
)
def test_more_candidates_than_are_looked_for_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        replace(OPTIONS, **changes)
