"""Answers that continue a prompt, by a translator and by a language model with other special ids."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.cache_utils import DynamicCache

from common.decoding.contract import Hypothesis, SpecialIds
from common.decoding.decode import decode
from common.decoding.given import score
from common.decoding.options import DecodingOptions
from seq2seq.models.transformer import PositionOptions, Transformer, TranslatorBlockOptions
from tests.searching import BEAM

ENTRIES, END, PAD = 12, 11, 7
SPECIAL = SpecialIds(begin=END, end=END, never=(PAD,))  # as in GPT-2, the same id begins and ends a text
PROMPTS = [[3, 5, 1], [END], [2, 2], [END, 4, 0], [9]]
OPTIONS = replace(BEAM, beam=3, stop="never", candidates=1, longest_extra=4, at_limit="cut")
METHODS = {
    "greedy": replace(OPTIONS, method="greedy"),
    "beam": replace(OPTIONS, candidates=3),
    "sample": replace(OPTIONS, method="sample", candidates=3),
}
EXACT = 1e-9  # of log probabilities in float64


def randomise(model: torch.nn.Module) -> None:
    """Fill matrices with large random numbers, so that answers depend on the prompt."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter)


class LanguageModel:
    """transformers' GPT-2 with its cache as a Decoder."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=ENTRIES, n_positions=32, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=False
        )
        self.model = GPT2LMHeadModel(config).double().eval()
        randomise(self.model)
        self.shapes: list[tuple[int, ...]] = []  # of the tokens of each step

    def logits(self, source: Tensor, words: Tensor) -> Tensor:
        """Logits without a cache: tokens (B, N) -> (B, N, V)."""
        return self.model(words, use_cache=False).logits

    def encode(self, source: Tensor, lengths: Tensor) -> DynamicCache:
        assert source.shape[1] == 0
        return DynamicCache(config=self.model.config)

    def step(self, state: DynamicCache, tokens: Tensor) -> Tensor:
        self.shapes.append(tuple(tokens.shape))
        words = tokens[:, None] if tokens.ndim == 1 else tokens
        return self.model(words, past_key_values=state, use_cache=True).logits[:, -1]

    def reorder(self, state: DynamicCache, rows: Tensor) -> DynamicCache:
        state.batch_select_indices(rows)
        return state


class Translator:
    """Our Transformer, which does not depend on the special ids."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model = Transformer(
            vocabularies=(ENTRIES, ENTRIES),
            joint=False,
            width=16,
            heads=2,
            feedforward=32,
            encoder_layers=1,
            decoder_layers=2,
            tied="none",
            scaled=True,
            output_bias=True,
            longest=9,
            positions=PositionOptions(layout="interleaved", first=0),
            blocks=TranslatorBlockOptions(
                pre_norm=True, dropout=0.1, attention_dropout=0.1, hidden_dropout=0.0, norm_eps=1e-5, activation="relu"
            ),
        ).double()
        randomise(self.model.eval())
        self.encode, self.reorder = self.model.encode, self.model.reorder
        self.shapes: list[tuple[int, ...]] = []

    def logits(self, source: Tensor, words: Tensor) -> Tensor:
        return self.model(source, torch.full((len(source),), source.shape[1]), words)

    def step(self, state: Any, tokens: Tensor) -> Tensor:
        self.shapes.append(tuple(tokens.shape))
        return self.model.step(state, tokens)


def sources(model: Any) -> tuple[Tensor, Tensor]:
    """A source of 4 tokens for each prompt, and none for a language model."""
    length = 4 if isinstance(model, Translator) else 0
    source = torch.randint(0, ENTRIES, (len(PROMPTS), length), generator=torch.Generator().manual_seed(2))
    return source, torch.full((len(PROMPTS),), length)


@torch.no_grad()
def exhaustive(model: Any, source: Tensor, prompt: list[int], options: DecodingOptions) -> list[Hypothesis]:
    """All possible answers, best first, from whole sequences without a cache."""
    answers = []

    def extend(words: list[int], total: float) -> None:
        logs = model.logits(source[None], torch.tensor([[*prompt, *words]]))[0, -1].log_softmax(0).tolist()
        n = len(words) + 1
        for word in (word for word in range(ENTRIES) if word not in SPECIAL.never):
            log_probability = total + logs[word]
            if word == END or n == options.longest_extra:
                tokens = words if word == END else [*words, word]
                answers.append(Hypothesis(tokens, log_probability / options.divisor(n), log_probability, word == END))
            else:
                extend([*words, word], log_probability)

    extend([], 0.0)
    return sorted(answers, key=lambda answer: -answer.score)


def assert_close(actual: list[list[Hypothesis]], expected: list[list[Hypothesis]]) -> None:
    assert [len(hypotheses) for hypotheses in actual] == [len(hypotheses) for hypotheses in expected]
    for a, b in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
        assert a.tokens == b.tokens and a.ended == b.ended
        assert a.score == pytest.approx(b.score, abs=EXACT)


models = pytest.mark.parametrize("make", [LanguageModel, Translator])


@models
def test_a_wide_beam_finds_every_answer_to_a_prompt_in_order(make: Any) -> None:
    """Ten words and the end, in at most two tokens: 111 answers to each prompt."""
    model = make()
    source, lengths = sources(model)
    options = replace(OPTIONS, beam=111, candidates=111, longest_extra=2)
    answers = decode(model, source, lengths, options, SPECIAL, prompts=PROMPTS)
    assert_close(answers, [exhaustive(model, *pair, options) for pair in zip(source, PROMPTS, strict=True)])
    assert {len(hypotheses) for hypotheses in answers} == {111}


@models
def test_greedy_search_takes_the_likeliest_token_after_the_prompt(make: Any) -> None:
    model = make()
    source, lengths = sources(model)
    answers = decode(model, source, lengths, METHODS["greedy"], SPECIAL, prompts=PROMPTS)
    for row, ((answer,), prompt) in enumerate(zip(answers, PROMPTS, strict=True)):
        words = [*prompt]
        while len(words) < len(prompt) + OPTIONS.longest_extra and words[len(prompt) :][-1:] != [END]:
            logits = model.logits(source[[row]], torch.tensor([words])).detach()[0, -1]
            words.append(int(logits.index_fill(0, torch.tensor([PAD]), -math.inf).argmax()))
        assert answer.tokens == [word for word in words[len(prompt) :] if word != END]


@models
@pytest.mark.parametrize("method", METHODS)
def test_prompts_of_different_lengths_in_a_batch_do_not_affect_each_other(make: Any, method: str) -> None:
    model = make()
    source, lengths = sources(model)
    ids = ["a", "b", "c", "d", "e"]
    answers = decode(model, source, lengths, METHODS[method], SPECIAL, ids, PROMPTS)
    alone = [
        decode(model, source[[i]], lengths[[i]], METHODS[method], SPECIAL, [ids[i]], [prompt])[0]
        for i, prompt in enumerate(PROMPTS)
    ]
    assert_close(answers, alone)
    assert len({tuple(answer.tokens) for hypotheses in answers for answer in hypotheses}) > 2
    assert {len(shape) for shape in model.shapes} == {1, 2} and (1, 1) not in model.shapes


@models
@pytest.mark.parametrize("method", METHODS)
def test_an_answer_to_a_prompt_is_as_likely_as_scoring_it_says(make: Any, method: str) -> None:
    """`score` returns the sums of the whole sequences' log probabilities, without the prompts'."""
    model = make()
    source, lengths = sources(model)
    options = replace(METHODS[method], at_limit="end")
    answers = [hypotheses[0] for hypotheses in decode(model, source, lengths, options, SPECIAL, prompts=PROMPTS)]
    counts = torch.tensor([len(answer.tokens) + 1 for answer in answers])
    target = torch.full((len(answers), int(counts.max())), PAD)
    for row, answer in zip(target, answers, strict=True):
        row[: len(answer.tokens) + 1] = torch.tensor([*answer.tokens, END])
    scores = score(model, source, lengths, target, counts, SPECIAL, PROMPTS)
    for row, (answer, (total, count)) in enumerate(zip(answers, scores, strict=True)):
        whole = torch.tensor([[*PROMPTS[row], *answer.tokens]])
        logs = model.logits(source[[row]], whole).detach().log_softmax(-1)[0, -count:]
        expected = float(logs.gather(1, target[row, :count, None]).sum())
        assert total == pytest.approx(expected, abs=EXACT) == pytest.approx(answer.log_probability, abs=EXACT)


def test_without_prompts_an_answer_continues_the_begin_token() -> None:
    model = LanguageModel()
    source, lengths = sources(model)
    begin = [[SPECIAL.begin]] * len(PROMPTS)
    for options in METHODS.values():
        expected = decode(model, source, lengths, options, SPECIAL)
        assert decode(model, source, lengths, options, SPECIAL, prompts=begin) == expected
    assert {len(shape) for shape in model.shapes} == {1}


def test_a_prompt_may_contain_ids_that_answers_may_not() -> None:
    model = LanguageModel()
    source, lengths = sources(model)
    ((answer,),) = decode(model, source[:1], lengths[:1], METHODS["greedy"], SPECIAL, prompts=[[PAD, END, 3]])
    assert answer.tokens and not {PAD, END} & {*answer.tokens}


@pytest.mark.parametrize("method", ["greedy", "sample"])
def test_each_step_reports_its_tokens(method: str) -> None:
    """Joined by hypothesis, they are the answers with their ends."""
    model, options = LanguageModel(), METHODS[method]
    reports: dict[int, list[int]] = {}

    def report(rows: Tensor, tokens: Tensor) -> None:
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            reports.setdefault(row, []).append(token)

    prompts = [PROMPTS[0], [1, 1, 1]]
    nothing, lengths = torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    answers = decode(model, nothing, lengths, options, SPECIAL, [0, 1], prompts, report)
    hypotheses = [each for row in answers for each in row]
    assert len(reports) == len(hypotheses) == 2 * options.candidates
    for row, each in enumerate(hypotheses):
        assert reports[row] == [*each.tokens, *[END] * each.ended]
