"""ViT: a Transformer encoder over the patches of an image, and a linear head on the encoder's pooled output.

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", arXiv 2010.11929, section 3.1 and figure 1. The distillation
token is from Touvron et al. 2021 (DeiT), arXiv 2012.12877, section 4.
"""

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
from common.nn.linear import Linear
from common.nn.patches import Form, Patches, lecun_normal_
from common.nn.positions import LearnedGrid, Resampling
from common.types import Count, Fraction, Layers, Positive, PositiveFloat, Side
from vit.models.patch_tokens import PatchTokens

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),  # used in the authors' JAX code and Google's published models
}


@dataclass(frozen=True, kw_only=True)
class PositionOptions:
    """Options of the learned position embeddings.

    resample: how the positions are resampled to another grid of patches; see `Resampling` in common/nn/positions.py.
    on_token: whether the class token has a position embedding, too (it has none in DeiT III).
    """

    resample: Resampling
    on_token: bool


@dataclass(frozen=True, kw_only=True)
class VitBlockOptions:
    """Options of the encoder's blocks whose values vary between published ViTs; see common.nn.blocks.BlockOptions."""

    dropout: Fraction
    attention_dropout: Fraction
    drop_path: Fraction  # rate in the last block; rates increase linearly from 0 in the first block
    layer_scale: PositiveFloat | None  # initial value; None = no layer scale
    qk_norm: bool
    norm_eps: PositiveFloat
    activation: Literal["gelu", "gelu_tanh"]

    def of_size(self, width: int, heads: int, feedforward: int, qkv_bias: bool | None = None) -> BlockOptions:
        """Return the options of pre-norm blocks of this size."""
        return BlockOptions(
            width=width,
            heads=heads,
            feedforward=feedforward,
            pre_norm=True,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            hidden_dropout=self.dropout,
            activation=ACTIVATIONS[self.activation],
            norm_eps=self.norm_eps,
            qkv_bias=qkv_bias,
            qk_norm=self.qk_norm,
            layer_scale=self.layer_scale,
            drop_path=self.drop_path,
        )


class Classifier(PatchTokens):
    """A patch embedding, a pre-norm encoder, and a head on the class token or on the mean of the patches.

    Differs: GELU is exact unless `blocks.activation` is "gelu_tanh", the approximation in the authors' code. Initial
    values follow the authors' code, since the paper does not give them.
    """

    # Not loaded from a checkpoint with other classes, even if their number is the same.
    decided_by_data = ("head", "distillation_head")
    models = (
        "the models for photographs are vit_photo (64 to 128 pixels), vit_ti16, vit_s16, vit_b16 and larger (224 "
        "pixels), and model=vit is made for images of 8 x 8 pixels"
    )
    undecayed = ("positions", "registers")  # without weight decay, since they are tables of vectors, not linear maps

    def __init__(
        self,
        *,
        classes: int,
        channels: int,
        image_size: tuple[int, int],
        patch_size: Side,
        embedding: Form,
        width: Positive,
        heads: Positive,
        layers: Layers,
        feedforward: Positive,
        pooling: Literal["token", "mean", "mean_then_norm"],
        registers: Count,
        positions: PositionOptions,
        representation: Positive | None,
        blocks: VitBlockOptions,
        distillation_token: bool = False,  # users' subclasses and their yaml may be older than this key
    ):
        """Build the classifier. The data determine `classes`, `channels` and `image_size`.

        Args:
            classes: number of classes K.
            channels: number of image channels: 1 (grey) or 3 (RGB).
            image_size: (H, W) in pixels; one position is learned for each patch of an image of this size.
            patch_size: side of a patch in pixels.
            embedding: how a patch is projected to a token: "convolution" or "multiply"; see common/nn/patches.py.
            width: C, the width of a token.
            heads: number of heads of each attention.
            layers: number of encoder blocks.
            feedforward: hidden width of each feed-forward network (in the paper, "MLP size").
            pooling: the head's input: "token" is the class token; "mean" is the mean over the patches after the
                encoder's final norm; "mean_then_norm" is the mean over the patches, to which a LayerNorm is then
                applied instead of a final norm.
            registers: number of extra tokens without a position (Darcet et al. 2024, arXiv 2309.16588); 0 = none.
            positions: see PositionOptions.
            representation: width of the hidden layer with tanh that the paper's head has in pre-training (section 3.1);
                None = no such layer.
            blocks: see VitBlockOptions.
            distillation_token: whether there is a second token beside the class token, with a position and a linear
                head of its own, which learns from a teacher (DeiT, section 4).

        Raises UserError when `width` is not divisible by `heads`, or `image_size` not by `patch_size`, and for a
        distillation token without a class token.
        """
        super().__init__()
        if width % heads:
            raise UserError(f"model.width={width} must be divisible by model.heads={heads}.")
        if distillation_token and pooling != "token":
            raise UserError(
                f"model.distillation_token=true needs a class token, and model.pooling={pooling} has none; give "
                "model.pooling=token."
            )
        self.pooling, self.depth = pooling, layers
        self.patches = Patches(channels=channels, size=patch_size, width=width, form=embedding)
        self.class_token = nn.Parameter(torch.zeros(width)) if pooling == "token" else None
        self.registers = nn.Parameter(torch.empty(registers, width)) if registers else None
        self.distillation_token = nn.Parameter(torch.empty(width)) if distillation_token else None
        on_token = positions.on_token and pooling == "token"
        self.distillation_position = nn.Parameter(torch.empty(width)) if on_token and distillation_token else None
        grid = self.patches.grid(*image_size)
        self.positions = LearnedGrid(width, grid, on_token=on_token, resampling=positions.resample)
        self.dropout = Dropout(blocks.dropout)
        options = blocks.of_size(width, heads, feedforward)
        self.encoder = Stack(options, layers=layers, final_norm=pooling != "mean_then_norm")
        self.pooled_norm = nn.LayerNorm(width, eps=blocks.norm_eps) if pooling == "mean_then_norm" else nn.Identity()
        self.representation = Linear(width, representation) if representation else None
        self.head = Linear(representation or width, classes)
        self.distillation_head = Linear(width, classes) if distillation_token else None
        self._initialise()

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Normalised images (B, channels, H, W), with H and W multiples of the patch size -> logits (B, K).

        With a distillation token, the result in training is the logits of both heads, (B, K) each: first those of the
        class token, then those of the distillation token. In evaluation, it is their mean.
        """
        tokens: Tensor = self.encoder(self.embed(images))  # (B, N, C)
        x = self._pool(tokens)
        if self.representation is not None:
            x = self.representation(x).tanh()
        # The head is computed in full precision: in bf16 (8 significant bits), the two highest logits are often equal.
        with full_precision(images.device):
            logits: Tensor = self.head(x.to(images.dtype))
            if self.distillation_head is None:
                return logits
            distilled: Tensor = self.distillation_head(tokens[:, 1].to(images.dtype))
        return (logits, distilled) if self.training else (logits + distilled) / 2

    def features(self, images: Tensor) -> Tensor:
        """Compute the encoder's pooled output: images (B, channels, H, W) -> (B, C)."""
        return self._pool(self.encoder(self.embed(images)))

    def _pool(self, x: Tensor) -> Tensor:
        x = x[:, 0] if self.pooling == "token" else x[:, self.before_patches :].mean(dim=1)  # (B, N, C) -> (B, C)
        x = self.pooled_norm(x)
        return x

    def embed(self, images: Tensor) -> Tensor:
        """Embed images (B, channels, H, W) -> tokens (B, N, C).

        The patches come last. Before them are, if the model has them, the class token, the distillation token and the
        registers.
        """
        grid = self.patches.grid(images.shape[-2], images.shape[-1])
        tokens = [self.patches(images) + self.positions(grid)]
        if self.registers is not None:
            tokens.insert(0, self.registers.expand(images.shape[0], -1, -1))
        own = (self.distillation_token, self.distillation_position), (self.class_token, self.positions.token)
        for token, position in own:
            if token is not None:
                placed = token if position is None else token + position
                tokens.insert(0, placed.expand(images.shape[0], 1, -1))
        x: Tensor = self.dropout(torch.cat(tokens, dim=1) if len(tokens) > 1 else tokens[0])
        return x

    @property
    def before_patches(self) -> int:
        """The number of tokens that precede the patches: class token, distillation token and registers, if any."""
        tokens = sum(token is not None for token in (self.class_token, self.distillation_token))
        return tokens + (0 if self.registers is None else len(self.registers))

    def layers(self) -> list[tuple[str, ...]]:
        """List the name prefixes of each layer's parameters, from input to output, for layer-wise learning rates.

        As in BEiT (Bao et al. 2022, arXiv 2106.08254, appendix), the embeddings are the first layer. The last norm and
        the head are the last layer.
        """
        stem = ("patches", "class_token", "distillation_token", "distillation_position", "registers", "positions")
        blocks = [(f"encoder.blocks.{i}",) for i in range(self.depth)]
        return [stem, *blocks, ("encoder.norm", "pooled_norm", "representation", "head", "distillation_head")]

    def _initialise(self) -> None:
        """Initialise parameters as the authors' code does (google-research/vision_transformer)."""
        tables = (self.positions.grid, self.positions.token, self.registers)
        for table in (*tables, self.distillation_token, self.distillation_position):
            if table is not None:
                nn.init.normal_(table, std=0.02)
        for name, parameter in self.encoder.named_parameters():
            if name.endswith("in_proj.weight"):
                for matrix in parameter.chunk(3):  # q, k and v separately: Xavier's bound depends on the shape
                    nn.init.xavier_uniform_(matrix)
            elif "feed_forward" in name and name.endswith("bias"):
                nn.init.normal_(parameter, std=1e-6)
            elif parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if self.representation is not None:
            lecun_normal_(self.representation.weight)
            nn.init.zeros_(self.representation.bias)
        for head in (self.head, self.distillation_head):
            if head is not None:
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)
