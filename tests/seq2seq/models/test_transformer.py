"""The translator's model: initialisation, invariances, and decoding with and without a cache."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.config.check import build
from common.config.compose import configure
from common.decoding.contract import Hypothesis
from common.decoding.decode import decode
from common.decoding.given import score
from common.errors import UserError
from common.machine.seeds import generator
from seq2seq.models.transformer import PositionOptions, Transformer, TranslatorBlockOptions
from seq2seq.tokenizers.bpe import BOS, EOS, PAD, SPECIAL
from tests.translating import (
    BEAM,
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

BLOCKS = {"pre_norm": False, "dropout": 0.0, "attention_dropout": 0.0, "hidden_dropout": 0.0, "norm_eps": 1e-5}
DIMENSIONS: dict[str, Any] = {
    "vocabularies": (24, 24),
    "joint": True,
    "width": 16,
    "heads": 4,
    "feedforward": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "tied": "all",
    "scaled": True,
    "output_bias": False,
    "longest": 64,
}
both_orders = pytest.mark.parametrize("pre_norm", [False, True], ids=["post-norm", "pre-norm"])


def translator(**changes: Any) -> Transformer:
    """A newly initialised model."""
    blocks = {**BLOCKS, "activation": "relu"} | {key: changes.pop(key) for key in {*changes} & {*BLOCKS}}
    positions = PositionOptions(layout=changes.pop("layout", "interleaved"), first=changes.pop("first", 0))
    return Transformer(**DIMENSIONS | changes, positions=positions, blocks=TranslatorBlockOptions(**blocks))


def randomised(ends: float = 0.0, dtype: torch.dtype = torch.float64, **changes: Any) -> Transformer:
    """A model with random parameters, large enough to distinguish tokens; `ends` is added to the logit of EOS."""
    model = translator(output_bias=True, **changes).to(dtype).eval()
    rng = generator("translator", 1)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.3, generator=rng)
    model.output_bias.data[EOS] += ends
    return model


# Initialisation.


def test_the_initialisation_is_that_of_the_authors_code() -> None:
    """Matrices have Xavier's bounds, sqrt(6 / (in + out)), and embeddings a variance of 1/width."""
    torch.manual_seed(0)
    model = translator(width=64, feedforward=96, vocabularies=(500, 400), joint=False, tied="none", output_bias=True)
    checked = 0
    for name, parameter in model.named_parameters():
        if "embedding" in name or name == "output.weight":
            assert float(parameter.detach().std()) == pytest.approx(1 / 8, rel=0.03), name
            assert float(parameter.detach().mean()) == pytest.approx(0, abs=0.003), name
        elif parameter.ndim == 2:
            for matrix in parameter.detach().chunk(3 if "in_proj" in name else 1):
                bound = math.sqrt(6 / sum(matrix.shape))
                assert 0.98 * bound < float(matrix.abs().max()) <= bound, name
                assert float(matrix.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05), name
                checked += 1
        else:
            assert (parameter == float(name.endswith("norm.weight"))).all(), name
    assert checked == 2 * (4 + 2) + 2 * (8 + 2)


def test_tied_embeddings_and_outputs_share_one_matrix_and_others_do_not() -> None:
    """With 20 source and 24 target entries; a tied matrix has gradients of both embeddings and logits."""
    kinds = {
        "all": {"embedding.weight": 24},
        "target": {"embedding.weight": 24, "source_embedding.weight": 20},
        "none": {"embedding.weight": 24, "source_embedding.weight": 20, "output.weight": 24},
    }
    for tied, entries in kinds.items():
        vocabularies = (
            {"vocabularies": (24, 24), "joint": True} if tied == "all" else {"vocabularies": (20, 24), "joint": False}
        )
        model = translator(tied=tied, **vocabularies).double()
        tables = {name: len(p) for name, p in model.named_parameters() if "embedding" in name or "output" in name}
        assert tables == entries
        source, lengths = sentences([4, 3], 20)
        target, _ = sentences([5, 2])
        logits = model(source, lengths, shifted(target))
        assert logits.shape == (2, 5, 24)
        logits.square().sum().backward()
        used = model.embedding.weight.grad.abs().sum(1) > 0
        expected = torch.zeros(24, dtype=torch.bool)
        expected[shifted(target)] = True
        if tied != "none":
            expected[:] = True  # as a row of the output
        assert torch.equal(used, expected)


@pytest.mark.parametrize(
    ("preset", "width", "feedforward", "layers", "pre_norm"),
    [
        ("seq2seq", 128, 256, 3, True),
        ("transformer_tiny", 128, 256, 4, False),
        ("transformer_iwslt", 512, 1024, 6, False),
        ("transformer_base", 512, 2048, 6, False),
        ("transformer_big", 1024, 4096, 6, False),
    ],
)
def test_presets_have_as_many_parameters_as_counted_by_hand(
    preset: str, width: int, feedforward: int, layers: int, pre_norm: bool
) -> None:
    """With 37,000 joint entries: 63,082,496 of the base model, 214,245,376 of the big one (the paper: 65 and 213 M)."""
    entries = 37000
    attention = 4 * (width * width + width)
    feed_forward = 2 * width * feedforward + feedforward + width
    norm = 2 * width
    blocks = (attention + feed_forward + 2 * norm) + (2 * attention + feed_forward + 3 * norm)
    expected = entries * width + layers * blocks + 2 * norm * pre_norm
    published = {"transformer_base": 63_082_496, "transformer_big": 214_245_376}
    assert expected == published.get(preset, expected)
    with torch.device("meta"):
        model = build(configure("train", [f"model={preset}"])["model"], vocabularies=(entries, entries), joint=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_a_seed_gives_the_same_initial_values_again_and_another_seed_does_not() -> None:
    def initial_values(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(translator().parameters()).detach()

    assert torch.equal(initial_values(1), initial_values(1))
    assert not torch.equal(initial_values(1), initial_values(2))


def test_dropout_applies_to_both_sums_of_embeddings_and_to_every_sublayers_output() -> None:
    model = translator(dropout=0.5).train()
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p == 0.5:
            module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    source, lengths = sentences([4, 3])
    model(source, lengths, shifted(source))
    names = [f"{part}.blocks.{i}.residuals.{j}.dropout" for part, count in (("encoder", 2), ("decoder", 3))
              for i in range(2) for j in range(count)]  # fmt: skip
    assert calls == {"dropout": 2} | dict.fromkeys(names, 1)


def test_embeddings_are_scaled_and_positions_are_added_unscaled() -> None:
    """At position 0, sines are 0 and cosines are 1."""
    for scaled, factor in ((True, 4.0), (False, 1.0)):
        model = translator(scaled=scaled)
        x = model._embed(torch.tensor([[7]]), model.embedding)[0, 0]
        expected = factor * model.embedding.weight[7] + torch.tensor([0.0, 1.0] * 8)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)


# Invariances.


@both_orders
def test_padding_and_the_rest_of_the_batch_change_nothing(pre_norm: bool) -> None:
    model = randomised(pre_norm=pre_norm)
    lengths = [6, 1, 3, 9]
    source, counts = sentences(lengths)
    target = shifted(sentences([4, 7, 1, 5])[0])
    together = model(source, counts, target)
    for i, (length, tokens) in enumerate(zip(lengths, [4, 7, 1, 5], strict=True)):
        alone = model(source[i : i + 1, :length], counts[i : i + 1], target[i : i + 1, :tokens])
        torch.testing.assert_close(together[i : i + 1, :tokens], alone, rtol=0, atol=EXACT)
    padded = torch.cat([source, source.new_full((4, 5), PAD)], 1)
    torch.testing.assert_close(model(padded, counts, target), together, rtol=0, atol=EXACT)
    words_as_padding = torch.where(torch.arange(9) < counts[:, None], source, 11)  # only lengths define padding
    torch.testing.assert_close(model(words_as_padding, counts, target), together, rtol=0, atol=EXACT)


@pytest.mark.parametrize("method", SEARCHES)
def test_a_translation_does_not_depend_on_its_batch(method: str) -> None:
    model, options = randomised(ends=1.0), SEARCHES[method]
    lengths = [6, 1, 3, 9, 2, 12, 5]
    source, counts = sentences(lengths, padding=3)
    ids = [10 + i for i in range(len(lengths))]
    answers = decode(model, source, counts, options, SPECIAL, ids)
    alone = [
        decode(model, source[[i], :length], counts[[i]], options, SPECIAL, [ids[i]])[0]
        for i, length in enumerate(lengths)
    ]
    assert_close(answers, alone)
    assert_close(decode(model, source.flip(0), counts.flip(0), options, SPECIAL, ids[::-1])[::-1], answers)
    assert len({len(answer.tokens) for answer in itertools.chain(*answers)}) > 2


def test_scores_of_given_targets_do_not_depend_on_the_batch_and_are_those_of_forward() -> None:
    model = randomised()
    lengths, tokens = [6, 1, 3, 9], [4, 7, 1, 5]
    (source, counts), (target, target_counts) = sentences(lengths, padding=2), sentences(tokens, padding=1)
    scores = score(model, source, counts, target, target_counts, SPECIAL)
    logs = model(source, counts, shifted(target)).log_softmax(-1).gather(2, target[..., None])[..., 0]
    for i, (total, count) in enumerate(scores):
        assert count == tokens[i]
        assert total == pytest.approx(float(logs[i, :count].detach().sum()), abs=EXACT)
        (alone,) = score(
            model, source[[i], : lengths[i]], counts[[i]], target[[i], :count], target_counts[[i]], SPECIAL
        )
        assert alone == (pytest.approx(total, abs=EXACT), count)


@both_orders
def test_the_future_changes_nothing(pre_norm: bool) -> None:
    model = randomised(pre_norm=pre_norm)
    source, counts = sentences([5, 3])
    target = shifted(sentences([8, 8])[0])
    logits = model(source, counts, target)
    for t in range(1, 8):
        changed_target = target.clone()
        changed_target[:, t] = 4 + (changed_target[:, t] - 3) % 20  # another word
        changed = model(source, counts, changed_target)
        torch.testing.assert_close(changed[:, :t], logits[:, :t], rtol=0, atol=EXACT)
        assert ((changed - logits)[:, t:].abs().amax(-1) > 1e-6).all(), "the past changes what follows"


def test_every_word_and_its_position_in_the_source_change_the_logits() -> None:
    """The control of the invariances above."""
    model = randomised()
    source, counts = sentences([5])
    target = shifted(sentences([4])[0])
    logits = model(source, counts, target)
    for i in range(5):
        changed_source = source.clone()
        changed_source[0, i] = 4 + (changed_source[0, i] - 3) % 20
        assert (model(changed_source, counts, target) - logits).abs().max() > 1e-3
    swapped = source[:, [1, 0, 2, 3, 4]]
    assert source[0, 0] != source[0, 1] and (model(swapped, counts, target) - logits).abs().max() > 1e-3


def test_a_beam_of_one_is_greedy() -> None:
    model = randomised(ends=0.5)
    pairs = sentences([6, 1, 3, 9, 2, 12, 5, 8])
    assert_close(
        decode(model, *pairs, replace(BEAM, beam=1, candidates=1), SPECIAL), decode(model, *pairs, GREEDY, SPECIAL)
    )


def test_autocast_to_bf16_gives_almost_the_same_logits() -> None:
    model = randomised(dtype=torch.float32)
    (source, counts), (target, _) = sentences([5, 3]), sentences([6, 2])
    expected = model(source, counts, shifted(target))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(source, counts, shifted(target)).float()
    assert 0 < (logits - expected).norm() < 0.05 * expected.norm()  # 8 bits in each of a dozen products


# With a cache and without.


# float32: sums of some dozens of terms of size one through four layers
precisions = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, EXACT)])


@precisions
@pytest.mark.parametrize("method", SEARCHES)
def test_a_search_with_a_cache_gives_the_same_as_without(method: str, dtype: torch.dtype, tolerance: float) -> None:
    model = randomised(ends=1.0, dtype=dtype, pre_norm=method == "greedy", first=2, layout="halves_t2t")
    compared, (source, lengths) = Compared(model, tolerance), sentences([6, 1, 3, 9, 2, 12, 5, 8])
    options = replace(SEARCHES[method], longest_extra=12)
    answers = decode(compared, source, lengths, options, SPECIAL)
    expected = decode(Uncached(model), source, lengths, options, SPECIAL)
    for pair in zip(answers, expected, strict=True):
        assert all(a.tokens == b.tokens for a, b in zip(*pair, strict=True))
    assert len(compared.rows) > 8 and compared.rows[-1] < max(compared.rows), "sentences leave the batch"


@precisions
@both_orders
def test_hypotheses_may_be_reordered_repeated_and_omitted(pre_norm: bool, dtype: torch.dtype, tolerance: float) -> None:
    check_reordering(randomised(dtype=dtype, pre_norm=pre_norm), tolerance)


@pytest.mark.parametrize(("penalty", "alpha"), [("none", 1.0), ("average", 1.0), ("gnmt", 0.6)])
@torch.no_grad()
def test_a_wide_beam_finds_every_translation_in_order(penalty: Any, alpha: float) -> None:
    """Two words and UNK, at most three of them before the end: 1 + 3 + 9 + 27 translations of each sentence."""
    model = randomised(vocabularies=(6, 6))
    source, lengths = sentences([4, 1, 3], vocabulary=6)
    options = replace(BEAM, beam=40, candidates=40, longest_factor=0.0, longest_extra=4, penalty=penalty, alpha=alpha)
    answers = decode(model, source, lengths, options, SPECIAL)
    for i, hypotheses in enumerate(answers):
        expected = []
        for words in itertools.chain.from_iterable(itertools.product((3, 4, 5), repeat=n) for n in range(4)):
            target_in = torch.tensor([[BOS, *words]])
            logs = model(source[[i]], lengths[[i]], target_in)[0].log_softmax(-1)
            total = sum(float(logs[n, word]) for n, word in enumerate((*words, EOS)))
            expected.append(Hypothesis([*words], total / options.divisor(len(words) + 1), total, True))
        assert_close([hypotheses], [sorted(expected, key=lambda hypothesis: -hypothesis.score)])


def test_each_layer_has_its_own_cache_and_the_memory_is_stored_once_for_each_sentence() -> None:
    model = randomised()
    state = model.encode(*sentences([4, 3]))
    model.step(state, torch.tensor([BOS, BOS]))
    state = model.reorder(state, torch.tensor([0, 0, 0, 1, 1, 1]))
    model.step(state, torch.tensor([4, 5, 6, 7, 8, 9]))
    assert len(state.caches) == 2 and state.tokens == 2
    for cache in state.caches:
        assert [tuple(tensor.shape) for tensor in cache.memory.content()] == [(2, 4, 4, 4)] * 2
        assert [tuple(tensor.shape) for tensor in cache.own.content()] == [(2, 4, 1 + 3, 4)] * 2


# Mistakes.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 16, "heads": 3}, "model.width=16 must be even and divisible by model.heads=3"),
        ({"width": 15, "heads": 3}, "model.width=15 must be even"),
        ({"joint": False}, "model.tied=all shares one matrix .* use model.tied=target"),
    ],
)
def test_incompatible_options_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        translator(**changes)


def test_a_source_longer_than_the_limit_is_refused_and_one_at_the_limit_is_not() -> None:
    model = randomised(longest=6)
    source, lengths = sentences([6, 2])
    assert (
        model(source, lengths, source).shape == (2, 6, 24) and len(decode(model, source, lengths, GREEDY, SPECIAL)) == 2
    )
    source, lengths = sentences([7, 2])
    for translate in (lambda: model(source, lengths, source), lambda: decode(model, source, lengths, GREEDY, SPECIAL)):
        with pytest.raises(UserError, match=r"has 7 tokens, more than model.longest=6; split it"):
            translate()
