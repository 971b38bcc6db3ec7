"""A small promptable model with a convolutional image encoder, for small images without pretrained weights."""

from torch import Tensor, nn

from common.nn.norms import LayerNorm2d
from common.types import Count, Positive, Side
from detr.models.mask_decoder import DecoderOptions
from detr.models.promptable import PromptableModel

STRIDE = 4


class ConvPromptable(PromptableModel):
    """`PromptableModel` with a convolutional encoder of stride 4; its masks have the images' resolution."""

    def __init__(
        self, *, image_size: Side, width: Positive, blocks: Count, mask_channels: Positive, decoder: DecoderOptions
    ):
        """Create the model.

        Args:
            image_size: side of the square, in pixels, to which images are padded.
            width: channels of the image embedding and of the decoder.
            blocks: residual blocks of the encoder; block i (from 0) has the dilation 2^i.
            mask_channels: channels of the last but one map that is computed from a mask in a prompt.
            decoder: options of the mask decoder.
        """
        encoder = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, stride=2, padding=1),
            LayerNorm2d(width // 2),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
            *(ResidualBlock(width, 2**i) for i in range(blocks)),
            LayerNorm2d(width),
        )
        super().__init__(
            encoder, image_size=image_size, stride=STRIDE, width=width, mask_channels=mask_channels, decoder=decoder
        )


class ResidualBlock(nn.Module):
    """x + f(x), where f is a norm, two convolutions of 3 x 3 with `dilation`, and an activation between them."""

    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.branch = nn.Sequential(
            LayerNorm2d(width),
            nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y: Tensor = self.branch(x)
        return x + y
