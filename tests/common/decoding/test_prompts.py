"""Answers that continue a prompt, by a translator and by a language model whose special ids are others."""

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
SPECIAL = SpecialIds(begin=END, end=END, never=(PAD,))  # as in GPT-2, one id begins and ends a text
PROMPTS = [[3, 5, 1], [END], [2, 2], [END, 4, 0], [9]]
OPTIONS = replace(BEAM, beam=3, stop="never", candidates=1, longest_extra=4, at_limit="cut")
METHODS = {
    "greedy": replace(OPTIONS, method="greedy"),
    "beam": replace(OPTIONS, candidates=3),
    "sample": replace(OPTIONS, method="sample", candidates=3),
}
EXACT = 1e-9  # of log probabilities in float64


def spread(model: torch.nn.Module) -> None:
    """Large random matrices, so that answers depend on the prompt."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter)


class LanguageModel:
    """transformers' GPT-2 with its cache behind our contract."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=ENTRIES, n_positions=32, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=False
        )
        self.model = GPT2LMHeadModel(config).double().eval()
        spread(self.model)
        self.shapes: list[tuple[int, ...]] = []  # of each step's tokens

    def logits(self, source: Tensor, words: Tensor) -> Tensor:
        """Without a cache: tokens (B, N) -> (B, N, V)."""
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
    """Our Transformer, whose special ids are no business of the model's."""

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
        spread(self.model.eval())
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
    """Every answer there is, best first, from whole sequences without a cache."""
    answers = []

    def follow(words: list[int], total: float) -> None:
        logs = model.logits(source[None], torch.tensor([[*prompt, *words]]))[0, -1].log_softmax(0).tolist()
        n = len(words) + 1
        for word in (word for word in range(ENTRIES) if word not in SPECIAL.never):
            now = total + logs[word]
            if word == END or n == options.longest_extra:
                tokens = words if word == END else [*words, word]
                answers.append(Hypothesis(tokens, now / options.divisor(n), now, word == END))
            else:
                follow([*words, word], now)

    follow([], 0.0)
    return sorted(answers, key=lambda answer: -answer.score)


def close(some: list[list[Hypothesis]], others: list[list[Hypothesis]]) -> None:
    assert [[one.tokens for one in each] for each in some] == [[one.tokens for one in each] for each in others]
    for one, other in zip(itertools.chain(*some), itertools.chain(*others), strict=True):
        assert one.score == pytest.approx(other.score, abs=EXACT) and one.ended == other.ended


models = pytest.mark.parametrize("make", [LanguageModel, Translator])


@models
def test_a_wide_beam_finds_every_answer_to_a_prompt_in_order(make: Any) -> None:
    """Ten words and the end, and at most two tokens: 111 answers to each prompt."""
    model = make()
    source, lengths = sources(model)
    options = replace(OPTIONS, beam=111, candidates=111, longest_extra=2)
    answers = decode(model, source, lengths, options, SPECIAL, prompts=PROMPTS)
    close(answers, [exhaustive(model, *pair, options) for pair in zip(source, PROMPTS, strict=True)])
    assert {len(each) for each in answers} == {111}


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
def test_prompts_of_other_lengths_in_the_batch_change_nothing(make: Any, method: str) -> None:
    model = make()
    source, lengths = sources(model)
    ids = ["a", "b", "c", "d", "e"]
    answers = decode(model, source, lengths, METHODS[method], SPECIAL, ids, PROMPTS)
    alone = [
        decode(model, source[[i]], lengths[[i]], METHODS[method], SPECIAL, [ids[i]], [prompt])[0]
        for i, prompt in enumerate(PROMPTS)
    ]
    close(answers, alone)
    assert len({tuple(one.tokens) for each in answers for one in each}) > 2
    assert {len(shape) for shape in model.shapes} == {1, 2} and (1, 1) not in model.shapes


@models
@pytest.mark.parametrize("method", METHODS)
def test_an_answer_to_a_prompt_is_as_likely_as_scoring_it_says(make: Any, method: str) -> None:
    """`score` gives the sums of the whole sequences' log probabilities, without the prompts'."""
    model = make()
    source, lengths = sources(model)
    options = replace(METHODS[method], at_limit="end")
    answers = [each[0] for each in decode(model, source, lengths, options, SPECIAL, prompts=PROMPTS)]
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


def test_without_prompts_an_answer_continues_the_begin() -> None:
    model = LanguageModel()
    source, lengths = sources(model)
    begin = [[SPECIAL.begin]] * len(PROMPTS)
    for options in METHODS.values():
        expected = decode(model, source, lengths, options, SPECIAL)
        assert decode(model, source, lengths, options, SPECIAL, prompts=begin) == expected
    assert {len(shape) for shape in model.shapes} == {1}


def test_a_prompt_may_hold_what_an_answer_never_does() -> None:
    model = LanguageModel()
    source, lengths = sources(model)
    ((answer,),) = decode(model, source[:1], lengths[:1], METHODS["greedy"], SPECIAL, prompts=[[PAD, END, 3]])
    assert answer.tokens and not {PAD, END} & {*answer.tokens}
