"""What translators with recurrent decoders share: embeddings, output, and the state and contract of decoding.

The models themselves are in rnn.py, rnn_contextual.py, bahdanau.py and luong.py, in the order in which they appeared.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.nn.dropout import Dropout
from common.nn.embedding import TokenEmbedding
from common.nn.linear import Linear, Tied
from common.nn.recurrent import CELLS, Cell, CellName, CellState, Recurrent
from seq2seq.models.alignment import Alignment
from seq2seq.models.transformer import refuse_too_long

Tying = Literal["all", "target", "none"]


@dataclass
class State:
    """The state of decoding B sentences with R rows: W hypotheses for each sentence, side by side.

    Reordering hypotheses copies the tensors with R rows. What is computed from the source alone is stored once for each
    sentence, and selected only when sentences are removed or change their order.
    """

    hidden: list[CellState]  # of each layer of the decoder; (R, H) each
    context: Tensor | None = None  # the source as one vector for all steps (R, C), in a model that has one
    attentional: Tensor | None = None  # the last attentional vector (R, H), with input feeding
    memory: Tensor | None = None  # the encoder's output (B, S, M), in a model with attention
    keys: Tensor | None = None  # its projection, with which queries are compared (B, S, A)
    real: Tensor | None = None  # which positions are not padding (B, S) boolean

    def select(self, rows: Tensor) -> "State":
        """The state whose row i is the row rows[i] of this one: rows (R',) int64."""
        hidden = [tuple(part[rows] for part in layer) for layer in self.hidden]
        context, attentional = (None if part is None else part[rows] for part in (self.context, self.attentional))
        if self.memory is None or self.keys is None or self.real is None:
            return State(hidden, context, attentional)
        count = self.memory.shape[0]
        sentences = (rows // (self.hidden[0][0].shape[0] // count)).unique_consecutive()  # (B',)
        if torch.equal(sentences, torch.arange(count, device=rows.device)):
            return State(hidden, context, attentional, self.memory, self.keys, self.real)
        return State(hidden, context, attentional, self.memory[sentences], self.keys[sentences], self.real[sentences])


class Bridge(nn.Module):
    """The first states of a decoder's layers, computed from a vector: s_0 = tanh(W x + b) for each layer.

    The cell state of an LSTM begins with the same values.
    """

    def __init__(self, cell: CellName, inputs: int, width: int, layers: int):
        super().__init__()
        self.parts, self.layers = CELLS[cell].parts, layers
        self.map = Linear(inputs, layers * width)

    def forward(self, x: Tensor) -> list[CellState]:
        """x (B, inputs) -> a state of parts (B, width) for each layer."""
        first = self.map(x).tanh().to(x.dtype)
        return [(part,) * self.parts for part in first.chunk(self.layers, -1)]


class RecurrentTranslator(nn.Module):
    """Map token ids of the source and the target to logits of the target's next token.

    `forward` computes the logits at all positions of a known target (teacher forcing), `encode`, `step` and `reorder`
    decode token by token. Both call `begin` once and `advance` for the target's tokens, which a subclass defines. So
    they compute the same. `features` is the width of what `advance` returns.

    Matrices outside the cells are initialised by Xavier, embeddings and the output by N(0, 1/width), biases with zeros.
    `embedding_weights` is None or a file of word vectors, with which the task replaces the first values of embeddings
    in a new run (seq2seq/importing/embeddings.py).
    """

    decided_by_data = ("embedding", "source_embedding", "output")  # with a row per vocabulary entry
    unshardable = "its recurrent cells are called step by step"

    def __init__(
        self,
        *,
        vocabularies: tuple[int, int],
        joint: bool,
        embedding_width: int,
        features: int,
        dropout: float,
        tied: Tying,
        longest: int,
        embedding_weights: str | None,
    ):
        super().__init__()
        _check(embedding_width, features, tied, joint)
        self.longest, self.embedding_weights = longest, embedding_weights
        source, target = vocabularies
        self.embedding = TokenEmbedding(target, embedding_width)
        self.source_embedding = None if tied == "all" else TokenEmbedding(source, embedding_width)
        self.output = Linear(features, target, bias=False) if tied == "none" else Tied(self.embedding)
        self.dropout = Dropout(dropout)

    def begin(self, x: Tensor, lengths: Tensor) -> State:
        """Encode embedded sources (B, S, E) with lengths (B,) into the first state of decoding."""
        raise NotImplementedError

    def advance(self, state: State, x: Tensor) -> Tensor:
        """Decode the embedded tokens x (R, N, E), N after one another -> the output's inputs (R, N, F).

        `state` becomes that after the last token.
        """
        raise NotImplementedError

    def forward(self, source: Tensor, source_lengths: Tensor, target_in: Tensor) -> Tensor:
        """The logits of the next token at each position of the targets, given the tokens up to this position.

        Right-padded sources (B, S) int64, their lengths (B,), targets (B, T) int64 that begin with BOS -> (B, T, V).
        Raises UserError for a source of more than `longest` tokens.
        """
        features = self.advance(self.encode(source, source_lengths), self.dropout(self.embedding(target_in)))
        logits: Tensor = self.output(self.dropout(features))
        return logits

    def encode(self, source: Tensor, lengths: Tensor) -> State:
        """Encode sources (B, S) with lengths (B,) into the initial state of decoding; see common.decoding.contract.

        Raises UserError for a source of more than `longest` tokens.
        """
        refuse_too_long(source, self.longest)
        embedding = self.embedding if self.source_embedding is None else self.source_embedding
        return self.begin(self.dropout(embedding(source)), lengths.to(source.device))

    def step(self, state: State, tokens: Tensor) -> Tensor:
        """Append a token to each row: tokens (R,), or prompts (R, N) -> logits of the next token (R, V)."""
        tokens = tokens if tokens.ndim == 2 else tokens[:, None]
        features = self.advance(state, self.dropout(self.embedding(tokens)))[:, -1]
        logits: Tensor = self.output(self.dropout(features))
        return logits

    def reorder(self, state: State, rows: Tensor) -> State:
        """Select hypotheses by their indices `rows` (R',); see common.decoding.contract."""
        return state.select(rows)

    def _initialise(self) -> None:
        """Initialise all parameters but those of cells, which initialise themselves."""
        own = {f"{name}.{part}" for name, cell in _cells_of(self) for part, _ in cell.named_parameters()}
        for name, parameter in self.named_parameters():
            if name in own:
                continue
            if "embedding" in name or name.startswith("output."):
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            elif parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)


def run(decoder: Recurrent, state: State, x: Tensor) -> Tensor:
    """Run a decoder over known inputs x (R, N, ...) -> outputs (R, N, H); changes the hidden state."""
    if x.shape[1] > 1:
        outputs: Tensor
        outputs, state.hidden = decoder(x, states=state.hidden)
        return outputs
    output, state.hidden = decoder.step(x[:, 0], state.hidden)
    return output[:, None]


def attend(attention: Alignment, state: State, queries: Tensor) -> Tensor:
    """The context of each query: (R, N, H) -> (R, N, M). The hypotheses of a sentence share its memory."""
    assert state.memory is not None and state.keys is not None and state.real is not None
    rows, count, width = queries.shape
    grouped = queries.reshape(state.memory.shape[0], -1, width)  # (B W, N, H) -> (B, W N, H)
    contexts: Tensor = attention(grouped, state.keys, state.memory, state.real)
    return contexts.reshape(rows, count, -1)


def _cells_of(model: nn.Module) -> list[tuple[str, Cell]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Cell)]


def _check(embedding_width: int, features: int, tied: str, joint: bool) -> None:
    """Raise UserError for options that are not compatible."""
    if tied == "all" and not joint:
        raise UserError(
            "model.tied=all shares one matrix between both languages, but data.tokenizer.joint=false gives each its "
            "own vocabulary; use model.tied=target, or data.tokenizer.joint=true."
        )
    if tied != "none" and embedding_width != features:
        raise UserError(
            f"model.tied={tied} uses the embedding's matrix for the output, whose inputs have the width {features}, "
            f"but model.embedding_width={embedding_width}; make them equal, or use model.tied=none."
        )
