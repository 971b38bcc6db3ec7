"""The Transformer of Vaswani et al. 2017 (arXiv 1706.03762, section 3), an encoder and a decoder.

Pre-norm blocks, an option, are those of Xiong et al. 2020 (arXiv 2002.04745).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.nn.attention import additive_mask
from common.nn.blocks import BlockOptions, Context, Memory, Stack
from common.nn.dropout import Dropout
from common.nn.embedding import TokenEmbedding
from common.nn.linear import Linear, Tied
from common.nn.padding import is_real
from common.nn.positions import Layout, sine
from common.types import Count, Fraction, Layers, Positive, PositiveFloat
from seq2seq.models.hypotheses import Hypotheses

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "swish": nn.SiLU, "gelu": nn.GELU}


@dataclass(frozen=True, kw_only=True)
class PositionOptions:
    """Options of the sine positions, which are added to the embeddings.

    layout: the order of sines and cosines in a position's vector; see common/nn/positions.py.
    first: the number of the first token's position: 0, or 2 in fairseq.
    """

    layout: Layout
    first: Count


@dataclass(frozen=True, kw_only=True)
class TranslatorBlockOptions:
    """The options of blocks in which published Transformers differ; see common.nn.blocks.BlockOptions."""

    pre_norm: bool
    dropout: Fraction  # of each sub-layer's output, and of the sums of embeddings and positions (section 5.4)
    attention_dropout: Fraction
    hidden_dropout: Fraction
    norm_eps: PositiveFloat
    activation: Literal["relu", "swish", "gelu"]


@dataclass
class State(Hypotheses):
    """The state of decoding; the keys and values of the encoder's output are stored once for each sentence."""

    real: Tensor  # (B, 1, 1, S) boolean: which source tokens are not padding
    real_bias: Tensor | None = None  # `real` as an additive mask, if it was needed

    def memory(self) -> Memory:
        """The memory whose keys and values the caches hold, with its mask."""
        if not _takes_bias(self.real):
            return Memory(None, None, self.real)
        if self.real_bias is None:
            self.real_bias = additive_mask(self.real, self.dtype)
        return Memory(None, None, bias=self.real_bias)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the keys and values, in which attention adds its masks."""
        memory = self.caches[0].memory
        assert memory is not None
        return memory.content()[0].dtype


class Transformer(nn.Module):
    """Map token ids of the source and the target to logits of the target's next token.

    `forward` computes the logits at all positions of a known target (teacher forcing). `encode`, `step` and `reorder`
    decode token by token; they are called by common/decoding/.

    Differs: the attention projections have biases, those of the paper have none. Otherwise, the architecture is the
    paper's if blocks.pre_norm is false, blocks.activation is "relu", blocks.attention_dropout and blocks.hidden_dropout
    are 0, tied is "all", scaled is true, output_bias is false, and positions are interleaved and start at 0. The paper
    states no initialisation. Ours is that of the authors' code: Xavier for matrices, separately for the query, key and
    value projections, and N(0, 1/width) for embeddings and the output.
    """

    decided_by_data: tuple[str, ...] = ("embedding", "source_embedding", "output", "output_bias")  # a row per entry
    quantised = ("output",)  # a third of the operations of decoding with a vocabulary of 32,000 entries

    def __init__(
        self,
        *,
        vocabularies: tuple[int, int],
        joint: bool,
        width: Positive,
        heads: Positive,
        feedforward: Positive,
        encoder_layers: Layers,
        decoder_layers: Layers,
        tied: Literal["all", "target", "none"],
        scaled: bool,
        output_bias: bool,
        longest: Positive,
        positions: PositionOptions,
        blocks: TranslatorBlockOptions,
    ):
        """Build the model; raises UserError for options that are not compatible.

        Args:
            vocabularies: number of entries of the source and of the target vocabulary, decided by the data.
            joint: whether source and target have the same vocabulary, decided by the data.
            width: C, the width of embeddings and blocks; even and divisible by `heads`.
            heads: number of heads of each attention.
            feedforward: hidden width of each feed-forward.
            encoder_layers: number of encoder blocks.
            decoder_layers: number of decoder blocks.
            tied: which of the source embedding, target embedding and output share one matrix (section 3.4): "all"
                (needs a joint vocabulary), "target" (target embedding and output), or "none".
            scaled: whether embeddings are multiplied by sqrt(C) (section 3.4).
            output_bias: whether each entry's logit has a bias, as in Marian.
            longest: maximum number of source tokens, including EOS. Since sine positions have no limit, it can be
                raised for a trained model.
            positions: see PositionOptions.
            blocks: see TranslatorBlockOptions.
        """
        super().__init__()
        _check(width, heads, tied, joint)
        self.width, self.longest, self.positions = width, longest, positions
        self.scale = math.sqrt(width) if scaled else 1.0
        source, target = vocabularies
        # The embedding of the target. Its matrix is also that of the output with tied="target", and that of the output
        # and of the source embedding with tied="all".
        self.embedding = TokenEmbedding(target, width)
        self.source_embedding = None if tied == "all" else TokenEmbedding(source, width)
        self.output = Linear(width, target, bias=False) if tied == "none" else Tied(self.embedding)
        self.output_bias = nn.Parameter(torch.zeros(target)) if output_bias else None
        self.dropout = Dropout(blocks.dropout)
        options = BlockOptions(
            width=width,
            heads=heads,
            feedforward=feedforward,
            pre_norm=blocks.pre_norm,
            dropout=blocks.dropout,
            attention_dropout=blocks.attention_dropout,
            hidden_dropout=blocks.hidden_dropout,
            activation=ACTIVATIONS[blocks.activation],
            norm_eps=blocks.norm_eps,
        )
        self.encoder = Stack(options, layers=encoder_layers, final_norm=blocks.pre_norm)
        self.decoder = Stack(options, layers=decoder_layers, final_norm=blocks.pre_norm, cross=True)
        initialise(self, width)

    @property
    def masks_entries(self) -> bool:
        """Whether the output bias may mask entries: imports set it to -1e9 for entries that must not be predicted."""
        return self.output_bias is not None

    def forward(self, source: Tensor, source_lengths: Tensor, target_in: Tensor) -> Tensor:
        """The logits of the next token at each position of the targets, given the tokens up to this position.

        Right-padded sources (B, S) int64, their lengths (B,), targets (B, T) int64 that begin with BOS -> (B, T, V).
        Raises UserError for a source of more than `longest` tokens.
        """
        memory, real = self._encode(source, source_lengths)
        x = self._embed(target_in, self.embedding)  # (B, T, C)
        x = self.decoder(x, memory=Memory(memory, memory, real), causal=True)
        return self._logits(x)

    def encode(self, source: Tensor, lengths: Tensor) -> State:
        """Encode sources (B, S) with lengths (B,) into the initial state of decoding; see common.decoding.contract.

        Raises UserError for a source of more than `longest` tokens.
        """
        memory, real = self._encode(source, lengths)
        ancestors = torch.ones(source.shape[0], 1, 0, dtype=torch.bool, device=source.device)
        return State(self.decoder.caches(Memory(memory, memory)), ancestors, 0, sees_all=True, real=real)

    def step(self, state: State, tokens: Tensor) -> Tensor:
        """Append a token to each hypothesis: tokens (B * W,) -> logits of the next token (B * W, V).

        `state` is extended in place. In the first call, `tokens` may be prompts (B, N); see common.decoding.contract.
        """
        start, is_prompt = state.tokens, tokens.ndim == 2
        tokens, may_look = state.append(tokens)  # (B, W) or (B, N)
        if is_prompt:
            x = self._embed(tokens, self.embedding)  # (B, N, C)
        else:
            x = self._embed(tokens.flatten()[:, None], self.embedding, start).view(*tokens.shape, -1)  # (B, W, C)
        bias = None
        if may_look is not None and not is_prompt and _takes_bias(may_look):
            bias, may_look = additive_mask(may_look, state.dtype), None
        context: Context = {"may_look": may_look, "bias": bias, "causal": is_prompt, "memory": state.memory()}
        x = self.decoder(x, caches=state.caches, **context)
        return self._logits(x[:, -1] if is_prompt else x.flatten(0, 1))  # (B * W, V)

    def reorder(self, state: State, rows: Tensor) -> State:
        """Select hypotheses by their indices `rows` (B' * W',) in 0 .. B * W - 1; see common.decoding.contract."""
        sentences = state.select(rows)
        if sentences is not None:
            state.real, state.real_bias = state.real[sentences], None
        return state

    def _encode(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the encoder's output (B, S, C), and which source tokens are not padding, (B, 1, 1, S) boolean."""
        refuse_too_long(source, self.longest)
        real = is_real(lengths.to(source.device), source.shape[1])[:, None, None]  # (B, S) -> (B, 1, 1, S)
        return self.encoder(self._embed_source(source), may_look=real), real

    def _embed_source(self, source: Tensor) -> Tensor:
        """Source tokens (B, S) -> the input of the encoder (B, S, C)."""
        return self._embed(source, self.embedding if self.source_embedding is None else self.source_embedding)

    def _embed(self, tokens: Tensor, embedding: nn.Embedding, start: int = 0) -> Tensor:
        """Tokens (B, N) at positions from `start` on -> the sums of embeddings and positions (B, N, C)."""
        first = start + self.positions.first
        positions = torch.arange(first, first + tokens.shape[1], dtype=torch.float32, device=tokens.device)  # (N,)
        x: Tensor = embedding(tokens) * self.scale
        x = self.dropout(x + sine(positions, self.width, layout=self.positions.layout).to(x.dtype))
        return x

    def _logits(self, x: Tensor) -> Tensor:
        """The decoder's output (..., C) -> logits (..., V)."""
        logits: Tensor = self.output(x)
        return logits if self.output_bias is None else logits + self.output_bias.to(logits.dtype)


def _takes_bias(may_look: Tensor) -> bool:
    """Whether decoding passes this mask to all blocks as a bias.

    On the CPU, each attention would otherwise make its own bias. In decoding, each token may look at itself and at its
    source, so that no query is without keys.
    """
    return may_look.is_cpu and not torch.compiler.is_exporting()


def initialise(model: nn.Module, width: int) -> None:
    """Initialise a translator's parameters as the authors' code does; see `Transformer`."""
    for name, parameter in model.named_parameters():
        if name.endswith("in_proj.weight"):
            for matrix in parameter.chunk(3):
                nn.init.xavier_uniform_(matrix)
        elif "embedding" in name or name.startswith("output."):
            nn.init.normal_(parameter, std=width**-0.5)
        elif parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def refuse_too_long(source: Tensor, longest: int) -> None:
    """Raise UserError if sources (B, S) have more than `longest` tokens."""
    if source.shape[1] > longest:
        raise UserError(
            f"a source sentence has {source.shape[1]:,} tokens, more than model.longest={longest:,}; split it into "
            "sentences, or raise that limit."
        )


def _check(width: int, heads: int, tied: str, joint: bool) -> None:
    """Raise UserError for options that are not compatible."""
    if width % heads or width % 2:
        raise UserError(f"model.width={width} must be even and divisible by model.heads={heads}.")
    if tied == "all" and not joint:
        raise UserError(
            "model.tied=all shares one matrix between both languages, but data.tokenizer.joint=false gives each its "
            "own vocabulary; use model.tied=target, or data.tokenizer.joint=true."
        )
