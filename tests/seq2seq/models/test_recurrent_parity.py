"""The recurrent translators against plain loops written from the papers: sentence by sentence and word by word.

All parameters are random, also biases. The loops use no module, no padding and no batch.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.machine.seeds import generator
from seq2seq.models.bahdanau import Bahdanau
from seq2seq.models.luong import Luong
from seq2seq.models.recurrent import RecurrentTranslator
from seq2seq.models.rnn import EncoderDecoder
from seq2seq.models.rnn_contextual import ContextualEncoderDecoder
from seq2seq.tokenizers.bpe import BOS, PAD

EXACT = {"rtol": 0, "atol": 1e-10}  # float64, two layers of about ten steps
ENTRIES, WIDTH, LAYERS = 19, 6, 2
SOURCES, TARGETS = [7, 2, 5, 1], [4, 6, 1, 3]
Parameters = dict[str, Tensor]
States = list[tuple[Tensor, ...]]
cells = pytest.mark.parametrize("cell", ["gru", "lstm"])


class Plain:
    """What the models' loops share. Parameters have the names of our models."""

    def __init__(self, parameters: Parameters, cell: str):
        self.p, self.kind = parameters, cell

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = self.p[f"{name}.weight"] @ x
        return y + self.p[f"{name}.bias"] if f"{name}.bias" in self.p else y

    def cell(self, name: str, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The equations in the documentation of torch.nn.GRUCell and torch.nn.LSTMCell."""
        h = state[0]
        inward, recurrent = self.linear(f"{name}.input", x), self.linear(f"{name}.recurrent", h)
        if self.kind == "gru":
            (xr, xz, xn), (hr, hz, hn) = inward.chunk(3), recurrent.chunk(3)
            r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
            return ((1 - z) * torch.tanh(xn + r * hn) + z * h,)
        i, f, g, o = (inward + recurrent).chunk(4)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def encode(self, words: Sequence[int], directions: int, width: int = WIDTH) -> tuple[list[Tensor], list[States]]:
        """The top layer's outputs, and the last state of each direction of each layer."""
        xs = [self.p["embedding.weight"][word] for word in words]
        finals: list[States] = []
        for layer in range(LAYERS):
            outputs, ends = [], []
            for direction in range(directions):
                state = (torch.zeros(width, dtype=torch.float64),) * (1 if self.kind == "gru" else 2)
                seen = []
                for x in xs[::-1] if direction else xs:
                    state = self.cell(f"encoder.cells.{layer}.{direction}", x, state)
                    seen.append(state[0])
                outputs.append(seen[::-1] if direction else seen)
                ends.append(state)
            xs = [torch.cat([*parts]) for parts in zip(*outputs, strict=True)]
            finals.append(ends)
        return xs, finals

    def decode(self, x: Tensor, states: States) -> States:
        new: States = []
        for layer, state in enumerate(states):
            new.append(self.cell(f"decoder.cells.{layer}.0", x, state))
            x = new[-1][0]
        return new

    def bridge(self, x: Tensor) -> States:
        parts = torch.tanh(self.linear("bridge.map", x)).chunk(LAYERS)
        return [(part,) * (1 if self.kind == "gru" else 2) for part in parts]

    def maxout(self, *inputs: Tensor) -> Tensor:
        sums = self.linear("deep_output.sums", torch.cat([*inputs]))
        return torch.stack([torch.maximum(sums[i], sums[i + 1]) for i in range(0, len(sums), 2)])

    def logits(self, features: list[Tensor]) -> Tensor:
        return torch.stack([self.p["embedding.weight"] @ vector for vector in features])

    def mean(self, scores: list[Tensor], memory: list[Tensor]) -> Tensor:
        """The mean of the memory, weighted by the softmax of scores."""
        weights = torch.stack(scores).exp() / torch.stack(scores).exp().sum()
        return sum((w * h for w, h in zip(weights, memory, strict=True)), torch.zeros_like(memory[0]))


def sutskever(plain: Plain, source: list[int], target_in: list[int], reverse: bool) -> Tensor:
    _, finals = plain.encode(source[::-1] if reverse else source, 1)
    states, features = [ends[0] for ends in finals], []
    for word in target_in:
        states = plain.decode(plain.p["embedding.weight"][word], states)
        features.append(states[-1][0])
    return plain.logits(features)


def cho(plain: Plain, source: list[int], target_in: list[int]) -> Tensor:
    _, finals = plain.encode(source, 2)
    forward, backward = finals[-1][0][0], finals[-1][1][0]
    c = torch.tanh(plain.linear("summary", torch.cat([forward, backward])))
    states, features = plain.bridge(c), []
    for word in target_in:
        y = plain.p["embedding.weight"][word]
        states = plain.decode(torch.cat([y, c]), states)
        features.append(plain.maxout(states[-1][0], y, c))
    return plain.logits(features)


def bahdanau(plain: Plain, source: list[int], target_in: list[int]) -> Tensor:
    """Section 3.1: e_ij = v^T tanh(W s_{i-1} + U h_j) with the state before word i."""
    annotations, _ = plain.encode(source, 2)
    # The backward state at the first word is the second half of its annotation.
    states, features = plain.bridge(annotations[0][WIDTH:]), []
    for word in target_in:
        y, previous = plain.p["embedding.weight"][word], states[-1][0]
        scores = [
            plain.p["cross_attention.score.weight"][0]
            @ torch.tanh(plain.linear("cross_attention.query", previous) + plain.linear("cross_attention.key", h))
            for h in annotations
        ]
        c = plain.mean(scores, annotations)
        states = plain.decode(torch.cat([y, c]), states)
        features.append(plain.maxout(states[-1][0], y, c))
    return plain.logits(features)


def luong(plain: Plain, source: list[int], target_in: list[int], options: dict[str, Any]) -> Tensor:
    """Sections 3.1 and 3.3, with the state after word t as query."""
    reverse, both = options["reverse_source"], options["bidirectional"]
    memory, finals = plain.encode(source[::-1] if reverse else source, 1 + both, WIDTH // (1 + both))
    states: States = [tuple(torch.cat([*parts]) for parts in zip(*ends, strict=True)) for ends in finals]
    fed, features = torch.zeros(WIDTH, dtype=torch.float64), []
    for word in target_in:
        y = plain.p["embedding.weight"][word]
        states = plain.decode(torch.cat([y, fed]) if options["input_feeding"] else y, states)
        s = states[-1][0]
        scores = [luong_score(plain, s, h, options["score"]) for h in memory]
        c = plain.mean(scores, memory)
        fed = torch.tanh(plain.linear("combine", torch.cat([c, s])))
        features.append(fed)
    return plain.logits(features)


def luong_score(plain: Plain, s: Tensor, h: Tensor, score: str) -> Tensor:
    if score == "dot":
        return s @ h
    if score == "general":
        return s @ plain.p["cross_attention.key.weight"] @ h
    matrix = torch.cat([plain.p["cross_attention.query.weight"], plain.p["cross_attention.key.weight"]], 1)
    return plain.p["cross_attention.score.weight"][0] @ torch.tanh(matrix @ torch.cat([s, h]))


def arguments(cell: str, **more: Any) -> dict[str, Any]:
    common = {"vocabularies": (ENTRIES, ENTRIES), "joint": True, "cell": cell, "layers": LAYERS, "width": WIDTH}
    return {
        **common,
        "embedding_width": WIDTH,
        "dropout": 0.0,
        "tied": "all",
        "longest": 20,
        "embedding_weights": None,
        **more,
    }


def randomised(model: RecurrentTranslator) -> RecurrentTranslator:
    rng = generator("parity")
    for parameter in model.double().parameters():
        nn.init.normal_(parameter, std=0.5, generator=rng)
    return model


def sentences(lengths: list[int], name: str) -> tuple[Tensor, Tensor]:
    """Right-padded sentences of random words, and their lengths."""
    words = torch.randint(4, ENTRIES, (len(lengths), max(lengths)), generator=generator(name))
    counts = torch.tensor(lengths)
    return words.masked_fill(torch.arange(max(lengths)) >= counts[:, None], PAD), counts


def compare(model: RecurrentTranslator, cell: str, loop: Any) -> None:
    """Compare the logits and all gradients of a padded batch with those of the loop over sentences."""
    (source, lengths), (target, _) = sentences(SOURCES, "source"), sentences(TARGETS, "target")
    target_in = torch.cat([torch.full((4, 1), BOS), target[:, :-1]], 1)
    parameters = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    logits, loss, expected_loss = model(source, lengths, target_in), torch.tensor(0.0), torch.tensor(0.0)
    for i, (s, t) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        expected = loop(Plain(parameters, cell), source[i, :s].tolist(), target_in[i, :t].tolist())
        torch.testing.assert_close(logits[i, :t], expected, **EXACT)
        assert expected.std() > 0.1, "the logits must differ"
        factors = torch.randn(expected.shape, dtype=torch.float64, generator=generator("factors", i))
        loss, expected_loss = loss + (logits[i, :t] * factors).sum(), expected_loss + (expected * factors).sum()
    loss.backward()
    expected_loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, parameters[name].grad, **EXACT, msg=name)
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-6, name


@cells
@pytest.mark.parametrize("reverse", [False, True])
def test_the_encoder_decoder_is_the_papers_loop(cell: str, reverse: bool) -> None:
    model = randomised(EncoderDecoder(**arguments(cell, reverse_source=reverse)))
    compare(model, cell, lambda *inputs: sutskever(*inputs, reverse))


@cells
def test_the_contextual_encoder_decoder_is_the_papers_loop(cell: str) -> None:
    model = randomised(ContextualEncoderDecoder(**arguments(cell, maxout_width=WIDTH)))
    compare(model, cell, cho)


@cells
def test_additive_attention_is_the_papers_loop(cell: str) -> None:
    model = randomised(Bahdanau(**arguments(cell, maxout_width=WIDTH, attention_width=5)))
    compare(model, cell, bahdanau)


LUONG = [
    dict(zip(("score", "input_feeding", "bidirectional", "reverse_source"), values, strict=True))
    for values in itertools.product(("dot", "general", "concat"), (True, False), (False,), (True,))
] + [{"score": "general", "input_feeding": True, "bidirectional": True, "reverse_source": False}]


@cells
@pytest.mark.parametrize("options", LUONG, ids=lambda options: " ".join(map(str, options.values())))
def test_global_attention_is_the_papers_loop(cell: str, options: dict[str, Any]) -> None:
    model = randomised(Luong(**arguments(cell, **options)))
    compare(model, cell, lambda *inputs: luong(*inputs, options))


def test_the_query_of_additive_attention_is_the_previous_state_and_that_of_global_attention_the_new_one() -> None:
    """A word changes the state: its own attention does not depend on it in the one, but does in the other."""
    from common.nn.attention import record_attention

    source, lengths = sentences([5], "source")
    changed = {}
    for name, model in {
        "bahdanau": Bahdanau(**arguments("gru", maxout_width=WIDTH, attention_width=5)),
        "luong": Luong(**arguments("gru", **LUONG[0])),
    }.items():
        maps = []
        for word in (7, 8):
            with record_attention(randomised(model)) as recorded:
                model(source, lengths, torch.tensor([[BOS, word, 9]]))
            maps.append(torch.cat(recorded["cross_attention"], 2)[0, 0])  # (T, S)
        changed[name] = ((maps[0] - maps[1]).abs().amax(1) > 1e-9).tolist()
    assert changed == {"bahdanau": [False, False, True], "luong": [False, True, True]}
