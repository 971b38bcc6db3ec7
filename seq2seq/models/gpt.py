"""GPT-2, a decoder-only language model (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

The blocks are those of Vaswani et al. 2017 (arXiv 1706.03762) without cross-attention, with norms before the
sub-layers and a final norm.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.machine.device import full_precision
from common.nn.blocks import BlockOptions, Stack
from common.nn.dropout import Dropout
from common.nn.linear import Tied
from common.nn.positions import Learned1d
from common.types import Fraction, Layers, Positive, PositiveFloat
from seq2seq.models.hypotheses import Hypotheses

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "gelu": nn.GELU,
    "relu": nn.ReLU,
}


@dataclass(frozen=True, kw_only=True)
class GptBlockOptions:
    """Options of the blocks; see common.nn.blocks.BlockOptions.

    dropout: rate of dropout on the sums of embeddings and positions, and on the output of each sub-layer.
    attention_dropout: rate of dropout on the attention probabilities.
    norm_eps: epsilon of the norms.
    activation: of the feed-forward networks. GPT-2 has "gelu_tanh", an approximation of "gelu". A model works only with
        the activation that it was trained with.
    """

    dropout: Fraction
    attention_dropout: Fraction
    norm_eps: PositiveFloat
    activation: Literal["gelu_tanh", "gelu", "relu"]


class Gpt(nn.Module):
    """Map tokens to logits of the next token at each position, given the tokens up to this position.

    `forward` computes all positions of known texts. `encode`, `step` and `reorder` generate token by token with a
    key-value cache; they are called by common/decoding/. The output shares the matrix of the embedding.
    """

    decided_by_data = ("embedding",)  # with a row per vocabulary entry

    def __init__(
        self,
        *,
        vocabulary: int,
        width: Positive,
        heads: Positive,
        layers: Layers,
        feedforward: Positive,
        longest: Positive,
        blocks: GptBlockOptions,
    ):
        """Build the model; raises UserError when `width` is not divisible by `heads`.

        Args:
            vocabulary: V, the number of vocabulary entries, decided by the data.
            width: C, the width of a token.
            heads: number of heads of each attention.
            layers: number of decoder blocks.
            feedforward: hidden width of each feed-forward network.
            longest: maximum number of tokens of a sequence (the context); one position is learned for each.
            blocks: see GptBlockOptions.
        """
        super().__init__()
        if width % heads:
            raise UserError(f"model.width={width} must be divisible by model.heads={heads}.")
        self.longest, self.depth = longest, layers
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = Learned1d(width, longest)
        self.dropout = Dropout(blocks.dropout)
        options = BlockOptions(
            width=width,
            heads=heads,
            feedforward=feedforward,
            pre_norm=True,
            dropout=blocks.dropout,
            attention_dropout=blocks.attention_dropout,
            activation=ACTIVATIONS[blocks.activation],
            norm_eps=blocks.norm_eps,
        )
        self.decoder = Stack(options, layers=layers, final_norm=True)
        self.output = Tied(self.embedding)
        self._initialise()

    def forward(self, tokens: Tensor, real: Tensor | None = None) -> Tensor:
        """Tokens (B, N) int64 -> the logits of the token after each of them (B, N, V).

        `real` (B, N) is boolean and False at padding, which may precede or follow a row's tokens. Positions are counted
        from the first real token. With right padding, None gives the same logits at real tokens, since a token attends
        only to those before it. Raises UserError for more than `longest` tokens.

        In evaluation, logits are computed in full precision even under autocast: bf16 would round logits of size 100,
        which GPT-2's have, by up to 0.25 nats.
        """
        padding = None if real is None else real.int().argmax(1)  # (B,)
        x = self._embed(tokens, 0, padding)
        x = self.decoder(x, may_look=None if real is None else real[:, None, None], causal=True)
        return self._logits(x)

    def encode(self, source: Tensor, lengths: Tensor) -> Hypotheses:
        """Make the initial state of B texts; see common.decoding.contract. There is no source: (B, 0)."""
        ancestors = torch.ones(source.shape[0], 1, 0, dtype=torch.bool, device=source.device)
        return Hypotheses(self.decoder.caches(), ancestors, 0, sees_all=True)

    def step(self, state: Hypotheses, tokens: Tensor) -> Tensor:
        """Append a token to each text: (B * W,) -> logits of the next token (B * W, V).

        `state` is extended in place. In the first call, `tokens` may be prompts (B, N). Raises UserError if a prompt
        and its continuation have more than `longest` tokens.
        """
        start, is_prompt = state.tokens, tokens.ndim == 2
        tokens, may_look = state.append(tokens)  # (B, W), W hypotheses at position `start`; or (B, N)
        x = self._embed(tokens, start) if is_prompt else self._embed(tokens[..., None], start)[:, :, 0]
        x = self.decoder(x, may_look=may_look, causal=is_prompt, caches=state.caches)
        return self._logits(x[:, -1] if is_prompt else x.flatten(0, 1))

    def reorder(self, state: Hypotheses, rows: Tensor) -> Hypotheses:
        """Select hypotheses by their indices `rows` (B' * W',) in 0 .. B * W - 1; see common.decoding.contract."""
        state.select(rows)
        return state

    def input_summary(self) -> list[str]:
        """Return a line for the start summary with the size of the context and of the vocabulary."""
        return [f"a context of {self.longest:,} tokens, {self.embedding.num_embeddings:,} vocabulary entries"]

    def layers(self) -> list[tuple[str, ...]]:
        """List the name prefixes of each layer's parameters, from input to output, for layer-wise learning rates."""
        blocks = [(f"decoder.blocks.{i}",) for i in range(self.depth)]
        return [("embedding", "positions"), *blocks, ("decoder.norm",)]

    def _embed(self, tokens: Tensor, start: int, padding: Tensor | None = None) -> Tensor:
        """Tokens (..., N) at the positions from `start` on -> the sums of embeddings and positions (..., N, C)."""
        end = start + tokens.shape[-1]
        if end > self.longest:
            what = "a text has" if not start else "a prompt and its continuation have"
            raise UserError(
                f"{what} {end:,} tokens, more than model.longest={self.longest:,}, the context of the model; give "
                "shorter texts, or generate fewer tokens."
            )
        x: Tensor = self.embedding(tokens) + self.positions(tokens.shape[-1], start, padding)
        x = self.dropout(x)
        return x

    def _logits(self, x: Tensor) -> Tensor:
        """The decoder's output (..., C) -> logits (..., V), in evaluation in full precision; see `forward`."""
        logits: Tensor
        if self.training:
            logits = self.output(x)
            return logits
        with full_precision(x.device):
            logits = self.output(x.to(torch.promote_types(x.dtype, torch.float32)))
            return logits

    def _initialise(self) -> None:
        """Initialise parameters as the authors' code does (openai/gpt-2), with the paper's scale of residual outputs.

        The weights of the two maps whose outputs are added to the residual stream are scaled by 1 / sqrt(2 L).
        """
        for name, parameter in self.named_parameters():
            if name.startswith("positions"):
                nn.init.normal_(parameter, std=0.01)
            elif name.endswith(("out_proj.weight", "contract.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.depth))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
