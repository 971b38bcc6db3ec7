"""The backbone of LSTR: a ResNet with few channels, trained from scratch with norms that follow the data.

Liu et al. 2021, "End-to-end Lane Shape Prediction with Transformers", arXiv 2011.04233, section 3.2. The stem's norm is
frozen, as in the official code.

Differs: Padding is set to zero before every convolution with a kernel larger than 1x1, so in evaluation an image's
features do not depend on how much it is padded. With `norm="group"`, they do not in training either.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.nn.convolution import FrozenBatchNorm, conv_norm_relu, convolution, mask_padding
from common.nn.norms import MaskedGroupNorm
from common.nn.resnet import FeatureMap, real_positions
from common.types import Positive

MAX_GROUPS = 8  # of the group norms


@dataclass(frozen=True, kw_only=True)
class SlimOptions:
    """The shape of the backbone.

    blocks: number of basic blocks of each stage; each stage but the first halves the resolution.
    channels: number of channels of each stage; the stem has those of the first.
    stem: "large" is a 7x7 convolution and max-pooling, with stride 4; "small" is a 3x3 convolution with stride 2.
    norm: "batch" is BatchNorm with the statistics of the micro-batch, as in the paper, so that a step depends on how it
        is split; "group" is GroupNorm, which depends on one image only.
    """

    blocks: list[Positive]
    channels: list[Positive]
    stem: Literal["large", "small"]
    norm: Literal["batch", "group"]

    def __post_init__(self) -> None:
        """Raise UserError if there is no stage, or if a stage lacks its number of blocks or channels."""
        if not self.blocks or len(self.blocks) != len(self.channels):
            raise UserError(
                f"model.backbone.blocks={self.blocks} and model.backbone.channels={self.channels} must have one number "
                "for each stage."
            )


class SlimBlock(nn.Module):
    """Two 3x3 convolutions, each with a norm, and a shortcut (He et al. 2015, arXiv 1512.03385, figure 5 left)."""

    def __init__(self, inputs: int, channels: int, stride: int, norm: Literal["batch", "group"]):
        super().__init__()
        self.conv1, self.bn1 = convolution(inputs, channels, 3, stride), _norm(norm, channels)
        self.conv2, self.bn2 = convolution(channels, channels, 3), _norm(norm, channels)
        self.downsample = None
        if stride > 1 or inputs != channels:
            self.downsample = nn.Sequential(convolution(inputs, channels, 1, stride), _norm(norm, channels))

    def forward(self, x: Tensor, real_in: Tensor | None, real_out: Tensor | None) -> Tensor:
        """Compute (B, C, H, W) -> (B, channels, H', W'), with sides divided by the stride and rounded up.

        `real_in` (B, 1, H, W) and `real_out` (B, 1, H', W') are False in padding; None = no padding.
        """
        y = F.relu(_apply(self.bn1, self.conv1(mask_padding(x, real_in)), real_out))
        y = _apply(self.bn2, self.conv2(mask_padding(y, real_out)), real_out)
        if self.downsample is not None:
            x = _apply(self.downsample[1], self.downsample[0](x), real_out)
        return F.relu(y + x)


def _norm(name: Literal["batch", "group"], channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if name == "batch" else MaskedGroupNorm(math.gcd(MAX_GROUPS, channels), channels)


def _apply(norm: nn.Module, x: Tensor, real: Tensor | None) -> Tensor:
    y: Tensor = norm(x, real) if isinstance(norm, MaskedGroupNorm) else norm(x)
    return y


class SlimResNet(nn.Module):
    """A slim ResNet that returns the feature map of its last stage, and a mask of the positions that are not padding.

    The names of tensors are torchvision's (conv1.weight, layer1.0.conv1.weight, ...).
    """

    def __init__(self, options: SlimOptions):
        super().__init__()
        large = options.stem == "large"
        channels = options.channels[0]
        self.conv1 = convolution(3, channels, 7 if large else 3, 2)
        self.bn1 = FrozenBatchNorm(channels)
        self.pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        self.stem_stride = 4 if large else 2
        self.stages = [f"layer{i}" for i in range(1, len(options.blocks) + 1)]
        for i, (name, blocks, outputs) in enumerate(zip(self.stages, options.blocks, options.channels, strict=True)):
            strides = [2 if i else 1, *[1] * (blocks - 1)]
            inputs = [channels, *[outputs] * (blocks - 1)]
            stage = [SlimBlock(n, outputs, s, options.norm) for n, s in zip(inputs, strides, strict=True)]
            self.add_module(name, nn.ModuleList(stage))
            channels = outputs
        self.channels = channels
        self.to(memory_format=torch.channels_last)  # the fastest memory layout for convolutions

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the feature map of images with this height and width in pixels."""
        stride = self.stem_stride * 2 ** (len(self.stages) - 1)
        return (height - 1) // stride + 1, (width - 1) // stride + 1

    def forward(self, images: Tensor, sizes: Tensor | None) -> list[FeatureMap]:
        """Compute the feature map of images (B, 3, H, W), as a list of one map.

        `sizes` (B, 2) are the images' heights and widths without padding; None = no padding, and `real` is then None.
        """
        shape = images.shape[-2:]

        def real(stride: int) -> Tensor | None:
            return None if sizes is None else real_positions(shape, sizes, stride)[:, None]

        images = images.contiguous(memory_format=torch.channels_last)
        x = self.pool(conv_norm_relu(self.conv1, self.bn1, images, real=real(2)))
        stride = self.stem_stride
        for i, name in enumerate(self.stages):
            before, stride = stride, stride * 2 if i else stride
            for block in getattr(self, name):
                x = block(x, real(before), real(stride))
                before = stride
        return [FeatureMap(x, None if sizes is None else real_positions(shape, sizes, stride), stride)]
