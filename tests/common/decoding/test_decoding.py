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
    """The state of a model without a cache: the source and the tokens of the translation so far, for each row."""

    def __init__(self, sources: Tensor, words: Tensor):
        self.sources, self.words = sources, words  # (R, ...), (R, n) with BOS


class Table:
    """A decoder whose log probabilities are a function `table(first token of the source, prefix)`."""

    def __init__(self, table):
        self.table = table
        self.rows: list[int] = []  # number of rows in each step

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
        assert len({*counts.values()}) == 1, "every sentence has the same number of rows"
        assert len(list(itertools.groupby(state.sources[rows].tolist()))) == len(counts), (
            "the rows of a sentence are adjacent"
        )
        return Prefixes(state.sources[rows], state.words[rows])


def random_table(words: int, sharp: float = 1.5, ends: float = 0.0):
    """Random but reproducible logits for any prefix of any source; `ends` is added to the logit of EOS."""

    def table(source: int, prefix: tuple[int, ...]) -> Tensor:
        logits = sharp * torch.randn(4 + words, generator=generator(source, *prefix), dtype=torch.float64)
        logits[EOS] += ends
        return logits

    return table


def sources(count: int, longest: int = 9) -> tuple[Tensor, Tensor]:
    """Sources of random lengths; their first tokens are 10, 11, ..."""
    lengths = torch.randint(1, longest, (count,), generator=torch.Generator().manual_seed(1))
    source = torch.full((count, longest), PAD)
    source[:, 0] = torch.arange(10, 10 + count)
    return source, lengths


def assert_close(actual: list[list[Hypothesis]], expected: list[list[Hypothesis]], tolerance: float = 1e-9) -> None:
    """Check that both have the same hypotheses in the same order."""
    assert len(actual) == len(expected)
    for pair in zip(actual, expected, strict=True):
        for a, b in zip(*pair, strict=True):
            assert a.tokens == b.tokens and a.ended == b.ended
            assert a.score == pytest.approx(b.score, abs=tolerance)
            assert a.log_probability == pytest.approx(b.log_probability, abs=tolerance)


# fairseq's table: probabilities of EOS, A and B after a prefix, for two sentences
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
    "favouring short ones": ({"alpha": 0.6}, [SHORT, LONG], [EARLY, LATE]),
    "favouring long ones": ({"alpha": 5.0}, [LONG, SHORT], [LATE, EARLY]),
    "two words at most": (
        {"longest_extra": 3},
        [SHORT, ([B, B], [0.1, 0.1, 0.6])],
        [EARLY, ([B, B], [0.3, 0.9, 0.01])],
    ),
}


def fairseq_table(source: int, prefix: tuple[int, ...]) -> Tensor:
    end, a, b = TABLE[source, prefix]
    return torch.tensor([0, 0, end, 0, a, b], dtype=torch.float64).log()


@pytest.mark.parametrize("case", CASES)
def test_beam_search_gives_what_fairseq_finds_in_its_table(case):
    options, *expected = CASES[case]
    options = replace(OPTIONS, **options)
    model = Table(fairseq_table)
    answers = decode(model, *sources(2), options, SPECIAL)
    for hypotheses, pairs in zip(answers, expected, strict=True):
        assert [answer.tokens for answer in hypotheses] == [tokens for tokens, _ in pairs]
        for answer, (_, probabilities) in zip(hypotheses, pairs, strict=True):
            total = math.log(math.prod(probabilities))
            assert answer.ended and answer.log_probability == pytest.approx(total)
            divisor = 1 if options.penalty == "none" else len(probabilities) ** options.alpha
            assert answer.score == pytest.approx(total / divisor)
    assert model.rows == [2, 4, 4] + [4] * (case != "two words at most")  # initially one row for each sentence


def test_the_penalties_of_a_hypothesis_of_seven_tokens():
    gnmt, average, none = (replace(OPTIONS, penalty=name, alpha=0.6).divisor(7) for name in ("gnmt", "average", "none"))
    assert (gnmt, average, none) == pytest.approx((2**0.6, 7**0.6, 1))


def exhaustive(table, source: int, limit: int, options: DecodingOptions) -> list[Hypothesis]:
    """All possible translations, best first."""
    translations = []

    def extend(prefix: tuple[int, ...], total: float) -> None:
        logs = table(source, prefix).log_softmax(0).tolist()
        n = len(prefix) + 1
        for word in (word for word in range(len(logs)) if word not in (PAD, BOS)):
            log_probability = total + logs[word]
            score = log_probability / options.divisor(n)
            if word == EOS:
                translations.append(Hypothesis([*prefix], score, log_probability, True))
            elif n < limit:
                extend((*prefix, word), log_probability)
            elif options.at_limit == "cut":
                translations.append(Hypothesis([*prefix, word], score, log_probability, False))

    extend((), 0.0)
    return sorted(translations, key=lambda hypothesis: -hypothesis.score)


@pytest.mark.parametrize("at_limit", ["end", "cut"])
@pytest.mark.parametrize(("penalty", "alpha"), [("none", 1.0), ("average", 1.0), ("gnmt", 0.6)])
@pytest.mark.parametrize("stop", ["first", "bound", "never"])
def test_a_wide_beam_finds_every_translation_in_order(at_limit, penalty, alpha, stop):
    """Three words (including UNK) and limits of 1 to 4 tokens: up to 121 translations of each sentence."""
    source, lengths = sources(5, longest=5)
    assert {*lengths.tolist()} > {1, 4}
    options = replace(OPTIONS, beam=121, candidates=121, longest_factor=1.0, longest_extra=0)
    options = replace(options, at_limit=at_limit, penalty=penalty, alpha=alpha, stop=stop)
    table = random_table(2)
    limits = zip(source[:, 0].tolist(), lengths.tolist(), strict=True)
    assert_close(
        decode(Table(table), source, lengths, options, SPECIAL), [exhaustive(table, *pair, options) for pair in limits]
    )


def plain_beam_search(table, source: int, limit: int, options: DecodingOptions) -> list[Hypothesis]:
    """Beam search for one sentence in plain loops, which continues every hypothesis to the limit."""
    live, pool = [((), 0.0)], []
    for n in range(1, limit + 1):
        continuations = []
        for prefix, total in live:
            for word, log in enumerate(table(source, prefix).log_softmax(0).tolist()):
                if word not in (PAD, BOS) and (n < limit or word == EOS):
                    continuations.append(((*prefix, word), total + log))
        continuations.sort(key=lambda pair: -pair[1])
        pool += [(words, total) for words, total in continuations[: options.beam] if words[-1] == EOS]
        live = [(words, total) for words, total in continuations if words[-1] != EOS][: options.beam]
    answers = [Hypothesis([*words[:-1]], total / options.divisor(len(words)), total, True) for words, total in pool]
    return sorted(answers, key=lambda hypothesis: -hypothesis.score)[: options.candidates]


@pytest.mark.parametrize(("penalty", "alpha"), [("none", 1.0), ("average", 1.0), ("gnmt", 0.6)])
def test_the_stopping_rule_never_finds_what_an_exhaustive_search_finds(penalty, alpha):
    source, lengths = sources(12)
    options = replace(OPTIONS, beam=3, candidates=3, longest_factor=2.0, penalty=penalty, alpha=alpha, stop="never")
    table = random_table(6, ends=1.0)
    limits = zip(source[:, 0].tolist(), options.limits(lengths).tolist(), strict=True)
    model = Table(table)
    assert_close(
        decode(model, source, lengths, options, SPECIAL), [plain_beam_search(table, *pair, options) for pair in limits]
    )
    if penalty == "none":
        assert len(model.rows) < options.limits(lengths).max()  # it stops as soon as no better hypothesis is possible


@pytest.mark.parametrize("at_limit", ["end", "cut"])
def test_a_beam_of_one_is_greedy(at_limit):
    source, lengths = sources(20)
    options = replace(OPTIONS, beam=1, candidates=1, longest_factor=1.0, longest_extra=3, at_limit=at_limit)
    model = Table(random_table(6))
    answers = decode(model, source, lengths, options, SPECIAL)
    assert_close(decode(model, source, lengths, replace(options, method="greedy"), SPECIAL), answers)
    assert len({len(answer.tokens) for (answer,) in answers}) > 4
    assert {answer.ended for (answer,) in answers} == ({True} if at_limit == "end" else {True, False})


def test_greedy_takes_the_likeliest_token_each_time():
    table = random_table(6)
    ((answer,),) = decode(Table(table), *sources(1), replace(OPTIONS, method="greedy", candidates=1), SPECIAL)
    prefix: list[int] = []
    while len(prefix) < 4 and (word := max((2, *range(3, 10)), key=table(10, tuple(prefix)).__getitem__)) != EOS:
        prefix.append(word)
    assert answer.tokens == prefix and answer.tokens


@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
@pytest.mark.parametrize("stop", ["first", "bound", "never"])
def test_a_sentence_in_a_batch_is_translated_as_it_is_alone(method, stop):
    source, lengths = sources(8)
    options = replace(OPTIONS, method=method, stop=stop, beam=3, candidates=1, longest_factor=1.0)
    table = random_table(6, ends=0.5)
    ids = list(range(8))
    batch_model = Table(table)
    answers = decode(batch_model, source, lengths, options, SPECIAL, ids)
    models = [Table(table) for _ in ids]
    alone = [decode(models[i], source[[i]], lengths[[i]], options, SPECIAL, [i]) for i in ids]
    assert_close(answers, [hypotheses for (hypotheses,) in alone])
    assert sum(batch_model.rows) == sum(sum(model.rows) for model in models)  # a finished sentence leaves the batch
    assert batch_model.rows[-1] < max(batch_model.rows) and len({len(model.rows) for model in models}) > 2


def test_hypotheses_are_sorted_and_distinct():
    source, lengths = sources(10)
    answers = decode(Table(random_table(6)), source, lengths, replace(OPTIONS, beam=6, candidates=4), SPECIAL)
    for hypotheses in answers:
        scores = [answer.score for answer in hypotheses]
        assert len(scores) == 4 and scores == sorted(scores, reverse=True)
        assert len({tuple(answer.tokens) for answer in hypotheses}) == 4


def test_a_limit_holds_in_tokens_with_the_end():
    """1.5 * 5 + 1 = 8 tokens: seven words and EOS, or eight words; a limit is at least one token."""
    options = replace(OPTIONS, longest_factor=1.5, longest_extra=1)
    assert options.limits(torch.tensor([5, 1])).tolist() == [8, 2]
    assert replace(OPTIONS, longest_extra=0).limits(torch.tensor([5])).tolist() == [1]
    source, lengths = sources(1)[0], torch.tensor([5])
    model = Table(random_table(4, ends=-9.0))
    for method in ("greedy", "beam", "sample"):
        for at_limit, words in (("end", 7), ("cut", 8)):
            limited = replace(options, method=method, candidates=1, at_limit=at_limit)
            ((answer,),) = decode(model, source, lengths, limited, SPECIAL)
            assert (len(answer.tokens), answer.ended) == (words, at_limit == "end")


@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
def test_a_hypothesis_is_as_likely_as_scoring_it_says(method):
    source, lengths = sources(6)
    table = random_table(6)
    answers = [
        answer
        for (answer, *_) in decode(
            Table(table), source, lengths, replace(OPTIONS, method=method, candidates=1), SPECIAL
        )
    ]
    counts = torch.tensor([len(answer.tokens) + 1 for answer in answers])
    target = torch.full((6, int(counts.max()) + 2), PAD)
    for row, answer in zip(target, answers, strict=True):
        row[: len(answer.tokens) + 1] = torch.tensor([*answer.tokens, EOS])
    model = Table(table)
    totals = score(model, source, lengths, target, counts, SPECIAL)
    assert len({*counts.tolist()}) > 1 and sum(model.rows) == counts.sum()  # a finished target leaves the batch
    for answer, count, (total, tokens) in zip(answers, counts.tolist(), totals, strict=True):
        assert tokens == count and total == pytest.approx(answer.log_probability, abs=1e-9)


def test_no_sentences_have_no_translations():
    empty = torch.zeros(0, 3, dtype=torch.int64)
    for method in ("greedy", "beam", "sample"):
        options = replace(OPTIONS, method=method, candidates=1)
        assert decode(Table(random_table(2)), empty, empty[:, 0], options, SPECIAL) == []
    assert score(Table(random_table(2)), empty, empty[:, 0], empty, empty[:, 0], SPECIAL) == []


def test_answers_contain_only_words():
    """PAD and BOS have the highest logits here; UNK counts as a word."""

    def table(source: int, prefix: tuple[int, ...]) -> Tensor:
        return torch.tensor([9.0, 8.0, 0.0, 1.0, 0.5])

    for method in ("greedy", "beam", "sample"):
        hypotheses = decode(Table(table), *sources(5), replace(OPTIONS, method=method, candidates=1), SPECIAL)
        words = {word for (answer,) in hypotheses for word in answer.tokens}
        assert words and words <= {3, 4}
        total, _ = next(iter(score(Table(table), *sources(1), torch.tensor([[3, EOS]]), torch.tensor([2]), SPECIAL)))
        assert total < -14  # their probability is not redistributed


@pytest.mark.parametrize("method", ["greedy", "beam", "sample"])
def test_nan_probabilities_are_refused(method):
    def table(source: int, prefix: tuple[int, ...]) -> Tensor:
        return torch.tensor([0.0, 0.0, -99.0, 0.0, math.nan if prefix else 0.0])

    with pytest.raises(UserError, match="probabilities are NaN"):
        decode(Table(table), *sources(2), replace(OPTIONS, method=method, candidates=1, seed=3), SPECIAL)


# sampling


def test_samples_are_as_frequent_as_softmax_says():
    """4,000 samples of five tokens: a frequency's standard deviation is at most 0.008."""
    logits = torch.tensor([-math.inf, -math.inf, 0.3, 1.0, -1.0, 2.0, 0.0])
    options = replace(OPTIONS, method="sample", candidates=4000, temperature=0.7, longest_extra=1, at_limit="cut")
    (answers,) = decode(Table(lambda source, prefix: logits), *sources(1), options, SPECIAL)
    counts = Counter(answer.tokens[0] if answer.tokens else EOS for answer in answers)
    for word, probability in enumerate((logits / 0.7).softmax(0).tolist()):
        assert counts[word] / 4000 == pytest.approx(probability, abs=0.03)
    logs = logits.log_softmax(0)  # the score does not depend on the temperature
    assert all(
        answer.score == pytest.approx(float(logs[answer.tokens[0] if answer.tokens else EOS])) for answer in answers
    )


def restricted(probabilities: list[float], top_k: int, top_p: float) -> list[float]:
    """Probabilities restricted by top-k and top-p, in plain loops."""
    order = sorted(range(len(probabilities)), key=lambda word: -probabilities[word])
    order = order[:top_k] if top_k else order
    whole = sum(probabilities[word] for word in order)
    result, sum_ = [0.0] * len(probabilities), 0.0
    for word in order:
        if sum_ < top_p:
            result[word] = probabilities[word] / whole
        sum_ += probabilities[word] / whole
    return [probability / sum(result) for probability in result]


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (1, 1.0), (3, 1.0), (99, 1.0), (0, 0.01), (0, 0.7), (5, 0.8)])
def test_top_k_and_top_p_agree_with_plain_loops(top_k, top_p):
    """With 5,000 equally spaced numbers, frequencies are probabilities up to one or two of them at each border."""
    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    uniforms = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    options = replace(OPTIONS, top_k=top_k, top_p=top_p)
    for row in logits:
        words = sample_tokens(row.repeat(5000, 1), uniforms, options)
        frequencies = (words.bincount(minlength=12) / 5000).tolist()
        expected = restricted(row.softmax(0).tolist(), top_k, top_p)
        assert frequencies == pytest.approx(expected, abs=3 / 5000)
        assert [frequency > 0 for frequency in frequencies] == [probability > 0 for probability in expected]


def test_a_number_that_rounds_to_one_gives_a_possible_token():
    logits = torch.tensor([[0.1, -math.inf, 0.2, 0.3, -math.inf]])
    for top_p in (1.0, 0.9, 0.4):
        (word,) = sample_tokens(logits, torch.tensor([1.0]), replace(OPTIONS, top_p=top_p)).tolist()
        assert word in (0, 2, 3)


def test_samples_depend_on_the_seed_the_sentence_and_the_index():
    source, lengths = sources(1)[0].repeat(2, 1), torch.tensor([6, 6])
    model = Table(lambda source, prefix: torch.zeros(40))  # forty equally likely tokens
    options = replace(OPTIONS, method="sample", candidates=2, longest_extra=6)
    model.reorder = lambda state, rows: Prefixes(state.sources[rows], state.words[rows])

    def tokens(ids, **changes) -> list[list[int]]:
        return [
            sample.tokens
            for samples in decode(model, source, lengths, replace(options, **changes), SPECIAL, ids)
            for sample in samples
        ]

    first = tokens([3, 4])
    assert len({tuple(words) for words in first}) == 4
    assert tokens([4, 3]) == [*first[2:], *first[:2]] and tokens([3, 4], seed=1) != first
    assert tokens([3, 4], candidates=1) == first[::2]


# transformers


class Marian:
    """transformers' Marian as a Decoder, without a cache."""

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
    """Two small layers in encoder and decoder, with large random weights and a bias towards EOS."""
    torch.manual_seed(0)
    dimensions = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in
             (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
    ids = {"pad_token_id": PAD, "bos_token_id": BOS, "decoder_start_token_id": BOS, "eos_token_id": EOS}
    config = MarianConfig(
        vocab_size=24,
        d_model=16,
        max_position_embeddings=64,
        forced_eos_token_id=None,
        tie_word_embeddings=False,
        **ids,
        **dimensions,
    )
    model = MarianMTModel(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.3)
    model.final_logits_bias[0, EOS] = 3.0
    return model


def generated(model: MarianMTModel, source: Tensor, lengths: Tensor, **options) -> list[list[tuple[list[int], float]]]:
    """transformers' tokens (between BOS and EOS) and scores, a list for each sentence."""
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
    """Tokens and scores of all four candidates, of translations that end and that are truncated at the limit."""
    source, lengths = random_sources()
    options = replace(OPTIONS, beam=4, candidates=4, alpha=alpha, stop=stop, longest_extra=14, at_limit="cut")
    answers = decode(Marian(marian), source, lengths, options, SPECIAL)
    beams = {"num_beams": 4, "num_return_sequences": 4, "length_penalty": alpha, "early_stopping": early}
    expected = generated(marian, source, lengths, max_new_tokens=14, **beams)
    for hypotheses, pairs in zip(answers, expected, strict=True):
        assert [answer.tokens for answer in hypotheses] == [tokens for tokens, _ in pairs]
        # float32 sums of up to 14 log probabilities
        assert [answer.score for answer in hypotheses] == pytest.approx([score for _, score in pairs], abs=2e-5)
    ended = Counter(answer.ended for hypotheses in answers for answer in hypotheses)
    assert ended[True] > 9 and len({len(answer.tokens) for hypotheses in answers for answer in hypotheses}) > 3


def test_greedy_search_finds_what_transformers_finds(marian):
    pairs = random_sources()
    answers = decode(
        Marian(marian),
        *pairs,
        replace(OPTIONS, method="greedy", candidates=1, longest_extra=14, at_limit="cut"),
        SPECIAL,
    )
    expected = generated(marian, *pairs, max_new_tokens=14, num_beams=1)
    assert [answer.tokens for (answer,) in answers] == [tokens for ((tokens, _),) in expected]
    assert len({len(answer.tokens) for (answer,) in answers}) > 3


# options


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "greedy"}, "at most 1 with method=greedy; use task.predict.method=beam or sample"),
        ({"candidates": 3}, "candidates=3: expected at most 2 with method=beam and beam=2; raise task.predict.beam"),
    ],
)
def test_more_candidates_than_a_method_finds_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        replace(OPTIONS, **changes)
