"""A decoder-only translator: source and target are one sequence for one stack of blocks.

The source is the prefix of the sequence. A target token attends to the source and to the target tokens up to itself.
Source tokens attend to the whole source ("prefix language model", Raffel et al. 2020, arXiv 1910.10683, section 3.2.1;
Dong et al. 2019, arXiv 1905.03197, section 2.3) or only to the source tokens up to themselves.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.nn.blocks import BlockOptions, Stack
from common.nn.dropout import Dropout
from common.nn.embedding import TokenEmbedding
from common.nn.linear import Tied
from common.nn.positions import sine
from common.types import Layers, Positive
from seq2seq.models.hypotheses import Hypotheses
from seq2seq.models.transformer import ACTIVATIONS, TranslatorBlockOptions, initialise, refuse_too_long

SOURCE, TARGET = 0, 1  # rows of the segment embedding


@dataclass
class State(Hypotheses):
    """The state of decoding. The caches of a sentence begin with the keys and values of its source, padded to S."""

    lengths: Tensor  # (B,) int64: the sources' numbers of tokens


class PrefixLm(nn.Module):
    """Map token ids of the source and the target to logits of the target's next token.

    `forward` computes the logits at all positions of a known target (teacher forcing). `encode` computes the keys and
    values of the source once, and `step` and `reorder` decode token by token; they are called by common/decoding/.

    One matrix is the embedding of source and target and the output, so both languages have one vocabulary. A learned
    vector is added to each source token, and another to each target token. Positions are sines. Initial values are
    those of `seq2seq.models.transformer.Transformer`.
    """

    decided_by_data = ("embedding",)  # with a row per vocabulary entry

    def __init__(
        self,
        *,
        vocabularies: tuple[int, int],
        joint: bool,
        width: Positive,
        heads: Positive,
        feedforward: Positive,
        layers: Layers,
        longest: Positive,
        prefix: Literal["full", "causal"],
        target_positions: Literal["continue", "restart"],
        blocks: TranslatorBlockOptions,
    ):
        """Build the model; raises UserError for options that are not compatible.

        Args:
            vocabularies: number of entries of the source and of the target vocabulary, decided by the data.
            joint: whether source and target have the same vocabulary, decided by the data; must be true.
            width: C, the width of embeddings and blocks; even and divisible by `heads`.
            heads: number of heads of each attention.
            feedforward: hidden width of each feed-forward.
            layers: number of blocks.
            longest: maximum number of source tokens, including EOS. Since sine positions have no limit, it can be
                raised for a trained model.
            prefix: which source tokens a source token attends to: all of them ("full"), or those up to itself
                ("causal").
            target_positions: the position of the first target token: the number of source tokens ("continue"), or 0
                ("restart").
            blocks: see seq2seq.models.transformer.TranslatorBlockOptions.
        """
        super().__init__()
        _check(width, heads, joint)
        self.width, self.longest, self.scale = width, longest, math.sqrt(width)
        self.prefix, self.target_positions = prefix, target_positions
        self.embedding = TokenEmbedding(vocabularies[1], width)
        self.segment_embedding = nn.Embedding(2, width)
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
        self.decoder = Stack(options, layers=layers, final_norm=blocks.pre_norm)
        self.output = Tied(self.embedding)
        initialise(self, width)

    def forward(self, source: Tensor, source_lengths: Tensor, target_in: Tensor) -> Tensor:
        """The logits of the next token at each position of the targets, given the source and the tokens up to it.

        Right-padded sources (B, S) int64, their lengths (B,), targets (B, T) int64 that begin with BOS -> (B, T, V).
        In the sequence of S + T tokens, a row's target follows its last source token, and padding is at the end. Raises
        UserError for a source of more than `longest` tokens.
        """
        refuse_too_long(source, self.longest)
        lengths = source_lengths.to(source.device)[:, None]  # (B, 1)
        count, length = source.shape[1], source.shape[1] + target_in.shape[1]
        places = torch.arange(length, device=source.device)  # (N,), N = S + T
        in_source = places < lengths  # (B, N)
        # Places after the end of a row's target repeat its last token; no token before them attends to them.
        columns = torch.where(in_source, places, (places - lengths + count).clamp(max=length - 1))  # (B, N)
        tokens = torch.cat([source, target_in], dim=1).gather(1, columns)
        restarts = self.target_positions == "restart"
        positions = torch.where(in_source, places, places - lengths) if restarts else places
        x = self._embed(tokens, positions, torch.where(in_source, SOURCE, TARGET))
        may_look = None
        if self.prefix == "full":
            may_look = (in_source[:, None] | (places <= places[:, None]))[:, None]  # (B, 1, N, N)
        x = self.decoder(x, may_look=may_look, causal=may_look is None)
        rows = lengths + torch.arange(target_in.shape[1], device=source.device)  # (B, T)
        return self._logits(x.gather(1, rows[:, :, None].expand(-1, -1, self.width)))

    def encode(self, source: Tensor, lengths: Tensor) -> State:
        """Compute the keys and values of sources (B, S) with lengths (B,), the initial state of decoding.

        See common.decoding.contract. Raises UserError for a source of more than `longest` tokens.
        """
        refuse_too_long(source, self.longest)
        lengths, places = lengths.to(source.device), torch.arange(source.shape[1], device=source.device)
        real = (places < lengths[:, None])[:, None]  # (B, 1, S)
        may_look = real[:, None]  # (B, 1, 1, S)
        if self.prefix == "causal":
            may_look = may_look & (places <= places[:, None])  # (B, 1, S, S)
        caches = self.decoder.caches()
        self.decoder(self._embed(source, places, source.new_full((1, 1), SOURCE)), may_look=may_look, caches=caches)
        return State(caches, real, 0, sees_all=False, lengths=lengths)  # source tokens are ancestors, padding is not

    def step(self, state: State, tokens: Tensor) -> Tensor:
        """Append a token to each hypothesis: tokens (B * W,) -> logits of the next token (B * W, V).

        `state` is extended in place. In the first call, `tokens` may be prompts (B, N); see common.decoding.contract.
        """
        start, is_prompt = state.tokens, tokens.ndim == 2
        tokens, may_look = state.append(tokens)  # (B, W), W hypotheses at position `start`; or (B, N)
        positions = torch.arange(start, state.tokens, device=tokens.device)  # (1,) or (N,)
        if self.target_positions == "continue":
            positions = positions + state.lengths[:, None]  # (B, 1) or (B, N)
        x = self._embed(tokens, positions, tokens.new_full((1, 1), TARGET))
        x = self.decoder(x, may_look=may_look, causal=is_prompt, caches=state.caches)
        return self._logits(x[:, -1] if is_prompt else x.flatten(0, 1))

    def reorder(self, state: State, rows: Tensor) -> State:
        """Select hypotheses by their indices `rows` (B' * W',) in 0 .. B * W - 1; see common.decoding.contract."""
        sentences = state.select(rows)
        if sentences is not None:
            state.lengths = state.lengths[sentences]
        return state

    def _embed(self, tokens: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
        """Tokens (B, N), positions and segments broadcastable to them -> the sums of their vectors (B, N, C)."""
        x = (self.embedding(tokens) + self.segment_embedding(segments)) * self.scale
        x = x + sine(positions.float(), self.width).to(x.dtype)
        embedded: Tensor = self.dropout(x)
        return embedded

    def _logits(self, x: Tensor) -> Tensor:
        """The decoder's output (..., C) -> logits (..., V)."""
        logits: Tensor = self.output(x)
        return logits


def _check(width: int, heads: int, joint: bool) -> None:
    """Raise UserError for options that are not compatible."""
    if width % heads or width % 2:
        raise UserError(f"model.width={width} must be even and divisible by model.heads={heads}.")
    if not joint:
        raise UserError(
            "a decoder-only translator has one vocabulary for both languages, but data.tokenizer.joint=false gives "
            "each its own; use data.tokenizer.joint=true."
        )
