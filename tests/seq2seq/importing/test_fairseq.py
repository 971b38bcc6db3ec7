"""fairseq's files against an independent implementation of its Transformer, with random weights under its names."""

import argparse
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.decoding.decode import decode
from common.decoding.given import score
from common.decoding.options import DecodingOptions
from common.errors import UserError
from common.files import checkpoint
from common.machine.seeds import generator
from seq2seq.importing import fairseq
from seq2seq.importing.adopt import adopt
from seq2seq.models import transformer
from seq2seq.models.transformer import PositionOptions, Transformer, TranslatorBlockOptions
from seq2seq.tokenizers.bpe import BOS, EOS, PAD, SPECIAL, UNK

SOURCE, TARGET, WIDTH, HEADS, FEEDFORWARD, LAYERS = 19, 23, 16, 2, 24, 2
THEIR_PAD, THEIR_EOS = 1, 2
Tensors = dict[str, Tensor]


def random_weights(shared: str = "all", pre_norm: bool = False) -> Tensors:
    """A TransformerModel's state dict.

    `shared`: "all" is share_all_embeddings, "target" share_decoder_input_output_embed, "none" neither.
    """
    rng = generator("fairseq")
    source = TARGET if shared == "all" else SOURCE
    shapes: dict[str, tuple[int, ...]] = {"encoder.embed_tokens.weight": (source, WIDTH)}
    for stack, attentions in (("encoder", ("self_attn",)), ("decoder", ("self_attn", "encoder_attn"))):
        for i in range(LAYERS):
            layer = f"{stack}.layers.{i}."
            for part in [f"{name}.{p}_proj" for name in attentions for p in ("q", "k", "v", "out")]:
                shapes |= {f"{layer}{part}.weight": (WIDTH, WIDTH), f"{layer}{part}.bias": (WIDTH,)}
            shapes |= {f"{layer}fc1.weight": (FEEDFORWARD, WIDTH), f"{layer}fc1.bias": (FEEDFORWARD,)}
            shapes |= {f"{layer}fc2.weight": (WIDTH, FEEDFORWARD), f"{layer}fc2.bias": (WIDTH,)}
            for norm in (*(f"{name}_layer_norm" for name in attentions), "final_layer_norm"):
                shapes |= {f"{layer}{norm}.{leaf}": (WIDTH,) for leaf in ("weight", "bias")}
        if pre_norm:
            shapes |= {f"{stack}.layer_norm.{leaf}": (WIDTH,) for leaf in ("weight", "bias")}
    shapes |= {"decoder.embed_tokens.weight": (TARGET, WIDTH), "decoder.output_projection.weight": (TARGET, WIDTH)}
    tensors = {
        name: torch.randn(shape, generator=rng, dtype=torch.float64) * 0.3 + float(name.endswith("norm.weight"))
        for name, shape in shapes.items()
    }
    if shared == "all":
        tensors["decoder.embed_tokens.weight"] = tensors["encoder.embed_tokens.weight"]
    if shared != "none":
        tensors["decoder.output_projection.weight"] = tensors["decoder.embed_tokens.weight"]
    return tensors | {"encoder.version": torch.tensor([3.0]), "decoder.version": torch.tensor([3.0])}


def independent_sines(positions: Tensor, width: int, **_: Any) -> Tensor:
    """Sines in tensor2tensor's and fairseq's layout, written from its description, in float64."""
    rates = torch.exp(torch.arange(width // 2, dtype=torch.float64) * -(math.log(10000) / (width // 2 - 1)))
    angles = positions[..., None].double() * rates
    return torch.cat([angles.sin(), angles.cos()], -1)


@pytest.fixture
def exact_sines(monkeypatch):
    """Replaces our float32 sines by float64 ones, so that everything else can be compared in float64."""
    monkeypatch.setattr(transformer, "sine", independent_sines)


class Theirs:
    """fairseq's TransformerModel with the weights of a state dict."""

    def __init__(self, tensors: Tensors):
        self.tensors, self.pre_norm = tensors, "encoder.layer_norm.weight" in tensors

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def attention(self, x: Tensor, memory: Tensor, name: str, hidden: Tensor) -> Tensor:
        """x (B, N, C), memory (B, M, C), hidden (B, 1, N, M), True where a query may not look -> (B, N, C)."""
        q, k, v = (
            self.linear(y, f"{name}.{p}_proj").unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for p, y in (("q", x), ("k", memory), ("v", memory))
        )
        scores = (q @ k.transpose(2, 3) / math.sqrt(WIDTH // HEADS)).masked_fill(hidden, -math.inf)
        return self.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{name}.out_proj")

    def residual(self, x: Tensor, name: str, sublayer: Any) -> Tensor:
        return x + sublayer(self.norm(x, name)) if self.pre_norm else self.norm(x + sublayer(x), name)

    def feed_forward(self, x: Tensor, layer: str) -> Tensor:
        return self.linear(self.linear(x, f"{layer}fc1").relu(), f"{layer}fc2")

    def embed(self, words: Tensor, stack: str) -> Tensor:
        """Scaled embeddings plus sines from position 2 on, (B, N) -> (B, N, C); padding has no sines."""
        real = words != THEIR_PAD
        positions = torch.where(real, real.cumsum(1) + THEIR_PAD, THEIR_PAD)
        sines = independent_sines(positions, WIDTH) * real[..., None]
        return self.tensors[f"{stack}.embed_tokens.weight"][words] * math.sqrt(WIDTH) + sines

    def __call__(self, source: Tensor, target: Tensor) -> Tensor:
        padding = (source == THEIR_PAD)[:, None, None]
        memory = self.embed(source, "encoder")
        for i in range(LAYERS):
            layer = f"encoder.layers.{i}."
            memory = self.residual(
                memory,
                f"{layer}self_attn_layer_norm",
                lambda x, layer=layer: self.attention(x, x, f"{layer}self_attn", padding),
            )
            memory = self.residual(
                memory, f"{layer}final_layer_norm", lambda x, layer=layer: self.feed_forward(x, layer)
            )
        memory = self.norm(memory, "encoder.layer_norm") if self.pre_norm else memory
        future = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)
        x = self.embed(target, "decoder")
        for i in range(LAYERS):
            layer = f"decoder.layers.{i}."
            x = self.residual(
                x,
                f"{layer}self_attn_layer_norm",
                lambda x, layer=layer: self.attention(x, x, f"{layer}self_attn", future),
            )
            x = self.residual(
                x,
                f"{layer}encoder_attn_layer_norm",
                lambda x, layer=layer: self.attention(x, memory, f"{layer}encoder_attn", padding),
            )
            x = self.residual(x, f"{layer}final_layer_norm", lambda x, layer=layer: self.feed_forward(x, layer))
        x = self.norm(x, "decoder.layer_norm") if self.pre_norm else x
        return x @ self.tensors["decoder.output_projection.weight"].T


def ours(content: dict[str, Any], shared: str = "all", pre_norm: bool = False) -> Transformer:
    source = TARGET if shared == "all" else SOURCE
    blocks = {"dropout": 0.0, "attention_dropout": 0.0, "hidden_dropout": 0.0, "norm_eps": 1e-5, "activation": "relu"}
    model = Transformer(
        vocabularies=(source + 1, TARGET + 1),
        joint=shared == "all",
        width=WIDTH,
        heads=HEADS,
        feedforward=FEEDFORWARD,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        tied=shared,  # type: ignore[arg-type]
        scaled=True,
        output_bias=True,
        longest=64,
        positions=PositionOptions(layout="halves_t2t", first=2),
        blocks=TranslatorBlockOptions(pre_norm=pre_norm, **blocks),
    )
    model.double().eval().load_state_dict(adopt(content, None).weights)
    return model


def sentences(entries: int) -> tuple[Tensor, Tensor]:
    """fairseq's ids of words and </s>, padded, (3, 7), and the sentences' lengths (3,)."""
    lengths = torch.tensor([7, 3, 5])
    words = torch.randint(3, entries, (3, 7), generator=generator("words"))
    words[torch.arange(3), lengths - 1] = THEIR_EOS
    return words.masked_fill(torch.arange(7) >= lengths[:, None], THEIR_PAD), lengths


def in_our_ids(words: Tensor, entries: int) -> Tensor:
    """Our ids for fairseq's; EOS for each </s>, so that the caller writes BOS where a translation starts."""
    order = torch.tensor(fairseq.row_order(entries))
    return torch.stack([(order == row).nonzero()[-1, 0] for row in range(entries)])[words]


VARIANTS = pytest.mark.parametrize("shared", ["all", "target", "none"])


def assert_equal(content: dict[str, Any], tensors: Tensors, shared: str, pre_norm: bool, error: float = 1e-10) -> None:
    source, lengths = sentences(len(tensors["encoder.embed_tokens.weight"]))
    target = torch.randint(3, TARGET, (3, 6), generator=generator("target"))
    target[:, 0] = THEIR_EOS
    expected = Theirs(tensors)(source, target)  # (B, T, V)
    words = in_our_ids(target, TARGET)
    words[:, 0] = BOS
    our_source = in_our_ids(source, len(tensors["encoder.embed_tokens.weight"]))
    logits = ours(content, shared, pre_norm)(our_source, lengths, words)  # (B, T, V + 1)
    ids = [i for i in range(TARGET + 1) if i != BOS]
    order = [fairseq.row_order(TARGET)[i] for i in ids]
    assert sorted(order) == [*range(TARGET)] and expected.std() > 0.5
    torch.testing.assert_close(logits[..., ids], expected[..., order], rtol=0, atol=error)
    logs, expected_logs = logits.log_softmax(-1), expected.log_softmax(-1)
    torch.testing.assert_close(logs[..., ids], expected_logs[..., order], rtol=0, atol=error)


@torch.no_grad()
@VARIANTS
@pytest.mark.parametrize("pre_norm", [False, True], ids=["post-norm", "pre-norm"])
def test_an_imported_model_has_the_log_probabilities_of_fairseq(exact_sines, shared, pre_norm):
    tensors = random_weights(shared, pre_norm)
    assert_equal({"model": tensors, "best_loss": 1.0}, tensors, shared, pre_norm)


@torch.no_grad()
def test_our_sines_are_those_of_fairseq():
    """Up to rounding in float32; another layout or first position changes the logits by more than 0.1."""
    tensors = random_weights()
    assert_equal({"model": tensors}, tensors, "all", False, error=1e-5)


@torch.no_grad()
def test_names_from_before_2019_are_read(exact_sines):
    """Queries, keys and values were one matrix, norms had numbers, and the output another name."""
    tensors = random_weights("none")
    old = dict(tensors)
    for stack in ("encoder", "decoder"):
        for i in range(LAYERS):
            layer = f"{stack}.layers.{i}."
            for name in ("self_attn", "encoder_attn")[: 1 + (stack == "decoder")]:
                for leaf in ("weight", "bias"):
                    projections = [old.pop(f"{layer}{name}.{p}_proj.{leaf}") for p in "qkv"]
                    old[f"{layer}{name}.in_proj_{leaf}"] = torch.cat(projections)
            norms = ("self_attn", "final") if stack == "encoder" else ("self_attn", "encoder_attn", "final")
            for number, name in enumerate(norms):
                for leaf in ("weight", "bias"):
                    old[f"{layer}layer_norms.{number}.{leaf}"] = old.pop(f"{layer}{name}_layer_norm.{leaf}")
    old["decoder.embed_out"] = old.pop("decoder.output_projection.weight")
    old["encoder.embed_positions._float_tensor"] = torch.zeros(1)
    assert_equal({"model": old}, tensors, "none", False)


def test_the_start_of_a_translation_is_a_copy_of_its_end():
    tensors = random_weights()
    rows = adopt({"model": tensors}, None).weights["embedding.weight"]
    shared = tensors["encoder.embed_tokens.weight"]
    for entry, row in ((PAD, 1), (BOS, 2), (EOS, 2), (UNK, 3), (4, 4), (TARGET, 0)):
        assert torch.equal(rows[entry], shared[row])


def test_a_decoded_translation_has_its_probability_in_fairseq(exact_sines):
    """The log probability of a greedy translation, also computed by the independent implementation."""
    tensors = random_weights()
    tensors["decoder.embed_tokens.weight"][THEIR_EOS] *= 3  # shared by source, target and output
    source, lengths = sentences(TARGET)
    model = ours({"model": tensors})
    options = DecodingOptions(
        method="greedy", beam=1, penalty="none", alpha=0.0, stop="first", candidates=1, longest_factor=0.0,
        longest_extra=9, at_limit="end", temperature=1.0, top_k=0, top_p=1.0, seed=0, attention=False,
    )  # fmt: skip
    our_source = in_our_ids(source, TARGET)
    order = torch.tensor(fairseq.row_order(TARGET))
    for i, (hypothesis,) in enumerate(decode(model, our_source, lengths, options, SPECIAL)):
        words = order[[*hypothesis.tokens, EOS]]
        start = torch.cat([torch.tensor([THEIR_EOS]), words[:-1]])
        logs = Theirs(tensors)(source[i : i + 1, : lengths[i]], start[None])[0].log_softmax(-1)
        assert hypothesis.log_probability == pytest.approx(float(logs.gather(1, words[:, None]).sum()), abs=1e-9)
        row = torch.tensor([[*hypothesis.tokens, EOS]])
        sentence, row_length = our_source[i : i + 1, : lengths[i]], torch.tensor([row.shape[1]])
        ((total, _),) = score(model, sentence, lengths[i : i + 1], row, row_length, SPECIAL)
        assert total == pytest.approx(hypothesis.log_probability, abs=1e-9)


def test_a_checkpoint_with_its_arguments_is_imported(tmp_path):
    """fairseq's files hold an argparse.Namespace, the only object that may be loaded."""
    tensors = random_weights()
    torch.save({"args": argparse.Namespace(arch="transformer"), "model": tensors}, tmp_path / "checkpoint.pt")
    adopted = adopt(checkpoint.load(tmp_path / "checkpoint.pt"), tmp_path)
    expected = adopt({"model": tensors}, None)
    assert all(torch.equal(adopted.weights[name], tensor) for name, tensor in expected.weights.items())
    assert adopted.left_out == ["encoder.version", "decoder.version"] and adopted.task_state == {}


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("executed",)


def test_other_objects_are_refused(tmp_path, capsys):
    torch.save({"args": Evil(), "model": random_weights()}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="which could run code; nothing was executed"):
        checkpoint.load(tmp_path / "checkpoint.pt")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["encoder.embed_positions.weight", "decoder.layernorm_embedding.weight", "decoder.adaptive_softmax.head"]
)
def test_an_unsupported_tensor_is_refused(name):
    with pytest.raises(
        UserError, match=f"in fairseq's layout, but not a plain Transformer .{name} .16,. is unsupported"
    ):
        adopt({"model": random_weights() | {name: torch.zeros(WIDTH)}}, None)
