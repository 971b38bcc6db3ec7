"""The decoder-only translator against a plain computation, its invariances, and decoding with and without a cache."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.decoding.decode import decode
from common.decoding.given import score
from common.errors import UserError
from common.machine.seeds import generator
from common.nn.positions import sine
from seq2seq.models.prefix_lm import PrefixLm
from seq2seq.models.transformer import TranslatorBlockOptions
from seq2seq.tokenizers.bpe import BOS, PAD, SPECIAL
from tests import translating
from tests.translating import ENTRIES, Uncached, assert_close, check_reordering, sentences, shifted

WIDTH, HEADS, FEEDFORWARD, LAYERS = 16, 4, 24, 2
EXACT = {"rtol": 0, "atol": 1e-10}  # float64, two layers with values of size ten
BLOCKS: dict[str, Any] = {"dropout": 0.0, "attention_dropout": 0.0, "hidden_dropout": 0.0, "norm_eps": 1e-5}
SEARCHES = {method: replace(options, longest_extra=8) for method, options in translating.SEARCHES.items()}
variants = pytest.mark.parametrize(
    ("prefix", "target_positions", "pre_norm"),
    [("full", "restart", True), ("full", "continue", False), ("causal", "continue", True), ("causal", "restart", True)],
)


def build_model(pre_norm: bool = True, **changes: Any) -> PrefixLm:
    shape = {"width": WIDTH, "heads": HEADS, "feedforward": FEEDFORWARD, "layers": LAYERS, "longest": 64}
    data = {"vocabularies": (ENTRIES, ENTRIES), "joint": True, "prefix": "full", "target_positions": "restart"}
    blocks = TranslatorBlockOptions(**BLOCKS, pre_norm=pre_norm, activation="relu")
    return PrefixLm(**{**shape, **data, **changes}, blocks=blocks)


def randomised(dtype: torch.dtype = torch.float64, **changes: Any) -> PrefixLm:
    """A model with random parameters, large enough to distinguish tokens."""
    model = build_model(**changes).to(dtype).eval()
    rng = generator("prefix")
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.3, generator=rng)
    return model


def other(words: Tensor) -> Tensor:
    """Another word in place of each."""
    return 4 + (words - 3) % 20


# A plain computation.


def plain_logits(model: PrefixLm, source: list[int], target_in: list[int]) -> Tensor:
    """The logits (T, V) of one sentence, by the formulas of a pre-norm decoder with an explicit mask."""
    count, length = len(source), len(source) + len(target_in)
    places = [*range(count), *range(count if model.target_positions == "continue" else 0, length)][:length]
    sees = torch.zeros(length, length, dtype=torch.bool)
    for i, j in itertools.product(range(length), range(length)):
        sees[i, j] = j <= i or (model.prefix == "full" and j < count and i < count)
    weights = dict(model.named_parameters())
    x = weights["embedding.weight"][source + target_in]
    x = x + weights["segment_embedding.weight"][[0] * count + [1] * len(target_in)]
    x = x * math.sqrt(WIDTH) + sine(torch.tensor(places).float(), WIDTH)
    for i in range(LAYERS):
        block = f"decoder.blocks.{i}."

        def linear(x: Tensor, name: str, block: str = block) -> Tensor:
            return x @ weights[f"{block}{name}.weight"].T + weights[f"{block}{name}.bias"]

        def norm(x: Tensor, name: str) -> Tensor:
            return F.layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"])

        q, k, v = (
            part.view(length, HEADS, -1).transpose(0, 1)
            for part in linear(norm(x, f"{block}residuals.0.norm"), "attention.in_proj").chunk(3, -1)
        )
        scores = (q @ k.transpose(1, 2) / math.sqrt(WIDTH // HEADS)).masked_fill(~sees, -math.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), "attention.out_proj")
        hidden = linear(norm(x, f"{block}residuals.1.norm"), "feed_forward.expand").relu()
        x = x + linear(hidden, "feed_forward.contract")
    return (norm(x, "decoder.norm") @ weights["embedding.weight"].T)[count:]


@pytest.mark.parametrize("prefix", ["full", "causal"])
@pytest.mark.parametrize("target_positions", ["continue", "restart"])
def test_logits_and_gradients_of_padded_batches_are_those_of_a_plain_computation(
    prefix: str, target_positions: str
) -> None:
    model = randomised(prefix=prefix, target_positions=target_positions)
    lengths, counts = [6, 1, 3, 9], [4, 7, 1, 5]
    source, target_in = sentences(lengths, padding=2)[0], shifted(sentences(counts, padding=1)[0])
    logits = model(source, torch.tensor(lengths), target_in)
    assert logits.shape == (4, 8, ENTRIES)
    rows = [plain_logits(model, source[i, :n].tolist(), target_in[i, :t].tolist()) for i, (n, t) in
            enumerate(zip(lengths, counts, strict=True))]  # fmt: skip
    ours = torch.cat([logits[i, :t] for i, t in enumerate(counts)])
    expected = torch.cat(rows)
    assert expected.std() > 0.3
    torch.testing.assert_close(ours, expected, **EXACT)
    direction = torch.randn(ours.shape, dtype=torch.float64, generator=generator("direction"))
    gradients = [torch.autograd.grad(x, [*model.parameters()], direction) for x in (ours, expected)]
    for ours_, expected_ in zip(*gradients, strict=True):
        assert expected_.any()
        torch.testing.assert_close(ours_, expected_, **EXACT)


def test_initial_values_are_those_of_the_translator() -> None:
    torch.manual_seed(0)
    model = build_model(vocabularies=(500, 500), width=64, feedforward=96)
    assert float(model.embedding.weight.detach().std()) == pytest.approx(1 / 8, rel=0.03)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embedding" not in name:
            for matrix in parameter.detach().chunk(3 if "in_proj" in name else 1):
                bound = math.sqrt(6 / sum(matrix.shape))
                assert 0.98 * bound < float(matrix.abs().max()) <= bound, name


# Invariances.


@variants
def test_padding_and_the_rest_of_the_batch_change_nothing(prefix: str, target_positions: str, pre_norm: bool) -> None:
    model = randomised(prefix=prefix, target_positions=target_positions, pre_norm=pre_norm)
    lengths = [6, 1, 3, 9]
    (source, counts), target = sentences(lengths), shifted(sentences([4, 7, 1, 5])[0])
    together = model(source, counts, target)
    for i, (length, tokens) in enumerate(zip(lengths, [4, 7, 1, 5], strict=True)):
        alone = model(source[i : i + 1, :length], counts[i : i + 1], target[i : i + 1, :tokens])
        torch.testing.assert_close(together[i : i + 1, :tokens], alone, **EXACT)
    padded = torch.cat([source, source.new_full((4, 5), PAD)], 1)
    torch.testing.assert_close(model(padded, counts, target), together, **EXACT)
    words_as_padding = torch.where(torch.arange(9) < counts[:, None], source, 11)  # only lengths define padding
    torch.testing.assert_close(model(words_as_padding, counts, target), together, **EXACT)


@variants
def test_the_future_changes_nothing(prefix: str, target_positions: str, pre_norm: bool) -> None:
    model = randomised(prefix=prefix, target_positions=target_positions, pre_norm=pre_norm)
    (source, counts), target = sentences([5, 3]), shifted(sentences([8, 8])[0])
    logits = model(source, counts, target)
    for t in range(1, 8):
        changed_target = target.clone()
        changed_target[:, t] = other(changed_target[:, t])
        changed = model(source, counts, changed_target)
        torch.testing.assert_close(changed[:, :t], logits[:, :t], **EXACT)
        assert ((changed - logits)[:, t:].abs().amax(-1) > 1e-6).all(), "the past changes what follows"


@variants
def test_every_source_word_changes_all_logits(prefix: str, target_positions: str, pre_norm: bool) -> None:
    """The control of the invariances above."""
    model = randomised(prefix=prefix, target_positions=target_positions, pre_norm=pre_norm)
    (source, counts), target = sentences([5]), shifted(sentences([4])[0])
    logits = model(source, counts, target)
    for i in range(5):
        changed = source.clone()
        changed[0, i] = other(changed[0, i])
        assert ((model(changed, counts, target) - logits).abs().amax(-1) > 1e-4).all()


@torch.no_grad()
@pytest.mark.parametrize(("prefix", "later_words_count"), [("full", True), ("causal", False)])
def test_only_with_a_full_prefix_do_source_words_see_those_after_them(prefix: str, later_words_count: bool) -> None:
    """The keys of the first source token in the second block depend on the last token, or do not."""
    model = randomised(prefix=prefix)
    source, lengths = sentences([5])
    changed = source.clone()
    changed[0, 4] = 9
    first_keys = [model.encode(x, lengths).caches[1].own.content()[0][:, :, 0] for x in (source, changed)]
    assert ((first_keys[0] - first_keys[1]).abs().max() > 1e-4) == later_words_count


# With a cache and without.


@variants
@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_steps_are_teacher_forcing(
    prefix: str, target_positions: str, pre_norm: bool, dtype: torch.dtype, tolerance: float
) -> None:
    model = randomised(dtype, prefix=prefix, target_positions=target_positions, pre_norm=pre_norm)
    (source, lengths), target = sentences([6, 1, 3], padding=2), shifted(sentences([8, 8, 8])[0])
    expected = model(source, lengths, target)
    for given in (1, 3):
        state = model.encode(source, lengths)
        logits = [model.step(state, target[:, 0] if given == 1 else target[:, :given])]
        logits += [model.step(state, target[:, t]) for t in range(given, 8)]
        torch.testing.assert_close(torch.stack(logits, 1), expected[:, given - 1 :], rtol=0, atol=tolerance)


@variants
@pytest.mark.parametrize("method", SEARCHES)
def test_a_translation_depends_neither_on_the_cache_nor_on_its_batch(
    method: str, prefix: str, target_positions: str, pre_norm: bool
) -> None:
    model = randomised(prefix=prefix, target_positions=target_positions, pre_norm=pre_norm)
    options, lengths = SEARCHES[method], [6, 1, 3, 9, 2, 12, 5]
    (source, counts), ids = sentences(lengths, padding=3), [10 + i for i in range(7)]
    answers = decode(model, source, counts, options, SPECIAL, ids)
    assert_close(decode(Uncached(model), source, counts, options, SPECIAL, ids), answers)
    alone = [
        decode(model, source[[i], :length], counts[[i]], options, SPECIAL, [ids[i]])[0]
        for i, length in enumerate(lengths)
    ]
    assert_close(alone, answers)
    assert_close(decode(model, source.flip(0), counts.flip(0), options, SPECIAL, ids[::-1])[::-1], answers)
    assert len({tuple(answer.tokens) for answer in itertools.chain(*answers)}) > 4


@variants
def test_hypotheses_may_be_reordered_repeated_and_omitted(prefix: str, target_positions: str, pre_norm: bool) -> None:
    check_reordering(randomised(prefix=prefix, target_positions=target_positions, pre_norm=pre_norm), EXACT["atol"])


@torch.no_grad()
def test_scores_of_given_targets_are_those_of_forward() -> None:
    model = randomised()
    (source, counts), (target, target_counts) = sentences([6, 1, 3], padding=2), sentences([4, 7, 1], padding=1)
    scores = score(model, source, counts, target, target_counts, SPECIAL)
    logs = model(source, counts, shifted(target)).log_softmax(-1).gather(2, target[..., None])[..., 0]
    for i, (total, count) in enumerate(scores):
        assert total == pytest.approx(float(logs[i, :count].sum()), abs=1e-10)


@torch.no_grad()
def test_the_source_is_stored_once_for_all_its_hypotheses() -> None:
    model = randomised()
    state = model.encode(*sentences([4, 3]))
    model.step(state, torch.tensor([BOS, BOS]))
    state = model.reorder(state, torch.tensor([0, 0, 0, 1, 1, 1]))
    model.step(state, torch.tensor([4, 5, 6, 7, 8, 9]))
    for cache in state.caches:
        assert [tuple(tensor.shape) for tensor in cache.own.content()] == [(2, 4, 4 + 1 + 3, 4)] * 2


# Mistakes.


def test_incompatible_options_and_long_sources_are_refused() -> None:
    with pytest.raises(UserError, match=r"model.width=16 must be even and divisible by model.heads=3"):
        build_model(heads=3)
    with pytest.raises(UserError, match=r"data.tokenizer.joint=false gives each its own; use data.tokenizer.joint"):
        build_model(joint=False)
    model = randomised(longest=6)
    source, lengths = sentences([7, 2])
    for call in (lambda: model(source, lengths, source), lambda: model.encode(source, lengths)):
        with pytest.raises(UserError, match=r"has 7 tokens, more than model.longest=6; split it"):
            call()
