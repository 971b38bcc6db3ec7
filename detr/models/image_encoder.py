"""The image encoder of SAM (Kirillov et al. 2023, arXiv 2304.02643, appendix A): a ViT with windows, and a neck."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.nn.blocks import BlockOptions, Stack
from common.nn.norms import LayerNorm2d
from common.nn.patches import Patches
from common.types import Count, Fraction, Layers, Positive
from detr.models.window_attention import WindowAttention

NORM_EPS = 1e-6  # of the official code, in blocks and neck


@dataclass(frozen=True, kw_only=True)
class ViTOptions:
    """The options of the image encoder.

    Raises UserError if `global_layers` names a block that does not exist, or if `width` is not divisible by `heads`.
    """

    width: Positive
    heads: Positive
    layers: Layers
    feedforward: Positive
    window: Positive  # side of a window, in patches
    global_layers: list[Count]  # the blocks, counted from 0, whose tokens attend to the whole image
    drop_path: Fraction  # of the last block; see `Stack`

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UserError(f"model.encoder.width={self.width} must be divisible by model.encoder.heads={self.heads}.")
        if self.global_layers and max(self.global_layers) >= self.layers:
            raise UserError(
                f"model.encoder.global_layers={self.global_layers}: the encoder has the blocks 0 to {self.layers - 1} "
                "(model.encoder.layers); name only these."
            )


class ImageEncoder(nn.Module):
    """A ViT whose blocks attend within windows, with exceptions, and whose last tokens a neck maps to `width` channels.

    It takes square images of `image_size` pixels, a multiple of `patch_size`.
    """

    def __init__(self, options: ViTOptions, *, image_size: int, patch_size: int, width: int):
        super().__init__()
        self.side = image_size // patch_size
        self.depth = options.layers
        self.patches = Patches(channels=3, size=patch_size, width=options.width, form="convolution")
        self.positions = nn.Parameter(torch.zeros(1, self.side, self.side, options.width))
        nn.init.trunc_normal_(self.positions, std=0.02)
        block = BlockOptions(
            width=options.width,
            heads=options.heads,
            feedforward=options.feedforward,
            pre_norm=True,
            activation=nn.GELU,
            norm_eps=NORM_EPS,
            drop_path=options.drop_path,
        )

        def attention(layer: int) -> WindowAttention:
            window = None if layer in options.global_layers else options.window
            return WindowAttention(width=options.width, heads=options.heads, side=self.side, window=window)

        self.encoder = Stack(block, layers=options.layers, final_norm=False, attention=attention)
        self.neck = nn.Sequential(
            nn.Conv2d(options.width, width, 1, bias=False),
            LayerNorm2d(width, eps=NORM_EPS),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            LayerNorm2d(width, eps=NORM_EPS),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) of S = `image_size` pixels -> (B, width, S / patch_size, S / patch_size)."""
        x = self.patches(images) + self.positions.flatten(1, 2)  # (B, hw, C)
        x = self.encoder(x)
        maps: Tensor = self.neck(x.transpose(1, 2).unflatten(2, (self.side, self.side)))  # -> (B, C, h, w)
        return maps
