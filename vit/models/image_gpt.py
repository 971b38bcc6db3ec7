"""Image GPT: a Transformer decoder over the pixels of an image, each pixel a token.

Chen et al. 2020, "Generative Pretraining from Pixels" (ICML). The pixels of an image, quantised to a palette of V
colours, form a sequence row by row. The decoder predicts each pixel from those before it (autoregressive objective), or
the masked pixels from all others (masked objective, that of BERT).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.machine.device import full_precision
from common.nn.blocks import BlockCache, BlockOptions, Stack
from common.nn.dropout import Dropout
from common.nn.linear import Linear
from common.nn.positions import Learned1d
from common.types import Fraction, Layers, Positive, PositiveFloat

MAX_TOKENS = 4096  # with more, a warning is printed; the published models have at most 64 x 64 pixels


class Outputs(NamedTuple):
    """What the model computes for B images of N pixels."""

    colours: Tensor  # logits of each pixel's colour, (B, N, V)
    classes: Tensor | None  # logits of each image's class, (B, K); None for a model without a classifier


class QuickGelu(nn.Module):
    """x sigmoid(1.702 x), an approximation of GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return x * torch.sigmoid(1.702 * x)


class ImageGpt(nn.Module):
    """Map the colours of an image's pixels to logits of the colour of each pixel.

    `forward` computes all pixels of known images. `encode`, `step` and `reorder` sample pixel by pixel with a key-value
    cache; they are called by common/decoding/. No linear map has a bias, and norms are RMSNorms.

    Differs: `dropout` is an option, since the authors' models, trained on millions of images, have none.
    """

    decided_by_data = ("head",)  # with a row per class; colours need no entry, since a run inherits the palette
    undecayed = ("embedding", "positions")  # without weight decay, since they are tables of vectors, not linear maps

    def __init__(
        self,
        *,
        colours: int,
        classes: int,
        image_size: tuple[int, int],
        width: Positive,
        heads: Positive,
        layers: Layers,
        feedforward: Positive,
        norm_eps: PositiveFloat,
        dropout: Fraction,
    ):
        """Build the model. The data and the task determine `colours`, `classes` and `image_size`.

        Args:
            colours: V, the number of colours in the palette.
            classes: K, the number of classes of the classifier on the mean of all positions; 0 = no classifier.
            image_size: (H, W) in pixels; one position is learned for each of the N = H W pixels.
            width: C, the width of a token.
            heads: number of heads of each attention.
            layers: number of decoder blocks.
            feedforward: hidden width of each feed-forward network.
            norm_eps: epsilon of the norms.
            dropout: rate of dropout on the embedded pixels and on the output of each sub-layer.

        Raises UserError when `width` is not divisible by `heads`.
        """
        super().__init__()
        if width % heads:
            raise UserError(f"model.width={width} must be divisible by model.heads={heads}.")
        self.colours, self.image_size, self.depth = colours, image_size, layers
        self.embedding = nn.Embedding(colours + 1, width)  # the last row is the start token, which precedes all pixels
        self.positions = Learned1d(width, math.prod(image_size))
        self.dropout = Dropout(dropout)
        options = BlockOptions(
            width=width,
            heads=heads,
            feedforward=feedforward,
            pre_norm=True,
            dropout=dropout,
            activation=QuickGelu,
            norm="rms",
            norm_eps=norm_eps,
            attention_bias=False,
            feedforward_bias=False,
        )
        self.decoder = Stack(options, layers=layers, final_norm=True)
        self.output = Linear(width, colours, bias=False)
        self.head = Linear(width, classes, bias=False) if classes else None
        self._initialise()

    def forward(self, tokens: Tensor, masked: Tensor | None = None) -> Outputs:
        """Colours of pixels (B, N) int64, row by row -> the logits of each pixel's colour and of each image's class.

        If `masked` is None, the logits of a pixel depend only on the pixels before it: the input of position i is pixel
        i - 1, and that of the first position the start token. Otherwise `masked` (B, N) is boolean, and the logits of
        each pixel depend on all pixels that are not masked. The embedding of a masked pixel is zero.
        """
        x: Tensor = self.decoder(self.embed(tokens, masked), causal=masked is None)
        # The outputs are computed in full precision: code lengths would suffer from the rounding of logits to bf16.
        with full_precision(x.device):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            return Outputs(self.output(x), None if self.head is None else self.head(x.mean(dim=1)))

    def embed(self, tokens: Tensor, masked: Tensor | None = None) -> Tensor:
        """Embed pixels (B, N) -> (B, N, C); shifted by one position if `masked` is None (see `forward`)."""
        if masked is None:
            start = tokens.new_full((tokens.shape[0], 1), self.colours)
            x: Tensor = self.embedding(torch.cat([start, tokens[:, :-1]], dim=1))
        else:
            x = self.embedding(tokens).masked_fill(masked[:, :, None], 0)
        x = self.dropout(x + self.positions(tokens.shape[1]))
        return x

    def layer_features(self, tokens: Tensor, masked: Tensor | None = None) -> list[Tensor]:
        """The features of each layer, for linear probes: pixels (B, N) -> L + 1 tensors (B, C).

        Those of block l are its input after the block's first norm, averaged over positions (section 2.4 of the paper).
        The last are the outputs of the final norm, averaged over positions.
        """
        blocks: list[Any] = [*self.decoder.blocks]
        x, features = self.embed(tokens, masked), []
        for block in blocks:
            features.append(block.residuals[0].norm(x).mean(dim=1))
            x = block(x, causal=masked is None)
        return [*features, self.decoder.norm(x).mean(dim=1)]

    def encode(self, source: Tensor, lengths: Tensor) -> list[BlockCache]:
        """Make the empty caches of the initial state; see common.decoding.contract. There is no source: (B, 0)."""
        return self.decoder.caches()

    def step(self, state: list[BlockCache], tokens: Tensor) -> Tensor:
        """Append pixels (R,), or the start token and pixels (R, P) -> logits of the next pixel's colour (R, V).

        The caches in `state` are extended in place. The start token has the index V.
        """
        tokens = tokens if tokens.ndim == 2 else tokens[:, None]
        x = self.embedding(tokens) + self.positions(tokens.shape[1], state[0].own.length)
        x = self.decoder(x, causal=True, caches=state)[:, -1]
        with full_precision(x.device):
            logits: Tensor = self.output(x.to(torch.promote_types(x.dtype, torch.float32)))
        return logits

    def reorder(self, state: list[BlockCache], rows: Tensor) -> list[BlockCache]:
        """Keep the rows with these indices (R',) in the caches; see common.decoding.contract."""
        for cache in state:
            cache.own.select(rows)
        return state

    def input_summary(self) -> list[str]:
        """Return a line for the start summary with the number of tokens of an image."""
        height, width = self.image_size
        return [f"{height * width:,} tokens an image: {height} x {width} pixels of {self.colours} colours"]

    def input_advice(self) -> list[str]:
        """Return a warning if an image has more than `MAX_TOKENS` pixels; otherwise an empty list."""
        tokens = math.prod(self.image_size)
        if tokens <= MAX_TOKENS:
            return []
        return [
            f"an image has {tokens:,} pixels, each of them a token, and time and memory of attention grow with the "
            "square of their number: give a smaller data.image_size, such as 32."
        ]

    def layers(self) -> list[tuple[str, ...]]:
        """List the name prefixes of each layer's parameters, from input to output, for layer-wise learning rates."""
        blocks = [(f"decoder.blocks.{i}",) for i in range(self.depth)]
        return [("embedding", "positions"), *blocks, ("decoder.norm", "output", "head")]

    def _initialise(self) -> None:
        """Initialise parameters as the authors' code does (openai/image-gpt).

        The output is zero, so that the first loss is exactly ln V.
        """
        width = self.embedding.embedding_dim
        for name, parameter in self.named_parameters():
            if name.endswith("in_proj.weight"):
                nn.init.normal_(parameter, std=width**-0.5)
            elif name.endswith("out_proj.weight"):
                nn.init.normal_(parameter, std=(width * self.depth) ** -0.5)
            elif name.startswith("positions"):
                nn.init.normal_(parameter, std=0.01)
            elif name.startswith(("output", "head")):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
