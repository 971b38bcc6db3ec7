"""The translator against torch.nn.Transformer and transformers' Marian with the same random weights.

All parameters are random, also norms and biases, because ones and zeros would hide a swapped pair.
"""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MarianConfig, MarianMTModel

from common.decoding.decode import decode
from common.machine.seeds import generator
from seq2seq.criterion.cross_entropy import LossOptions, cross_entropy
from seq2seq.models import transformer
from seq2seq.models.transformer import PositionOptions, Transformer, TranslatorBlockOptions
from seq2seq.tokenizers.bpe import BOS, EOS, PAD, SPECIAL
from tests.searching import BEAM

ENTRIES, WIDTH, HEADS, FEEDFORWARD, LAYERS = 29, 16, 4, 24, 2
EXACT = {"rtol": 0, "atol": 1e-10}  # float64, four layers with values of size ten
both_orders = pytest.mark.parametrize("pre_norm", [False, True], ids=["post-norm", "pre-norm"])


def translator(pre_norm: bool = False, layout: Any = "interleaved", first: int = 0, **blocks: Any) -> Transformer:
    options: dict[str, Any] = {"dropout": 0.0, "attention_dropout": 0.0, "hidden_dropout": 0.0, "norm_eps": 1e-5}
    return Transformer(
        vocabularies=(ENTRIES, ENTRIES),
        joint=True,
        width=WIDTH,
        heads=HEADS,
        feedforward=FEEDFORWARD,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        tied="all",
        scaled=True,
        output_bias=layout == "halves",
        longest=64,
        positions=PositionOptions(layout=layout, first=first),
        blocks=TranslatorBlockOptions(pre_norm=pre_norm, **options | {"activation": "relu"} | blocks),
    )


def randomised(module: nn.Module, mean_of_norms: float = 0.0, seed: int = 0) -> Any:
    """The module in float64, with random parameters of standard deviation 0.3."""
    rng = generator("parity", seed)
    for name, parameter in module.double().named_parameters():
        nn.init.normal_(parameter, mean_of_norms if name.endswith("norm.weight") else 0.0, 0.3, generator=rng)
    return module


def sentences(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Padded sentences of random words without special ids, and their lengths."""
    words = torch.randint(4, ENTRIES, (len(lengths), max(lengths)), generator=generator("words", *lengths))
    counts = torch.tensor(lengths)
    return words.masked_fill(torch.arange(max(lengths)) >= counts[:, None], PAD), counts


def plain_sines(count: int, width: int) -> Tensor:
    """Section 3.5 of the paper, channel by channel, in float64."""
    table = [
        [(math.sin, math.cos)[c % 2](p / 10000 ** (2 * (c // 2) / width)) for c in range(width)] for p in range(count)
    ]
    return torch.tensor(table, dtype=torch.float64)


# torch.nn.Transformer


class Pytorchs(nn.Module):
    """The paper's model with torch.nn.Transformer, which with post-norm is the paper's only without final norms."""

    def __init__(self, pre_norm: bool):
        super().__init__()
        self.embedding = nn.Embedding(ENTRIES, WIDTH)
        dimensions = (WIDTH, HEADS, LAYERS, LAYERS, FEEDFORWARD)
        self.stacks = nn.Transformer(*dimensions, dropout=0.0, batch_first=True, norm_first=pre_norm)
        if not pre_norm:
            self.stacks.encoder.norm = self.stacks.decoder.norm = None

    def forward(self, source: Tensor, target_in: Tensor) -> Tensor:
        padding = source == PAD
        logits = self.stacks(
            self.embed(source),
            self.embed(target_in),
            tgt_mask=torch.ones(target_in.shape[1], target_in.shape[1], dtype=torch.bool).triu(1),  # True = masked
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        return logits @ self.embedding.weight.T

    def embed(self, words: Tensor) -> Tensor:
        return self.embedding(words) * WIDTH**0.5 + plain_sines(words.shape[1], WIDTH)


def pytorchs_name(name: str) -> str:
    """PyTorch's name of a parameter such as `decoder.blocks.0.cross_attention.in_proj.weight`."""
    if name.startswith("embedding."):
        return name
    names = {"cross_attention": "multihead_attn", "attention": "self_attn", "in_proj.": "in_proj_", "blocks": "layers"}
    names |= {"feed_forward.expand": "linear1", "feed_forward.contract": "linear2"}
    names |= {f"residuals.{i}.norm": f"norm{i + 1}" for i in range(3)}
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return f"stacks.{name}"


def pytorchs_pair(pre_norm: bool) -> tuple[Transformer, Pytorchs]:
    ours, theirs = randomised(translator(pre_norm)), Pytorchs(pre_norm).double()
    theirs.load_state_dict({pytorchs_name(name): value for name, value in ours.state_dict().items()})
    return ours, theirs


@both_orders
def test_logits_loss_and_all_gradients_are_those_of_pytorchs_transformer(
    pre_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our model gets the paper's sines in float64 here; the next test uses its own, in float32."""

    def exact_sines(positions: Tensor, width: int, *, layout: str) -> Tensor:
        assert layout == "interleaved"
        return plain_sines(64, width)[positions.long()]

    monkeypatch.setattr(transformer, "sine", exact_sines)
    ours, theirs = pytorchs_pair(pre_norm)
    (source, lengths), (target, _) = sentences([7, 2, 5, 1]), sentences([4, 6, 1, 3])
    target_in = torch.cat([torch.full((4, 1), BOS), target[:, :-1]], 1)
    logits, expected = ours(source, lengths, target_in), theirs(source, target_in)
    assert expected.std() > 0.3, "the logits must differ"
    torch.testing.assert_close(logits, expected, **EXACT)

    loss, _ = cross_entropy(LossOptions(smoothing=0.1), logits, target)
    their_loss = F.cross_entropy(
        expected.flatten(0, 1), target.flatten(), label_smoothing=0.1, ignore_index=PAD, reduction="sum"
    )
    torch.testing.assert_close(loss, their_loss, **EXACT)
    loss.backward()
    their_loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients.pop(pytorchs_name(name)), **EXACT, msg=name)
    assert not gradients


@both_orders
def test_with_its_own_sines_logits_are_still_those_of_pytorchs_transformer(pre_norm: bool) -> None:
    """Sines of positions up to 12 have errors of 12 x 2^-24 in float32, and are added to embeddings of size one."""
    ours, theirs = pytorchs_pair(pre_norm)
    (source, lengths), (target, _) = sentences([12, 3]), sentences([9, 12])
    torch.testing.assert_close(ours(source, lengths, target), theirs(source, target), rtol=0, atol=2e-5)


# transformers' Marian


def marians_name(name: str) -> str:
    """Marian's name of our tensor, except that `in_proj` is not split into Marian's three projections."""
    names = {
        "cross_attention.": "encoder_attn.",
        ".attention.": ".self_attn.",
        "residuals.0.norm": "self_attn_layer_norm",
        "feed_forward.expand": "fc1",
        "feed_forward.contract": "fc2",
        "blocks": "layers",
    }
    last = "residuals.1.norm" if name.startswith("encoder") else "residuals.2.norm"
    for ours, theirs in {"residuals.1.norm": "encoder_attn_layer_norm", last: "final_layer_norm", **names}.items():
        name = name.replace(ours, theirs)
    return f"model.{name}"


def marians_tensors(ours: Transformer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, value in ours.state_dict().items():
        if name == "embedding.weight":
            copies = ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head")
            tensors |= {f"{copy}.weight": value for copy in copies}
        elif name == "output_bias":
            tensors["final_logits_bias"] = value[None]
        elif "in_proj" in name:
            parts = zip("qkv", value.chunk(3), strict=True)
            tensors |= {marians_name(name).replace("in_proj", f"{which}_proj"): part for which, part in parts}
        else:
            tensors[marians_name(name)] = value
    return tensors


@pytest.fixture(scope="module")
def pair() -> tuple[Transformer, MarianMTModel]:
    """Our model and Marian's with the same weights; translations differ and mostly end within the limit."""
    ours = randomised(translator(layout="halves", activation="swish"), mean_of_norms=1.0, seed=2).eval()
    ours.output_bias.data[EOS] += 3.5
    dimensions = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in
             (("layers", LAYERS), ("attention_heads", HEADS), ("ffn_dim", FEEDFORWARD))}  # fmt: skip
    config = MarianConfig(
        vocab_size=ENTRIES,
        d_model=WIDTH,
        max_position_embeddings=64,
        activation_function="swish",
        scale_embedding=True,
        dropout=0.0,
        pad_token_id=PAD,
        bos_token_id=BOS,
        decoder_start_token_id=BOS,
        eos_token_id=EOS,
        forced_eos_token_id=None,
        **dimensions,
    )
    theirs = MarianMTModel(config).double().eval()
    missing, unexpected = theirs.load_state_dict(marians_tensors(ours), strict=False)
    assert {*missing} <= {f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder")}
    assert not unexpected
    return ours, theirs


LENGTHS = [3, 9, 1, 14, 6, 2, 11, 5, 8, 4, 13, 7, 10, 12, 1, 5, 9, 3]


def test_logits_are_those_of_marian(pair: tuple[Transformer, MarianMTModel]) -> None:
    """Marian's sines are rounded to float32, ours are computed in float32, so an angle of 13 is off by 13 x 2^-24."""
    ours, theirs = pair
    (source, lengths), (target, _) = sentences(LENGTHS), sentences(LENGTHS[::-1])
    target = torch.cat([torch.full_like(target[:, :1], BOS), target[:, :-1]], 1)
    mask = (source != PAD).long()
    with torch.no_grad():
        expected = theirs(source, attention_mask=mask, decoder_input_ids=target).logits
        logits = ours(source, lengths, target)
    assert expected.std() > 1
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


OPTIONS = replace(BEAM, beam=4, candidates=4, longest_extra=16, at_limit="cut")


def generated(model: MarianMTModel, source: Tensor, **options: Any) -> Any:
    """transformers' translations of at most 16 tokens, without PAD and BOS."""
    outputs = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "do_sample": False}
    bad = [[PAD], [BOS]]
    return model.generate(
        source, attention_mask=(source != PAD).long(), max_new_tokens=16, bad_words_ids=bad, **outputs, **options
    )


def words(row: list[int]) -> list[int]:
    """The words between BOS and EOS."""
    return [*itertools.takewhile(lambda word: word not in (EOS, PAD), row[1:])]


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_four_beams_find_what_marian_finds(pair: tuple[Transformer, MarianMTModel], alpha: float) -> None:
    """Tokens and scores of the four best translations of eighteen sentences, with a cache in both."""
    ours, theirs = pair
    source, lengths = sentences(LENGTHS)
    beams = {"num_beams": 4, "num_return_sequences": 4, "early_stopping": True, "length_penalty": alpha}
    answer = generated(theirs, source, **beams)
    expected = [words(row) for row in answer.sequences.tolist()]
    hypotheses = [*itertools.chain(*decode(ours, source, lengths, replace(OPTIONS, alpha=alpha), SPECIAL))]
    assert [hypothesis.tokens for hypothesis in hypotheses] == expected
    # transformers sums up to 16 log probabilities in float32
    scores = [hypothesis.score for hypothesis in hypotheses]
    assert scores == pytest.approx(answer.sequences_scores.tolist(), abs=5e-5)
    assert len({len(tokens) for tokens in expected}) > 9
    assert {hypothesis.ended for hypothesis in hypotheses} == {True, False}
    assert len({tuple(tokens) for tokens in expected}) > 20


def test_greedy_search_finds_what_marian_finds(pair: tuple[Transformer, MarianMTModel]) -> None:
    ours, theirs = pair
    source, lengths = sentences(LENGTHS)
    answer = generated(theirs, source, num_beams=1)
    logs = torch.stack(answer.logits, 1).double().log_softmax(-1)  # (B, T, V), before PAD and BOS are forbidden
    options = replace(OPTIONS, method="greedy", candidates=1, alpha=0)
    hypotheses = [*itertools.chain(*decode(ours, source, lengths, options, SPECIAL))]
    for hypothesis, row, steps in zip(hypotheses, answer.sequences.tolist(), logs, strict=True):
        assert hypothesis.tokens == words(row)
        tokens = [*hypothesis.tokens, EOS][: len(hypothesis.tokens) + hypothesis.ended]
        total = sum(float(steps[n, token]) for n, token in enumerate(tokens))
        assert hypothesis.log_probability == hypothesis.score == pytest.approx(total, abs=5e-5)
    assert len({len(hypothesis.tokens) for hypothesis in hypotheses}) > 5


# fairseq's positions


def test_fairseqs_layout_begins_at_the_third_row_of_its_table() -> None:
    """Row r has sines, then cosines, of r / 10000^(i / (width/2 - 1)); padding has position 1, so words begin at 2."""
    half = WIDTH // 2
    rows = np.arange(40)[:, None] / 10000 ** (np.arange(half) / (half - 1))
    table = torch.from_numpy(np.concatenate([np.sin(rows), np.cos(rows)], 1))
    model = translator(layout="halves_t2t", first=2).double()
    model.embedding.weight.data.zero_()
    positions = model._embed(torch.full((1, 20), 5), model.embedding)[0]
    torch.testing.assert_close(positions, table[2:22], rtol=0, atol=2e-6)  # 22 x 2^-24
    later = model._embed(torch.full((1, 1), 5), model.embedding, start=7)[0]
    torch.testing.assert_close(later, table[9:10], rtol=0, atol=2e-6)
