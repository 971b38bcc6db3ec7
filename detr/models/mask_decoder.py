"""The mask decoder of SAM (Kirillov et al. 2023, arXiv 2304.02643, appendix A): a two-way transformer and its heads."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.nn.attention import Attention
from common.nn.blocks import BlockOptions, FeedForward, Residual
from common.nn.linear import Linear
from common.nn.norms import LayerNorm2d
from common.types import Layers, Positive

MASKS = 4  # mask tokens: the first for unambiguous prompts, the others for ambiguous ones


@dataclass(frozen=True, kw_only=True)
class DecoderOptions:
    """The options of the mask decoder."""

    layers: Layers
    heads: Positive
    feedforward: Positive
    iou_hidden: Positive  # hidden width of the head that predicts the masks' IoU


class TwoWayBlock(nn.Module):
    """Tokens attend to each other and to the image, pass a feed-forward, and the image attends to the tokens.

    A norm follows each residual addition. The attentions between tokens and image have half the width. In the `first`
    block, self-attention has no positions and replaces the tokens, because these equal their positions.
    """

    def __init__(self, options: BlockOptions, *, first: bool):
        super().__init__()
        width, heads, self.first = options.width, options.heads, first
        self.self_attention = Attention(width=width, heads=heads)
        self.token_attention = Attention(width=width, heads=heads, inner_width=width // 2)
        self.feed_forward = FeedForward(options)
        self.image_attention = Attention(width=width, heads=heads, inner_width=width // 2)
        self.residuals = nn.ModuleList(Residual(options) for _ in range(4))

    def forward(
        self, tokens: Tensor, image: Tensor, token_positions: Tensor, image_positions: Tensor, may_look: Tensor
    ) -> tuple[Tensor, Tensor]:
        """tokens (N, T, C), image (N, hw, C) -> the same shapes.

        `token_positions` and `image_positions` are added to queries and keys, but not to values. `may_look` (N, 1, 1,
        T) is False for tokens that do not exist.
        """

        def attend_to_tokens(x: Tensor) -> Tensor:
            qk = x if self.first else x + token_positions
            y: Tensor = self.self_attention(q=qk, k=qk, v=x, may_look=may_look)
            return y

        def attend_to_image(x: Tensor) -> Tensor:
            y: Tensor = self.token_attention(q=x + token_positions, k=image + image_positions, v=image)
            return y

        def image_to_tokens(x: Tensor) -> Tensor:
            q, k = x + image_positions, tokens + token_positions
            y: Tensor = self.image_attention(q=q, k=k, v=tokens, may_look=may_look)
            return y

        first: Any = self.residuals[0]
        tokens = first.norm(attend_to_tokens(tokens)) if self.first else first(tokens, attend_to_tokens)
        tokens = self.residuals[1](tokens, attend_to_image)
        tokens = self.residuals[2](tokens, self.feed_forward)
        image = self.residuals[3](image, image_to_tokens)
        return tokens, image


class MaskDecoder(nn.Module):
    """Decodes prompts of encoded images to `MASKS` masks each, and to a prediction of each mask's IoU."""

    def __init__(self, options: DecoderOptions, *, width: int):
        super().__init__()
        block = BlockOptions(width=width, heads=options.heads, feedforward=options.feedforward, pre_norm=False)
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(MASKS, width)
        self.blocks = nn.ModuleList(TwoWayBlock(block, first=i == 0) for i in range(options.layers))
        self.final_attention = Attention(width=width, heads=options.heads, inner_width=width // 2)
        self.final_residual = Residual(block)
        self.upscaling = nn.Sequential(
            nn.ConvTranspose2d(width, width // 4, 2, stride=2),
            LayerNorm2d(width // 4, eps=1e-6),
            nn.GELU(),
            nn.ConvTranspose2d(width // 4, width // 8, 2, stride=2),
            nn.GELU(),
        )
        self.mask_heads = nn.ModuleList(_perceptron(width, width, width // 8) for _ in range(MASKS))
        self.iou_head = _perceptron(width, options.iou_hidden, MASKS)

    def forward(self, maps: Tensor, positions: Tensor, prompts: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Return the masks' logits (N, MASKS, 4h, 4w) and their predicted IoU (N, MASKS).

        Args:
            maps: (N, C, h, w) image embedding of each prompt's image, to which the prompt's mask has been added.
            positions: (hw, C) encoded positions of the maps.
            prompts: (N, P, C) encoded points.
            real: (N, P) False for points that do not exist.
        """
        count = len(prompts)
        own = torch.cat((self.iou_token.weight, self.mask_tokens.weight)).expand(count, -1, -1)  # (N, 1 + MASKS, C)
        token_positions = torch.cat((own, prompts), dim=1)  # (N, T, C)
        may_look = torch.cat((real.new_ones(own.shape[:2]), real), dim=1)[:, None, None]  # (N, 1, 1, T)
        tokens, image = token_positions, maps.flatten(2).transpose(1, 2)  # (N, C, h, w) -> (N, hw, C)
        for block in self.blocks:
            tokens, image = block(tokens, image, token_positions, positions, may_look)

        def attend_to_image(x: Tensor) -> Tensor:
            y: Tensor = self.final_attention(q=x + token_positions, k=image + positions, v=image)
            return y

        tokens = self.final_residual(tokens, attend_to_image)
        pixels = self.upscaling(image.transpose(1, 2).unflatten(2, maps.shape[2:]))  # (N, C/8, 4h, 4w)
        filters = torch.stack([head(tokens[:, 1 + i]) for i, head in enumerate(self.mask_heads)], dim=1)  # (N, 4, C/8)
        masks = (filters @ pixels.flatten(2)).unflatten(2, pixels.shape[2:])
        return masks, self.iou_head(tokens[:, 0])


def _perceptron(width: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(Linear(width, hidden), nn.ReLU(), Linear(hidden, hidden), nn.ReLU(), Linear(hidden, outputs))
