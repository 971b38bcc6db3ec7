"""ResNet: residual blocks of convolutions, the mean of the last map, and a linear head.

He et al. 2015, "Deep Residual Learning for Image Recognition", arXiv 1512.03385. It is the CNN beside this package's
Transformers, as a baseline and as a teacher.

With `norm="batch"`, the norms use the statistics of a micro-batch (Ioffe and Szegedy 2015, arXiv 1502.03167), as in the
paper, so a step depends on how its batch is split. With `norm="group"` (Wu and He 2018, arXiv 1803.08494), it does not.

Tensors have torchvision's names, except that the head is `head` instead of `fc`.
"""

import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.machine.device import full_precision
from common.nn.convolution import conv_norm_relu, convolution
from common.nn.linear import Linear
from common.nn.norms import MaskedGroupNorm
from common.nn.resnet import BasicBlock, Bottleneck, MakeNorm, make_stage
from common.types import Positive

MAX_GROUPS = 8  # of a group norm; Wu and He use 32, for at least 64 channels
MIN_SIDE_OF_LARGE_STEM = 64  # pixels; the last map of ResNet-18 then has 2 x 2 positions


class ResNet(nn.Module):
    """A stem, stages of residual blocks, of which each but the first halves the resolution, and a linear head."""

    decided_by_data = ("head",)  # not loaded from a checkpoint with other classes, even if their number is the same

    def __init__(
        self,
        *,
        classes: int,
        channels: int,
        image_size: tuple[int, int],
        stem: Literal["large", "small"],
        block: Literal["basic", "bottleneck"],
        blocks: list[Positive],
        widths: list[Positive],
        norm: Literal["batch", "group"],
    ):
        """Build the classifier. The data determine `classes`, `channels` and `image_size`.

        Args:
            classes: number of classes K.
            channels: number of image channels: 1 (grey) or 3 (RGB).
            image_size: (H, W) in pixels; other sizes are accepted, too.
            stem: "large" is a 7x7 convolution and max-pooling, with stride 4; "small" is a 3x3 convolution with stride
                1, for images of up to about 64 pixels (section 4.2 of the paper).
            block: "basic" has two 3x3 convolutions; "bottleneck" has a 3x3 convolution between two 1x1 convolutions,
                and four times as many output channels (figure 5 of the paper).
            blocks: number of blocks of each stage.
            widths: number of channels of each stage, before the expansion of bottlenecks; the stem has the first.
            norm: "batch" or "group".

        Raises UserError unless `blocks` and `widths` have one number for each stage, and there is a stage.
        """
        super().__init__()
        if not blocks or len(blocks) != len(widths):
            raise UserError(f"model.blocks={blocks} and model.widths={widths} must have one number for each stage.")
        self.norm, self.stem, self.image_size = norm, stem, image_size
        make_norm: MakeNorm = nn.BatchNorm2d if norm == "batch" else _group_norm
        large = stem == "large"
        self.conv1 = convolution(channels, widths[0], 7, 2) if large else convolution(channels, widths[0], 3)
        self.bn1 = make_norm(widths[0])
        self.pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        kind = BasicBlock if block == "basic" else Bottleneck
        make = partial(make_stage, kind, norm=make_norm)
        inputs = [widths[0], *(width * kind.expansion for width in widths)]
        for i, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            self.add_module(f"layer{i + 1}", make(inputs[i], width, count, stride=1 if i == 0 else 2))
        self.stage_names = [f"layer{i + 1}" for i in range(len(blocks))]
        self.stride = (4 if large else 1) * 2 ** (len(blocks) - 1)
        self.head = Linear(inputs[-1], classes)
        self.to(memory_format=torch.channels_last)  # the fastest memory layout for convolutions

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, channels, H, W) -> logits (B, K)."""
        x = self.features(images)
        with full_precision(images.device):  # in bf16 (8 significant bits), the two highest logits are often equal
            logits: Tensor = self.head(x.to(images.dtype))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """Compute the mean of the last map over its positions: images (B, channels, H, W) -> (B, C)."""
        self._refuse_single_value(images)
        images = images.contiguous(memory_format=torch.channels_last)
        x = self.pool(conv_norm_relu(self.conv1, self.bn1, images))
        for name in self.stage_names:
            for block in getattr(self, name):
                x = block(x, None, None)
        features: Tensor = x.mean((2, 3))  # (B, C, H / stride, W / stride) -> (B, C)
        return features

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the last map of images with this height and width in pixels."""
        return (height - 1) // self.stride + 1, (width - 1) // self.stride + 1

    def input_summary(self) -> list[str]:
        """Return a line for the start summary with the size of the last map."""
        rows, columns = self.grid(*self.image_size)
        return [f"the head reads the mean of {rows} x {columns} positions, with a stride of {self.stride} pixels"]

    def input_advice(self) -> list[str]:
        """Return a warning if the large stem reduces small images to a few positions; otherwise an empty list."""
        if self.stem == "small" or min(self.image_size) >= MIN_SIDE_OF_LARGE_STEM:
            return []
        height, width = self.image_size
        return [
            f"model.stem=large reduces an image of {height} x {width} pixels to a quarter of its height and width "
            "before the first block; for images this small, give model.stem=small."
        ]

    def layers(self) -> list[tuple[str, ...]]:
        """List the name prefixes of each layer's parameters, from input to output, for layer-wise learning rates.

        The stem is the first layer, each block is a layer, and the head is the last layer.
        """
        blocks = [(f"{name}.{i}",) for name in self.stage_names for i in range(len(getattr(self, name)))]
        return [("conv1", "bn1"), *blocks, ("head",)]

    def _refuse_single_value(self, images: Tensor) -> None:
        """Raise UserError if a batch norm would have a single value for each channel, whose variance is zero."""
        if not self.training or self.norm == "group":
            return
        count, _, height, width = images.shape
        if count * math.prod(self.grid(height, width)) == 1:
            raise UserError(
                f"Batch norms cannot be trained on a single image of {height} x {width} pixels, whose last map has one "
                "position; give trainer.micro_batch of 2 or more, or model.norm=group."
            )


def _group_norm(channels: int) -> MaskedGroupNorm:
    return MaskedGroupNorm(math.gcd(MAX_GROUPS, channels), channels)
