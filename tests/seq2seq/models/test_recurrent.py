"""The translators with recurrent decoders: invariances, decoding step by step, initialisation and mistakes."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from common.config.check import build
from common.config.compose import configure
from common.decoding.contract import Hypothesis
from common.decoding.decode import decode
from common.decoding.given import score
from common.errors import UserError
from common.machine.seeds import generator
from common.nn.attention import record_attention
from seq2seq.models.bahdanau import Bahdanau
from seq2seq.models.luong import Luong
from seq2seq.models.recurrent import RecurrentTranslator
from seq2seq.models.rnn import EncoderDecoder
from seq2seq.models.rnn_contextual import ContextualEncoderDecoder
from seq2seq.tokenizers.bpe import BOS, EOS, PAD, SPECIAL
from tests.translating import (
    BEAM,
    ENTRIES,
    EXACT,
    GREEDY,
    SEARCHES,
    Compared,
    Uncached,
    assert_close,
    check_reordering,
    sentences,
    shifted,
)

WIDTH = 16
COMMON: dict[str, Any] = {
    "vocabularies": (ENTRIES, ENTRIES),
    "joint": True,
    "cell": "gru",
    "embedding_width": WIDTH,
    "width": WIDTH,
    "layers": 2,
    "dropout": 0.0,
    "tied": "none",
    "longest": 64,
    "embedding_weights": None,
}
MAXOUT = {"maxout_width": WIDTH}
ADDITIVE = {**MAXOUT, "attention_width": 12}
GLOBAL = {"bidirectional": False, "reverse_source": True, "score": "general", "input_feeding": True}
MODELS: dict[str, tuple[type[RecurrentTranslator], dict[str, Any]]] = {
    "rnn": (EncoderDecoder, {"reverse_source": True}),
    "rnn, lstm": (EncoderDecoder, {"reverse_source": False, "cell": "lstm"}),
    "contextual": (ContextualEncoderDecoder, MAXOUT),
    "contextual, lstm": (ContextualEncoderDecoder, {**MAXOUT, "cell": "lstm"}),
    "bahdanau": (Bahdanau, ADDITIVE),
    "bahdanau, lstm": (Bahdanau, {**ADDITIVE, "cell": "lstm"}),
    "luong": (Luong, GLOBAL),
    "luong, lstm, both directions": (Luong, {**GLOBAL, "cell": "lstm", "bidirectional": True, "reverse_source": False}),
    "luong, dot, no feeding": (Luong, {**GLOBAL, "score": "dot", "input_feeding": False}),
    "luong, concat": (Luong, {**GLOBAL, "score": "concat"}),
}
all_models = pytest.mark.parametrize("name", MODELS)
with_attention = pytest.mark.parametrize("name", [name for name in MODELS if "bahdanau" in name or "luong" in name])
# float32: sums of some dozens of terms of size one in each of about ten steps
precisions = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, EXACT)])


def translator(name: str, **changes: Any) -> Any:
    """A newly initialised model."""
    model, options = MODELS[name]
    return model(**COMMON | options | changes)


def randomised(name: str, ends: float = 0.0, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A model with random parameters, large enough to distinguish tokens; `ends` raises the probability of EOS."""
    model = translator(name, **changes).to(dtype).eval()
    rng = generator("translator", 1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=rng)
    model.output.weight.data *= 3
    model.output.register_forward_hook(
        lambda _, inputs, logits: logits + ends * (torch.arange(logits.shape[-1]) == EOS)
    )
    return model


# Invariances.


@all_models
def test_padding_and_the_rest_of_the_batch_change_nothing(name: str) -> None:
    model = randomised(name)
    lengths, tokens = [6, 1, 3, 9], [4, 7, 1, 5]
    source, counts = sentences(lengths)
    target = shifted(sentences(tokens)[0])
    together = model(source, counts, target)
    for i, (length, count) in enumerate(zip(lengths, tokens, strict=True)):
        alone = model(source[i : i + 1, :length], counts[i : i + 1], target[i : i + 1, :count])
        torch.testing.assert_close(together[i : i + 1, :count], alone, rtol=0, atol=EXACT)
    padded = torch.cat([source, source.new_full((4, 5), PAD)], 1)
    torch.testing.assert_close(model(padded, counts, target), together, rtol=0, atol=EXACT)
    words_as_padding = torch.where(torch.arange(9) < counts[:, None], source, 11)  # only lengths define padding
    torch.testing.assert_close(model(words_as_padding, counts, target), together, rtol=0, atol=EXACT)


@all_models
def test_the_future_changes_nothing(name: str) -> None:
    model = randomised(name)
    source, counts = sentences([5, 3])
    target = shifted(sentences([8, 8])[0])
    logits = model(source, counts, target)
    for t in range(1, 8):
        changed_target = target.clone()
        changed_target[:, t] = 4 + (changed_target[:, t] - 3) % 20  # another word
        changed = model(source, counts, changed_target)
        torch.testing.assert_close(changed[:, :t], logits[:, :t], rtol=0, atol=EXACT)
        assert ((changed - logits)[:, t:].abs().amax(-1) > 1e-8).all(), "the past changes what follows"


@all_models
def test_every_word_and_the_order_of_the_source_change_the_logits(name: str) -> None:
    """The control of the invariances above."""
    model = randomised(name)
    source, counts = sentences([5])
    target = shifted(sentences([4])[0])
    logits = model(source, counts, target)
    for i in range(5):
        changed_source = source.clone()
        changed_source[0, i] = 4 + (changed_source[0, i] - 3) % 20
        assert (model(changed_source, counts, target) - logits).abs().max() > 1e-4
    swapped = source[:, [1, 0, 2, 3, 4]]
    assert source[0, 0] != source[0, 1] and (model(swapped, counts, target) - logits).abs().max() > 1e-4


@all_models
@pytest.mark.parametrize("method", SEARCHES)
def test_a_translation_does_not_depend_on_its_batch(name: str, method: str) -> None:
    model, options = randomised(name, ends=1.0), SEARCHES[method]
    lengths = [6, 1, 3, 9, 2]
    source, counts = sentences(lengths, padding=3)
    ids = [10 + i for i in range(len(lengths))]
    answers = decode(model, source, counts, options, SPECIAL, ids)
    alone = [
        decode(model, source[[i], :length], counts[[i]], options, SPECIAL, [ids[i]])[0]
        for i, length in enumerate(lengths)
    ]
    assert_close(answers, alone)
    assert len({len(answer.tokens) for answer in itertools.chain(*answers)}) > 1


@all_models
def test_scores_of_given_targets_are_those_of_forward(name: str) -> None:
    model = randomised(name)
    (source, counts), (target, target_counts) = sentences([6, 1, 3, 9], padding=2), sentences([4, 7, 1, 5], padding=1)
    scores = score(model, source, counts, target, target_counts, SPECIAL)
    logs = model(source, counts, shifted(target)).log_softmax(-1).gather(2, target[..., None])[..., 0]
    for i, (total, count) in enumerate(scores):
        assert count == [4, 7, 1, 5][i]
        assert total == pytest.approx(float(logs[i, :count].detach().sum()), abs=EXACT)


# Step by step.


@all_models
@precisions
@pytest.mark.parametrize("method", SEARCHES)
def test_every_step_of_a_search_gives_the_logits_of_teacher_forcing(
    name: str, method: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = randomised(name, ends=-1.0, dtype=dtype)
    compared, (source, lengths) = Compared(model, tolerance), sentences([6, 1, 3, 9, 2, 12, 5, 8])
    options = replace(SEARCHES[method], longest_extra=9)
    answers = decode(compared, source, lengths, options, SPECIAL)
    expected = decode(Uncached(model), source, lengths, options, SPECIAL)
    for pair in zip(answers, expected, strict=True):
        assert all(a.tokens == b.tokens for a, b in zip(*pair, strict=True))
    assert len(compared.rows) > 4 and compared.rows[-1] < max(compared.rows), "sentences leave the batch"


@all_models
def test_hypotheses_may_be_reordered_repeated_and_omitted(name: str) -> None:
    check_reordering(randomised(name), EXACT)


@all_models
@torch.no_grad()
def test_sentences_may_be_reordered(name: str) -> None:
    model, (source, lengths), targets = randomised(name), sentences([4, 2, 3]), shifted(sentences([5, 5, 5])[0])
    state, order = model.encode(source, lengths), torch.tensor([2, 0, 1])
    model.step(state, targets[:, :4])
    logits = model.step(model.reorder(state, order), targets[order, 4])
    expected = model(source[order], lengths[order], targets[order])[:, -1]
    torch.testing.assert_close(logits, expected, rtol=0, atol=EXACT)


@all_models
@torch.no_grad()
def test_a_prompt_of_several_tokens_is_that_many_steps(name: str) -> None:
    model, (source, lengths) = randomised(name), sentences([4, 2, 3])
    prompts = shifted(sentences([5, 5, 5])[0])
    state = model.encode(source, lengths)
    torch.testing.assert_close(model.step(state, prompts), model(source, lengths, prompts)[:, -1], rtol=0, atol=EXACT)
    following = torch.tensor([7, 8, 9])
    expected = model(source, lengths, torch.cat([prompts, following[:, None]], 1))[:, -1]
    torch.testing.assert_close(model.step(state, following), expected, rtol=0, atol=EXACT)


@all_models
@torch.no_grad()
def test_a_wide_beam_finds_every_translation_in_order(name: str) -> None:
    """Two words and UNK, at most two of them before the end: 1 + 3 + 9 translations of each sentence."""
    model = randomised(name, vocabularies=(6, 6))
    source, lengths = sentences([4, 1, 3], vocabulary=6)
    options = replace(BEAM, beam=20, candidates=20, longest_factor=0.0, longest_extra=3)
    for i, hypotheses in enumerate(decode(model, source, lengths, options, SPECIAL)):
        expected = []
        for words in itertools.chain.from_iterable(itertools.product((3, 4, 5), repeat=n) for n in range(3)):
            logs = model(source[[i]], lengths[[i]], torch.tensor([[BOS, *words]]))[0].log_softmax(-1)
            total = sum(float(logs[n, word]) for n, word in enumerate((*words, EOS)))
            expected.append(Hypothesis([*words], total / options.divisor(len(words) + 1), total, True))
        assert_close([hypotheses], [sorted(expected, key=lambda hypothesis: -hypothesis.score)])


@with_attention
def test_the_memory_and_its_keys_are_stored_once_for_each_sentence(name: str) -> None:
    model = randomised(name)
    state = model.encode(*sentences([4, 3]))
    model.step(state, torch.tensor([BOS, BOS]))
    keys = state.keys
    state = model.reorder(state, torch.tensor([0, 0, 0, 1, 1, 1]))
    model.step(state, torch.tensor([4, 5, 6, 7, 8, 9]))
    assert state.memory.shape[:2] == state.keys.shape[:2] == state.real.shape == (2, 4)
    assert state.keys is keys, "neither copied nor computed again"
    assert all(part.shape == (6, WIDTH) for layer in state.hidden for part in layer)
    state = model.reorder(state, torch.tensor([4, 4]))
    assert state.memory.shape[0] == 1 and torch.equal(state.keys, keys[1:])


# Attention.


@with_attention
def test_the_recorded_attention_is_a_distribution_over_the_real_source_of_each_sentence(name: str) -> None:
    model = randomised(name)
    (source, lengths), (target, _) = sentences([6, 2, 9], padding=2), sentences([4, 4, 3])
    with record_attention(model) as maps:
        model(source, lengths, shifted(target))
    (recorded,) = maps.values()
    attention = torch.cat(recorded, 2)
    assert [*maps] == ["cross_attention"] and attention.shape == (3, 1, 4, 11)
    torch.testing.assert_close(attention.sum(-1), torch.ones(3, 1, 4, dtype=torch.float64))
    for row, length in zip(attention, [6, 2, 9], strict=True):
        assert not row[..., length:].any() and (row[..., :length] > 0).all()
    assert attention[0].std() > 0.01


def test_the_memory_of_a_reversed_source_is_in_the_order_of_the_source() -> None:
    """The first word of a source is read last, so it changes only its own position of the memory."""
    model = randomised("luong, dot, no feeding", layers=1)
    source, lengths = sentences([5, 3])
    changed = source.clone()
    changed[0, 0] = 4 + (changed[0, 0] - 3) % 20
    state, changed_state = model.encode(source, lengths), model.encode(changed, lengths)
    differs = (state.memory - changed_state.memory).abs().amax(-1) > 1e-9  # (B, S)
    assert differs.tolist() == [[True, False, False, False, False], [False] * 5]


# Initialisation, parameters and dropout.


@pytest.mark.parametrize("preset", ["rnn", "rnn_contextual", "rnn_bahdanau", "rnn_luong"])
def test_presets_have_about_as_many_parameters_as_the_small_transformer(preset: str) -> None:
    def count(name: str) -> int:
        with torch.device("meta"):
            model = build(configure("train", [f"model={name}"])["model"], vocabularies=(2000, 2000), joint=True)
        return sum(parameter.numel() for parameter in model.parameters())

    assert count(preset) == pytest.approx(count("seq2seq"), rel=0.05)


@all_models
def test_matrices_begin_with_xaviers_bounds_and_embeddings_with_a_variance_of_one_over_their_width(name: str) -> None:
    torch.manual_seed(0)
    model = translator(name, embedding_width=32, vocabularies=(500, 400), joint=False)
    for key, parameter in model.named_parameters():
        values = parameter.detach()
        if "cells" in key:
            assert values.any() or key.endswith("bias"), key  # see the tests of recurrent layers
        elif "embedding" in key or key.startswith("output"):
            assert float(values.std()) == pytest.approx(values.shape[1] ** -0.5, rel=0.05), key
        elif values.ndim == 2:
            bound = (6 / sum(values.shape)) ** 0.5
            assert 0.5 * bound < float(values.abs().max()) <= bound, key
        else:
            assert not values.any(), key


@all_models
def test_tied_embeddings_and_outputs_share_one_matrix_and_others_do_not(name: str) -> None:
    kinds: dict[str, set[str]] = {
        "all": {"embedding.weight"},
        "target": {"embedding.weight", "source_embedding.weight"},
        "none": {"embedding.weight", "source_embedding.weight", "output.weight"},
    }
    for tied, expected in kinds.items():
        vocabularies = {} if tied == "all" else {"vocabularies": (20, ENTRIES), "joint": False}
        model = translator(name, tied=tied, **vocabularies)
        tables = {key for key, _ in model.named_parameters() if "embedding" in key or key.startswith("output.")}
        assert tables == expected
        source, lengths = sentences([4, 3], 20)
        logits = model(source, lengths, shifted(sentences([5, 2])[0]))
        assert logits.shape == (2, 5, ENTRIES)
        logits.square().sum().backward()
        unused = torch.ones(ENTRIES, dtype=torch.bool).index_fill_(0, shifted(sentences([5, 2])[0]).flatten(), False)
        assert bool(model.embedding.weight.grad[unused].any()) == (tied != "none"), "a gradient as a row of the output"


@all_models
def test_dropout_applies_to_embeddings_and_the_outputs_inputs(name: str) -> None:
    model = translator(name, dropout=0.5, layers=1).train()
    calls: list[tuple[int, ...]] = []
    model.dropout.register_forward_hook(lambda _, inputs, output: calls.append(tuple(output.shape)))
    source, lengths = sentences([4, 3])
    model(source, lengths, shifted(sentences([6, 2])[0]))
    assert calls == [(2, 4, WIDTH), (2, 6, WIDTH), (2, 6, WIDTH)]


@all_models
def test_autocast_to_bf16_gives_almost_the_same_logits(name: str) -> None:
    model = randomised(name, dtype=torch.float32)
    (source, counts), (target, _) = sentences([5, 3]), sentences([6, 2])
    expected = model(source, counts, shifted(target))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(source, counts, shifted(target)).float()
    assert 0 < (logits - expected).norm() < 0.05 * expected.norm()  # 8 bits in each of some dozen products


# Mistakes.


@all_models
def test_incompatible_options_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"model.tied=all shares one matrix .* use model.tied=target"):
        translator(name, tied="all", joint=False)
    with pytest.raises(UserError, match=r"width 16, but model.embedding_width=8; make them equal, or use"):
        translator(name, tied="target", embedding_width=8)


def test_an_odd_width_cannot_be_shared_by_two_directions() -> None:
    with pytest.raises(UserError, match=r"model.width=15 must be even with model.bidirectional=true"):
        translator("luong, lstm, both directions", width=15)


@all_models
def test_a_source_longer_than_the_limit_is_refused_and_one_at_the_limit_is_not(name: str) -> None:
    model = randomised(name, longest=6)
    source, lengths = sentences([6, 2])
    assert model(source, lengths, source).shape == (2, 6, ENTRIES)
    source, lengths = sentences([7, 2])
    for translate in (lambda: model(source, lengths, source), lambda: decode(model, source, lengths, GREEDY, SPECIAL)):
        with pytest.raises(UserError, match=r"has 7 tokens, more than model.longest=6; split it"):
            translate()
