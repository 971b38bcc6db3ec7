"""The translator's model: how it starts, what must change nothing, and its cache against no cache."""

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
from tests.searching import BEAM as OPTIONS

EXACT = 1e-10  # float64, a few layers with values of size one
GREEDY = replace(
    OPTIONS, method="greedy", beam=3, penalty="gnmt", alpha=0.6, candidates=1, longest_factor=0.5, longest_extra=5
)
BEAM, SAMPLE = replace(GREEDY, method="beam", candidates=3), replace(GREEDY, method="sample", candidates=2)
SEARCHES = {"greedy": GREEDY, "beam": BEAM, "sample": SAMPLE}
BLOCKS = {"pre_norm": False, "dropout": 0.0, "attention_dropout": 0.0, "hidden_dropout": 0.0, "norm_eps": 1e-5}
SIZES: dict[str, Any] = {
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
    """As at the start of a run."""
    blocks = {**BLOCKS, "activation": "relu"} | {key: changes.pop(key) for key in {*changes} & {*BLOCKS}}
    positions = PositionOptions(layout=changes.pop("layout", "interleaved"), first=changes.pop("first", 0))
    return Transformer(**SIZES | changes, positions=positions, blocks=TranslatorBlockOptions(**blocks))


def learnt(ends: float = 0.0, dtype: torch.dtype = torch.float64, **changes: Any) -> Transformer:
    """One with every parameter drawn, large enough to tell tokens apart; `ends` is added to the logit of EOS."""
    model = translator(output_bias=True, **changes).to(dtype).eval()
    drawn = generator("translator", 1)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.3, generator=drawn)
    model.output_bias.data[EOS] += ends
    return model


def sentences(lengths: list[int], vocabulary: int = 24, padding: int = 0) -> tuple[Tensor, Tensor]:
    """Random words, each sentence with EOS at its end, padded to the longest and by `padding` more."""
    drawn = generator("sentences", *lengths)
    rows = torch.full((len(lengths), max(lengths) + padding), PAD)
    for row, length in zip(rows, lengths, strict=True):
        row[:length] = torch.randint(4, vocabulary, (length,), generator=drawn)
        row[length - 1] = EOS
    return rows, torch.tensor(lengths)


def begun(target_out: Tensor) -> Tensor:
    """Targets shifted right, from BOS on."""
    return torch.cat([torch.full_like(target_out[:, :1], BOS), target_out[:, :-1]], 1)


def same(found: list[list[Hypothesis]], expected: list[list[Hypothesis]]) -> None:
    for some, others in zip(found, expected, strict=True):
        assert [one.tokens for one in some] == [other.tokens for other in others]
        assert [one.score for one in some] == pytest.approx([other.score for other in others], abs=EXACT)


# How it starts.


def test_first_values_are_those_of_the_authors_code() -> None:
    """Xavier's bounds, sqrt(6 / (in + out)), of every single matrix, and embeddings of variance 1/width."""
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


def test_what_is_tied_is_one_matrix_and_what_is_not_is_none() -> None:
    """Of 20 source and 24 target entries; logits and embeddings of tied matrices move together."""
    kinds = {
        "all": {"embedding.weight": 24},
        "target": {"embedding.weight": 24, "source_embedding.weight": 20},
        "none": {"embedding.weight": 24, "source_embedding.weight": 20, "output.weight": 24},
    }
    for tied, entries in kinds.items():
        sizes = (
            {"vocabularies": (24, 24), "joint": True} if tied == "all" else {"vocabularies": (20, 24), "joint": False}
        )
        model = translator(tied=tied, **sizes).double()
        tables = {name: len(p) for name, p in model.named_parameters() if "embedding" in name or "output" in name}
        assert tables == entries
        source, lengths = sentences([4, 3], 20)
        target, _ = sentences([5, 2])
        logits = model(source, lengths, begun(target))
        assert logits.shape == (2, 5, 24)
        logits.square().sum().backward()
        used = model.embedding.weight.grad.abs().sum(1) > 0
        seen = torch.zeros(24, dtype=torch.bool)
        seen[begun(target)] = True
        if tied != "none":
            seen[:] = True  # as a row of the output
        assert torch.equal(used, seen)


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
    feed = 2 * width * feedforward + feedforward + width
    norm = 2 * width
    blocks = (attention + feed + 2 * norm) + (2 * attention + feed + 3 * norm)
    expected = entries * width + layers * blocks + 2 * norm * pre_norm
    known = {"transformer_base": 63_082_496, "transformer_big": 214_245_376}
    assert expected == known.get(preset, expected)
    with torch.device("meta"):
        model = build(configure("train", [f"model={preset}"])["model"], vocabularies=(entries, entries), joint=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_a_seed_gives_the_same_first_values_again_and_another_others() -> None:
    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(translator().parameters()).detach()

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


def test_dropout_stands_on_both_sums_of_embeddings_and_on_every_sublayers_output() -> None:
    model = translator(dropout=0.5).train()
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p == 0.5:
            module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    source, lengths = sentences([4, 3])
    model(source, lengths, begun(source))
    places = [f"{part}.blocks.{i}.residuals.{j}.dropout" for part, count in (("encoder", 2), ("decoder", 3))
              for i in range(2) for j in range(count)]  # fmt: skip
    assert calls == {"dropout": 2} | dict.fromkeys(places, 1)


def test_embeddings_are_scaled_and_first_places_are_added_unscaled() -> None:
    """At place 0 sines are 0 and cosines 1."""
    for scaled, factor in ((True, 4.0), (False, 1.0)):
        model = translator(scaled=scaled)
        found = model._embed(torch.tensor([[7]]), model.embedding)[0, 0]
        expected = factor * model.embedding.weight[7] + torch.tensor([0.0, 1.0] * 8)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


# What changes nothing.


@both_orders
def test_padding_and_the_rest_of_the_batch_change_nothing(pre_norm: bool) -> None:
    model = learnt(pre_norm=pre_norm)
    lengths = [6, 1, 3, 9]
    source, counts = sentences(lengths)
    target = begun(sentences([4, 7, 1, 5])[0])
    together = model(source, counts, target)
    for i, (length, tokens) in enumerate(zip(lengths, [4, 7, 1, 5], strict=True)):
        alone = model(source[i : i + 1, :length], counts[i : i + 1], target[i : i + 1, :tokens])
        torch.testing.assert_close(together[i : i + 1, :tokens], alone, rtol=0, atol=EXACT)
    tail = torch.cat([source, source.new_full((4, 5), PAD)], 1)
    torch.testing.assert_close(model(tail, counts, target), together, rtol=0, atol=EXACT)
    other = torch.where(torch.arange(9) < counts[:, None], source, 11)  # it is the lengths that say what is padding
    torch.testing.assert_close(model(other, counts, target), together, rtol=0, atol=EXACT)


@pytest.mark.parametrize("method", SEARCHES)
def test_a_translation_does_not_depend_on_its_batch(method: str) -> None:
    model, options = learnt(ends=1.0), SEARCHES[method]
    lengths = [6, 1, 3, 9, 2, 12, 5]
    source, counts = sentences(lengths, padding=3)
    ids = [10 + i for i in range(len(lengths))]
    found = decode(model, source, counts, options, SPECIAL, ids)
    alone = [
        decode(model, source[[i], :length], counts[[i]], options, SPECIAL, [ids[i]])[0]
        for i, length in enumerate(lengths)
    ]
    same(found, alone)
    same(decode(model, source.flip(0), counts.flip(0), options, SPECIAL, ids[::-1])[::-1], found)
    assert len({len(one.tokens) for hypotheses in found for one in hypotheses}) > 2


def test_scores_of_given_targets_do_not_depend_on_the_batch_and_are_those_of_forward() -> None:
    model = learnt()
    lengths, tokens = [6, 1, 3, 9], [4, 7, 1, 5]
    (source, counts), (target, target_counts) = sentences(lengths, padding=2), sentences(tokens, padding=1)
    found = score(model, source, counts, target, target_counts, SPECIAL)
    logs = model(source, counts, begun(target)).log_softmax(-1).gather(2, target[..., None])[..., 0]
    for i, (total, count) in enumerate(found):
        assert count == tokens[i]
        assert total == pytest.approx(float(logs[i, :count].detach().sum()), abs=EXACT)
        (alone,) = score(
            model, source[[i], : lengths[i]], counts[[i]], target[[i], :count], target_counts[[i]], SPECIAL
        )
        assert alone == (pytest.approx(total, abs=EXACT), count)


@both_orders
def test_the_future_changes_nothing(pre_norm: bool) -> None:
    model = learnt(pre_norm=pre_norm)
    source, counts = sentences([5, 3])
    target = begun(sentences([8, 8])[0])
    logits = model(source, counts, target)
    for t in range(1, 8):
        other = target.clone()
        other[:, t] = 4 + (other[:, t] - 3) % 20  # another word
        changed = model(source, counts, other)
        torch.testing.assert_close(changed[:, :t], logits[:, :t], rtol=0, atol=EXACT)
        assert ((changed - logits)[:, t:].abs().amax(-1) > 1e-6).all(), "and the past changes what follows"


def test_every_word_and_its_place_in_the_source_count() -> None:
    """The control of the invariances above."""
    model = learnt()
    source, counts = sentences([5])
    target = begun(sentences([4])[0])
    logits = model(source, counts, target)
    for i in range(5):
        other = source.clone()
        other[0, i] = 4 + (other[0, i] - 3) % 20
        assert (model(other, counts, target) - logits).abs().max() > 1e-3
    swapped = source[:, [1, 0, 2, 3, 4]]
    assert source[0, 0] != source[0, 1] and (model(swapped, counts, target) - logits).abs().max() > 1e-3


def test_a_beam_of_one_is_greedy() -> None:
    model = learnt(ends=0.5)
    pairs = sentences([6, 1, 3, 9, 2, 12, 5, 8])
    same(decode(model, *pairs, replace(BEAM, beam=1, candidates=1), SPECIAL), decode(model, *pairs, GREEDY, SPECIAL))


def test_autocast_to_bf16_gives_almost_the_same_logits() -> None:
    model = learnt(dtype=torch.float32)
    (source, counts), (target, _) = sentences([5, 3]), sentences([6, 2])
    exact = model(source, counts, begun(target))
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(source, counts, begun(target)).float()
    assert 0 < (rough - exact).norm() < 0.05 * exact.norm()  # 8 bits in each of a dozen products


# With a cache and without.


class Whole:
    """The model without its cache: every step reads the whole beginning again by `forward`."""

    def __init__(self, model: Transformer):
        self.model = model

    def encode(self, source: Tensor, lengths: Tensor) -> list[Tensor]:
        return [source, lengths, source.new_empty(len(source), 0)]

    def step(self, state: list[Tensor], tokens: Tensor) -> Tensor:
        state[2] = torch.cat([state[2], tokens[:, None]], 1)
        return self.model(*state)[:, -1]

    def reorder(self, state: list[Tensor], rows: Tensor) -> list[Tensor]:
        return [part[rows] for part in state]


class Both:
    """The model with its cache, compared at every step with itself without."""

    def __init__(self, model: Transformer, tolerance: float):
        self.cached, self.whole, self.tolerance = model, Whole(model), tolerance
        self.rows: list[int] = []

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Any, Any]:
        return self.cached.encode(source, lengths), self.whole.encode(source, lengths)

    def step(self, state: tuple[Any, Any], tokens: Tensor) -> Tensor:
        self.rows.append(len(tokens))
        logits, expected = self.cached.step(state[0], tokens), self.whole.step(state[1], tokens)
        torch.testing.assert_close(logits, expected, rtol=0, atol=self.tolerance)
        return logits

    def reorder(self, state: tuple[Any, Any], rows: Tensor) -> tuple[Any, Any]:
        return self.cached.reorder(state[0], rows), self.whole.reorder(state[1], rows)


# float32: sums of some dozens of terms of size one through four layers
precisions = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, EXACT)])


@precisions
@pytest.mark.parametrize("method", SEARCHES)
def test_a_search_with_the_cache_sees_what_one_without_sees(method: str, dtype: torch.dtype, tolerance: float) -> None:
    model = learnt(ends=1.0, dtype=dtype, pre_norm=method == "greedy", first=2, layout="halves_t2t")
    both, pairs = Both(model, tolerance), sentences([6, 1, 3, 9, 2, 12, 5, 8])
    options = replace(SEARCHES[method], longest_extra=12)
    found = decode(both, *pairs, options, SPECIAL)
    expected = decode(Whole(model), *pairs, options, SPECIAL)
    assert [[one.tokens for one in some] for some in found] == [[one.tokens for one in some] for some in expected]
    assert len(both.rows) > 8 and both.rows[-1] < max(both.rows), "sentences leave the batch"


@precisions
@both_orders
@torch.no_grad()
def test_hypotheses_may_be_reordered_repeated_and_left_out_at_will(
    pre_norm: bool, dtype: torch.dtype, tolerance: float
) -> None:
    """One to four of each sentence at random, of which many have the same parents; sentences leave in between."""
    both = Both(learnt(dtype=dtype, pre_norm=pre_norm), tolerance)
    drawn = generator("hypotheses", 0)
    source, lengths = sentences([4, 1, 7, 2, 5])
    state, sentences_left, width = both.encode(source, lengths), 5, 1
    rows = torch.full((5,), BOS)
    for n in range(14):
        both.step(state, rows)
        stays = torch.arange(sentences_left)
        if n in (3, 6, 7):
            stays = stays[torch.randperm(sentences_left, generator=drawn)[:-1].sort().values]
        wider = int(torch.randint(1, 5, (), generator=drawn))
        parents = torch.randint(width, (len(stays), wider), generator=drawn)
        state = both.reorder(state, (stays[:, None] * width + parents).flatten())
        sentences_left, width = len(stays), wider
        rows = torch.randint(3, 24, (sentences_left * width,), generator=drawn)
    assert sentences_left == 2 and {*both.rows} > {5}


@pytest.mark.parametrize(("penalty", "alpha"), [("none", 1.0), ("average", 1.0), ("gnmt", 0.6)])
@torch.no_grad()
def test_a_wide_beam_finds_every_translation_in_order(penalty: Any, alpha: float) -> None:
    """Two words, UNK and at most three of them before the end: 1 + 3 + 9 + 27 translations of each sentence."""
    model = learnt(vocabularies=(6, 6))
    source, lengths = sentences([4, 1, 3], vocabulary=6)
    options = replace(BEAM, beam=40, candidates=40, longest_factor=0.0, longest_extra=4, penalty=penalty, alpha=alpha)
    found = decode(model, source, lengths, options, SPECIAL)
    for i, hypotheses in enumerate(found):
        every = []
        for words in itertools.chain.from_iterable(itertools.product((3, 4, 5), repeat=n) for n in range(4)):
            target_in = torch.tensor([[BOS, *words]])
            logs = model(source[[i]], lengths[[i]], target_in)[0].log_softmax(-1)
            total = sum(float(logs[n, word]) for n, word in enumerate((*words, EOS)))
            every.append(Hypothesis([*words], total / options.divisor(len(words) + 1), total, True))
        same([hypotheses], [sorted(every, key=lambda one: -one.score)])


def test_each_of_the_heads_and_layers_has_a_cache_of_its_own() -> None:
    """And the memory is kept once for a sentence, however many hypotheses it has."""
    model = learnt()
    state = model.encode(*sentences([4, 3]))
    model.step(state, torch.tensor([BOS, BOS]))
    state = model.reorder(state, torch.tensor([0, 0, 0, 1, 1, 1]))
    model.step(state, torch.tensor([4, 5, 6, 7, 8, 9]))
    assert len(state.caches) == 2 and state.tokens == 2
    for cache in state.caches:
        assert [tuple(part.shape) for part in cache.memory.content()] == [(2, 4, 4, 4)] * 2
        assert [tuple(part.shape) for part in cache.own.content()] == [(2, 4, 1 + 3, 4)] * 2


# Mistakes.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 16, "heads": 3}, "model.width=16 must be even and divisible by model.heads=3"),
        ({"width": 15, "heads": 3}, "model.width=15 must be even"),
        ({"joint": False}, "model.tied=all shares one matrix .* use model.tied=target"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        translator(**changes)


def test_a_source_of_more_tokens_than_the_limit_is_refused_and_one_of_as_many_is_read() -> None:
    model = learnt(longest=6)
    source, lengths = sentences([6, 2])
    assert (
        model(source, lengths, source).shape == (2, 6, 24) and len(decode(model, source, lengths, GREEDY, SPECIAL)) == 2
    )
    source, lengths = sentences([7, 2])
    for read in (lambda: model(source, lengths, source), lambda: decode(model, source, lengths, GREEDY, SPECIAL)):
        with pytest.raises(UserError, match=r"has 7 tokens, more than model.longest=6; split it"):
            read()
