"""BERT: a Transformer encoder that predicts masked tokens, or classifies a text.

Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers", arXiv 1810.04805; RoBERTa is Liu et al.
2019, arXiv 1907.11692.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.nn.blocks import BlockOptions, Stack
from common.nn.dropout import Dropout
from common.nn.embedding import TokenEmbedding
from common.nn.linear import Linear, Tied
from common.types import Count, Fraction, Layers, Positive, PositiveFloat

INITIAL_STD = 0.02  # of all matrices and embeddings; values beyond two standard deviations are drawn again


@dataclass(frozen=True, kw_only=True)
class BertBlockOptions:
    """Options of the blocks and embeddings; see common.nn.blocks.BlockOptions."""

    dropout: Fraction  # of embeddings and of the output of each sub-layer
    attention_dropout: Fraction
    norm_eps: PositiveFloat  # 1e-12 in BERT, 1e-5 in RoBERTa


class Embeddings(nn.Module):
    """The sum of the embeddings of tokens, of their positions and of the text's type, with a norm (figure 2)."""

    def __init__(
        self, *, entries: int, width: int, positions: int, first_position: int, types: int, eps: float, dropout: float
    ):
        """Make embeddings of `entries` tokens; the first token has row `first_position` of the table of positions."""
        super().__init__()
        self.first_position = first_position
        self.tokens = TokenEmbedding(entries, width)
        self.positions = nn.Embedding(first_position + positions, width)
        self.types = nn.Embedding(types, width) if types else None
        self.norm = nn.LayerNorm(width, eps=eps)
        self.dropout = Dropout(dropout)

    def forward(self, tokens: Tensor, types: Tensor | None = None, *, start: int = 0) -> Tensor:
        """Tokens (B, N) int64 at positions from `start` on -> (B, N, C).

        `types` (B, N) int64 are the types of the tokens: 0 for the first of two texts and 1 for the second. None stands
        for zeros.
        """
        first = self.first_position + start
        positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)  # (N,)
        x: Tensor = self.tokens(tokens) + self.positions(positions)
        if self.types is not None:
            x = x + (self.types.weight[0] if types is None else self.types(types))
        x = self.dropout(self.norm(x))
        return x


class Encoder(nn.Module):
    """The embeddings and the post-norm blocks of BERT; the base class of `Bert` and `BertClassifier`."""

    def __init__(
        self,
        *,
        vocabulary: int,
        width: int,
        heads: int,
        layers: int,
        feedforward: int,
        longest: int,
        first_position: int,
        token_types: int,
        blocks: BertBlockOptions,
    ):
        super().__init__()
        if width % heads:
            raise UserError(f"model.width={width} must be divisible by model.heads={heads}.")
        self.longest, self.depth = longest, layers
        self.embeddings = Embeddings(
            entries=vocabulary,
            width=width,
            positions=longest,
            first_position=first_position,
            types=token_types,
            eps=blocks.norm_eps,
            dropout=blocks.dropout,
        )
        options = BlockOptions(
            width=width,
            heads=heads,
            feedforward=feedforward,
            pre_norm=False,
            dropout=blocks.dropout,
            attention_dropout=blocks.attention_dropout,
            activation=nn.GELU,
            norm_eps=blocks.norm_eps,
        )
        self.encoder = Stack(options, layers=layers, final_norm=False)

    def features(self, tokens: Tensor, real: Tensor | None = None, types: Tensor | None = None) -> Tensor:
        """The encoder's output: tokens (B, N) int64 -> (B, N, C).

        `real` (B, N) is False in padding; None = no padding. `types` are those of `Embeddings`. Raises UserError for
        more than `longest` tokens.
        """
        check_length(tokens.shape[1], self.longest)
        may_look = None if real is None else real[:, None, None]  # (B, N) -> (B, 1, 1, N)
        x: Tensor = self.encoder(self.embeddings(tokens, types), may_look=may_look)
        return x

    def layers(self) -> list[tuple[str, ...]]:
        """List the name prefixes of each layer's parameters, from input to output, for layer-wise learning rates."""
        blocks = [(f"encoder.blocks.{i}",) for i in range(self.depth)]
        head = [name for name, _ in self.named_children() if name not in ("embeddings", "encoder")]
        return [("embeddings",), *blocks, (*head, "output_bias")]


class Bert(Encoder):
    """Map a text with masked tokens to logits of the tokens that were masked.

    The head is a linear map, GELU and a norm, and then the embedding matrix with a bias for each entry.

    Differs: there is no prediction of the next sentence, which RoBERTa found to be of no use (section 4.2).
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        width: Positive,
        heads: Positive,
        layers: Layers,
        feedforward: Positive,
        longest: Positive,
        first_position: Count,
        token_types: Count,
        blocks: BertBlockOptions,
    ):
        """Build the model. The data determine `vocabulary`.

        Args:
            vocabulary: V, the number of entries of the tokenizer.
            width: C, the width of a token.
            heads: number of heads of each attention.
            layers: number of encoder blocks.
            feedforward: hidden width of each feed-forward network.
            longest: maximum number of tokens of a text, special entries included; the number of learned positions.
            first_position: the row of the table of positions for the first token: 0, or 2 in RoBERTa, whose first two
                rows are unused.
            token_types: number of types of texts: 2 in BERT (the first and the second of a pair), 1 in RoBERTa, 0 =
                none.
            blocks: see BertBlockOptions.

        Raises UserError when `width` is not divisible by `heads`.
        """
        super().__init__(
            vocabulary=vocabulary,
            width=width,
            heads=heads,
            layers=layers,
            feedforward=feedforward,
            longest=longest,
            first_position=first_position,
            token_types=token_types,
            blocks=blocks,
        )
        self.transform = Linear(width, width)
        self.transform_norm = nn.LayerNorm(width, eps=blocks.norm_eps)
        self.output = Tied(self.embeddings.tokens)
        self.output_bias = nn.Parameter(torch.zeros(vocabulary))
        initialise(self)

    def forward(
        self,
        tokens: Tensor,
        real: Tensor | None = None,
        selected: Tensor | None = None,
        types: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, N) int64, with a mask entry in place of each masked token -> the logits of all tokens (B, N, V).

        With `selected` (M,) int64, only the logits of M tokens (M, V) are computed; these are indices into the
        flattened B * N tokens. For `real` and `types` see `features`.
        """
        x = self.features(tokens, real, types)
        if selected is not None:
            x = x.flatten(0, 1)[selected]  # (B, N, C) -> (M, C)
        x = self.transform_norm(nn.functional.gelu(self.transform(x)))
        logits: Tensor = self.output(x)
        return logits + self.output_bias.to(logits.dtype)


class BertClassifier(Encoder):
    """Map a text to logits of its class: a tanh layer and a linear map on the output of the first token.

    The first token is [CLS] (<s> in RoBERTa). The tanh layer, `representation`, is BERT's pooler.
    """

    decided_by_data = ("head",)  # with a row per class; a run takes the checkpoint's tokenizer, so tokens match

    def __init__(
        self,
        *,
        vocabulary: int,
        classes: int,
        width: Positive,
        heads: Positive,
        layers: Layers,
        feedforward: Positive,
        longest: Positive,
        first_position: Count,
        token_types: Count,
        blocks: BertBlockOptions,
    ):
        """Build the model. The data determine `vocabulary` and `classes`; for the other arguments see `Bert`."""
        super().__init__(
            vocabulary=vocabulary,
            width=width,
            heads=heads,
            layers=layers,
            feedforward=feedforward,
            longest=longest,
            first_position=first_position,
            token_types=token_types,
            blocks=blocks,
        )
        self.representation = Linear(width, width)
        self.dropout = Dropout(blocks.dropout)
        self.head = Linear(width, classes)
        initialise(self)

    def forward(self, tokens: Tensor, real: Tensor | None = None, types: Tensor | None = None) -> Tensor:
        """Tokens (B, N) int64 -> logits of the classes (B, K); for `real` and `types` see `features`."""
        x = self.features(tokens, real, types)[:, 0]  # (B, N, C) -> (B, C)
        x = self.dropout(self.representation(x).tanh())
        logits: Tensor = self.head(x)
        return logits


def check_length(count: int, longest: int) -> None:
    """Raise UserError for a text of more than `longest` tokens."""
    if not torch.compiler.is_exporting() and count > longest:
        raise UserError(
            f"a text has {count:,} tokens, more than model.longest={longest:,}, for which the model has positions; "
            "divide the text into shorter ones."
        )


def initialise(model: nn.Module) -> None:
    """Initialise parameters as the authors' code does: truncated normal matrices and embeddings, zero biases."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            nn.init.trunc_normal_(parameter, std=INITIAL_STD, a=-2 * INITIAL_STD, b=2 * INITIAL_STD)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
