"""TNT: a ViT whose patches are split into words, which an inner Transformer processes beside the outer one.

Han et al. 2021, "Transformer in Transformer", arXiv 2103.00112, section 3.1 and figure 1. The paper calls a patch a
sentence, and each of its parts a word. In each layer, the words of a patch attend to each other only, and a linear map
then adds all words of a patch to the patch's token.

As in the authors' code (huawei-noah/Efficient-AI-Backbones), each patch is embedded alone, so that words see nothing
outside their patch; the projections of queries, keys and values have no bias; and a LayerNorm also follows the linear
map from words to tokens. In training with drop path, the inner sub-layers are skipped patch by patch.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.machine.device import full_precision
from common.nn.blocks import Stack
from common.nn.dropout import Dropout
from common.nn.linear import Linear
from common.nn.patches import patch_grid, split_into_patches
from common.nn.positions import LearnedGrid
from common.types import Layers, Positive, Side
from vit.models.classifier import PositionOptions, VitBlockOptions
from vit.models.patch_tokens import PatchTokens

WORD_KERNEL = 7  # side in pixels of the convolution that embeds words


@dataclass(frozen=True, kw_only=True)
class InnerOptions:
    """The shape of the inner Transformer.

    width: c, the width of a word.
    heads: number of heads of each attention.
    feedforward: hidden width of each feed-forward network.
    """

    width: Positive
    heads: Positive
    feedforward: Positive


class Words(nn.Module):
    """Maps each patch of `size` by `size` pixels to `side` by `side` words, by a convolution with zeros around it."""

    def __init__(self, *, channels: int, size: int, stride: int, width: int):
        super().__init__()
        self.size, self.side = size, math.ceil(size / stride)
        self.convolution = nn.Conv2d(channels, width, WORD_KERNEL, stride, WORD_KERNEL // 2)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, channels, H, W) -> (B N, W, c), where N is the number of patches, and W = side^2 of words."""
        self.grid(images.shape[-2], images.shape[-1])
        patches = split_into_patches(images, self.size).flatten(0, 1)  # (B N, channels, size, size)
        words: Tensor = self.convolution(patches)  # (B N, c, side, side)
        return words.flatten(2).transpose(1, 2)  # (B N, c, side, side) -> (B N, W, c)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return `patch_grid` for the size of these patches."""
        return patch_grid(height, width, self.size)


class WordsToToken(nn.Module):
    """Maps all words of a patch to the width of its token: a LayerNorm, a linear map, and a second LayerNorm."""

    def __init__(self, *, words: int, word_width: int, width: int, bias: bool, norm_eps: float):
        super().__init__()
        self.word_norm = nn.LayerNorm(words * word_width, eps=norm_eps)
        self.projection = Linear(words * word_width, width, bias)
        self.norm = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, words: Tensor, batch: int) -> Tensor:
        """words (B N, W, c) of B = `batch` images -> (B, N, C)."""
        joined = words.reshape(batch, -1, words.shape[1] * words.shape[2])  # (B N, W, c) -> (B, N, W c)
        tokens: Tensor = self.norm(self.projection(self.word_norm(joined)))
        return tokens


class Tnt(PatchTokens):
    """A word embedding, inner and outer blocks in turn, and a head on the class token or on the mean of the patches."""

    decided_by_data = ("head",)  # not loaded from a checkpoint with other classes, even if their number is the same
    models = "the models for photographs of 224 pixels are tnt_s and tnt_b"
    undecayed = ("positions", "word_positions")  # without weight decay, since they are tables of vectors

    def __init__(
        self,
        *,
        classes: int,
        channels: int,
        image_size: tuple[int, int],
        patch_size: Side,
        word_stride: Positive,
        width: Positive,
        heads: Positive,
        layers: Layers,
        feedforward: Positive,
        inner: InnerOptions,
        pooling: Literal["token", "mean"],
        positions: PositionOptions,
        blocks: VitBlockOptions,
    ):
        """Build the classifier. The data determine `classes`, `channels` and `image_size`.

        Args:
            classes: number of classes K.
            channels: number of image channels: 1 (grey) or 3 (RGB).
            image_size: (H, W) in pixels; one position is learned for each patch of an image of this size.
            patch_size: side of a patch in pixels.
            word_stride: distance of neighbouring words in pixels; a patch has ceil(patch_size / word_stride)^2 words.
            width: C, the width of a patch's token.
            heads: number of heads of each attention of the outer Transformer.
            layers: number of blocks of each of the two Transformers.
            feedforward: hidden width of each feed-forward network of the outer Transformer.
            inner: see InnerOptions.
            pooling: the head's input: "token" is the class token; "mean" is the mean over the patches after the final
                norm, without a class token.
            positions: of the patches; see PositionOptions. The positions of words are the same in all patches.
            blocks: of both Transformers; see VitBlockOptions.

        Raises UserError when `width` is not divisible by `heads`, or `image_size` not by `patch_size`.
        """
        super().__init__()
        for name, divided, by in (("", width, heads), ("inner.", inner.width, inner.heads)):
            if divided % by:
                raise UserError(f"model.{name}width={divided} must be divisible by model.{name}heads={by}.")
        self.pooling, self.depth = pooling, layers
        self.patches = Words(channels=channels, size=patch_size, stride=word_stride, width=inner.width)
        words = self.patches.side**2
        self.word_positions = nn.Parameter(torch.empty(words, inner.width))
        shape = {"words": words, "word_width": inner.width, "width": width}
        self.embedding = WordsToToken(**shape, bias=True, norm_eps=blocks.norm_eps)
        self.class_token = nn.Parameter(torch.empty(width)) if pooling == "token" else None
        on_token = positions.on_token and pooling == "token"
        grid = self.patches.grid(*image_size)
        self.positions = LearnedGrid(width, grid, on_token=on_token, resampling=positions.resample)
        self.dropout = Dropout(blocks.dropout)
        inner_options = blocks.of_size(inner.width, inner.heads, inner.feedforward, qkv_bias=False)
        self.inner = Stack(inner_options, layers=layers, final_norm=False)
        self.updates = nn.ModuleList(WordsToToken(**shape, bias=False, norm_eps=blocks.norm_eps) for _ in range(layers))
        outer_options = blocks.of_size(width, heads, feedforward, qkv_bias=False)
        self.encoder = Stack(outer_options, layers=layers, final_norm=True)
        self.head = Linear(width, classes)
        self._initialise()

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, channels, H, W), with H and W multiples of the patch size -> logits (B, K)."""
        x = self.features(images)
        with full_precision(images.device):  # in bf16 (8 significant bits), the two highest logits are often equal
            logits: Tensor = self.head(x.to(images.dtype))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """Compute the encoder's pooled output: images (B, channels, H, W) -> (B, C)."""
        words, x = self.embed(images)  # (B N, W, c), (B, 1 + N, C)
        for inner, to_token, outer in zip(self.inner.blocks, self.updates, self.encoder.blocks, strict=True):
            words = inner(words)
            update = to_token(words, images.shape[0])  # (B, N, C)
            x = outer(x + F.pad(update, (0, 0, self.before_patches, 0)))  # the class token gets no update
        x = self.encoder.norm(x)
        pooled: Tensor = x[:, 0] if self.pooling == "token" else x.mean(dim=1)  # (B, 1 + N, C) -> (B, C)
        return pooled

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embed images (B, channels, H, W) -> words (B N, W, c), and tokens (B, N, C) after the class token, if any."""
        grid = self.patches.grid(images.shape[-2], images.shape[-1])
        words: Tensor = self.patches(images) + self.word_positions
        x = self.embedding(words, images.shape[0]) + self.positions(grid)
        if self.class_token is not None:
            token = self.class_token if self.positions.token is None else self.class_token + self.positions.token
            x = torch.cat([token.expand(images.shape[0], 1, -1), x], dim=1)  # (B, N, C) -> (B, 1 + N, C)
        return words, self.dropout(x)

    @property
    def before_patches(self) -> int:
        """The number of tokens that precede the patches: 1 with a class token, otherwise 0."""
        return int(self.class_token is not None)

    @property
    def words(self) -> tuple[int, int]:
        """The numbers of rows and columns of words in a patch."""
        return self.patches.side, self.patches.side

    def input_summary(self) -> list[str]:
        """Return a line for the start summary with the numbers of tokens and words of an image."""
        side = self.patches.side
        return [f"{line} with {side} x {side} words each" for line in super().input_summary()]

    def layers(self) -> list[tuple[str, ...]]:
        """List the name prefixes of each layer's parameters, from input to output, for layer-wise learning rates.

        The embeddings are the first layer; an inner and an outer block are one layer; the final norm and the head are
        the last layer.
        """
        stem = ("patches", "word_positions", "embedding", "class_token", "positions")
        blocks = [(f"inner.blocks.{i}", f"updates.{i}", f"encoder.blocks.{i}") for i in range(self.depth)]
        return [stem, *blocks, ("encoder.norm", "head")]

    def _initialise(self) -> None:
        """Initialise parameters as the authors' code does; convolutions keep PyTorch's initial values."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for table in (self.class_token, self.word_positions, self.positions.grid, self.positions.token):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)
