"""The blocks of a ResNet (He et al. 2015, arXiv 1512.03385), and a ResNet as the backbone of DETR.

An image's features do not depend on how much the image is padded in its batch.

Tensors have torchvision's names (conv1.weight, bn1.weight, layer1.0.conv1.weight, ...). `common.weights.backbones`
loads files of torchvision and of official DETR (facebookresearch/detr), which adds a prefix to these names.

Differs: In official DETR, a convolution near an image's border also reads values that earlier layers computed in the
padding. Detections then depend on the amount of padding, and therefore on the other images of the batch. This file
sets the padding to zero before every convolution with a kernel larger than 1x1. `official_padding` restores the
behaviour of official DETR.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.nn.convolution import (
    FrozenBatchNorm,
    FusedConvolution,
    conv_norm,
    conv_norm_relu,
    convolution,
    mask_padding,
)
from common.types import Count

MakeNorm = Callable[[int], nn.Module]  # makes a norm for a number of channels
ARCHITECTURES = {  # name: (kind of block, blocks in each stage, channels of each stage before expansion)
    "small": ("basic", (1, 1), (64, 128)),
    "resnet18": ("basic", (2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet34": ("basic", (3, 4, 6, 3), (64, 128, 256, 512)),
    "resnet50": ("bottleneck", (3, 4, 6, 3), (64, 128, 256, 512)),
    "resnet101": ("bottleneck", (3, 4, 23, 3), (64, 128, 256, 512)),
}


@dataclass(frozen=True, kw_only=True)
class BackboneOptions:
    """The choice of a ResNet, the source of its weights, and the parts that are not trained.

    name: "small" has stride 8 and suits 64-pixel images; the others are torchvision's ResNets and have stride 32.
    weights: "none" (initialised at random), "imagenet_v1" (ImageNet weights that torchvision publishes), or the path of
        a file with the tensor names of torchvision, of official DETR or of this program's detectors.
    dilation: whether the last stage has stride 1 and dilated convolutions instead of stride 2 (DETR-DC5).
    frozen: number of parts that are not trained, counted from the input: the stem, layer1, layer2, ... DETR freezes 2.
    """

    name: Literal["small", "resnet18", "resnet34", "resnet50", "resnet101"]
    weights: str
    dilation: bool
    frozen: Count


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al., figure 5 left); `norm` makes a norm for a number of channels."""

    expansion = 1

    def __init__(self, inputs: int, channels: int, stride: int, dilation: int, norm: MakeNorm = FrozenBatchNorm):
        super().__init__()
        self.conv1, self.bn1 = convolution(inputs, channels, 3, stride, dilation), norm(channels)
        self.conv2, self.bn2 = convolution(channels, channels, 3), norm(channels)
        self.downsample = _shortcut(inputs, channels, stride, norm)

    def forward(self, x: Tensor, real_in: Tensor | None, real_out: Tensor | None) -> Tensor:
        """Compute (B, C, H, W) -> (B, channels, H', W'), with H' = ceil(H / stride) and W' = ceil(W / stride).

        `real_in` (B, 1, H, W) and `real_out` (B, 1, H', W') are boolean masks, False in padding. `real_in` sets the
        padding to zero in the input of the first convolution, and `real_out` in that of the second. A mask that is None
        sets nothing to zero.
        """
        y = conv_norm_relu(self.conv1, self.bn1, mask_padding(x, real_in), real=real_out)
        return conv_norm_relu(self.conv2, self.bn2, y, shortcut=_apply_shortcut(self.downsample, x))


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution with a shortcut (He et al., figure 5 right).

    The 3x3 convolution has the stride, as in torchvision. `norm` makes a norm for a number of channels.
    """

    expansion = 4

    def __init__(self, inputs: int, channels: int, stride: int, dilation: int, norm: MakeNorm = FrozenBatchNorm):
        super().__init__()
        outputs = channels * self.expansion
        self.conv1, self.bn1 = convolution(inputs, channels, 1), norm(channels)
        self.conv2, self.bn2 = convolution(channels, channels, 3, stride, dilation), norm(channels)
        self.conv3, self.bn3 = convolution(channels, outputs, 1), norm(outputs)
        self.downsample = _shortcut(inputs, outputs, stride, norm)

    def forward(self, x: Tensor, real_in: Tensor | None, real_out: Tensor | None) -> Tensor:
        """Compute (B, C, H, W) -> (B, 4 * channels, ceil(H / stride), ceil(W / stride)).

        `real_in` (B, 1, H, W) is a boolean mask, False in padding. It sets the padding to zero in the input of the 3x3
        convolution; None sets nothing to zero. `real_out` is unused, because a 1x1 convolution does not mix positions.
        """
        y = conv_norm_relu(self.conv1, self.bn1, x, real=real_in)
        y = conv_norm_relu(self.conv2, self.bn2, y)
        return conv_norm_relu(self.conv3, self.bn3, y, shortcut=_apply_shortcut(self.downsample, x))


def make_stage(
    block: type[BasicBlock | Bottleneck],
    inputs: int,
    channels: int,
    count: int,
    *,
    stride: int,
    dilation: int = 1,
    norm: MakeNorm = FrozenBatchNorm,
) -> nn.ModuleList:
    """Make the `count` blocks of a stage, of which the first has `stride` and the others have `dilation`.

    As in torchvision, the first block of a dilated stage is not dilated.
    """
    first = block(inputs, channels, stride, 1, norm)
    outputs = channels * block.expansion
    return nn.ModuleList([first, *(block(outputs, channels, 1, dilation, norm) for _ in range(count - 1))])


def _shortcut(inputs: int, outputs: int, stride: int, norm: MakeNorm) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(convolution(inputs, outputs, 1, stride), norm(outputs))


def _apply_shortcut(downsample: nn.Sequential | None, x: Tensor) -> Tensor:
    if downsample is None:
        return x
    conv, norm = downsample
    assert isinstance(conv, nn.Conv2d | FusedConvolution)
    return conv_norm(conv, norm, x)


class FeatureMap(NamedTuple):
    """The output of a stage of a backbone."""

    features: Tensor  # (B, C, H, W)
    real: Tensor | None  # (B, H, W), False in padding; None if no image is padded
    stride: int  # side of an image divided by the side of the map


class Backbone(nn.Module):
    """A ResNet that returns the feature map of its last stage, and a mask of the positions that are not padding.

    With `official_padding`, the padding is not set to zero before convolutions, as in official DETR. Raises UserError
    for `dilation` with basic blocks ("small", "resnet18" and "resnet34").
    """

    def __init__(self, options: BackboneOptions, *, official_padding: bool):
        super().__init__()
        block_name, block_counts, channels = ARCHITECTURES[options.name]
        block = BasicBlock if block_name == "basic" else Bottleneck
        if options.dilation and block is BasicBlock:
            raise UserError(f"model.backbone.dilation=true needs resnet50 or resnet101, not {options.name}.")
        self.official_padding = official_padding
        self.options = options
        small = options.name == "small"
        self.conv1 = convolution(3, channels[0], 3, 2) if small else convolution(3, 64, 7, 2)
        self.bn1 = FrozenBatchNorm(channels[0])
        self.pool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self.stages: list[tuple[str, int, int]] = []  # (name, stride before the stage, stride after it)
        inputs, stride = channels[0], 2 if small else 4
        for i, block_count in enumerate(block_counts):
            dilate = options.dilation and i == len(block_counts) - 1
            step = 1 if dilate or (i == 0 and not small) else 2
            dilation = 2 if dilate else 1
            stage = make_stage(block, inputs, channels[i], block_count, stride=step, dilation=dilation)
            self.add_module(f"layer{i + 1}", stage)
            inputs = channels[i] * block.expansion
            self.stages.append((f"layer{i + 1}", stride, stride * step))
            stride *= step
        self.channels = inputs
        parts = [nn.ModuleList([self.conv1, self.bn1]), *(getattr(self, name) for name, _, _ in self.stages)]
        for part in parts[: options.frozen]:
            part.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # the fastest memory layout for convolutions

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the feature map of images with this height and width in pixels."""
        stride = self.stages[-1][2]
        return (height - 1) // stride + 1, (width - 1) // stride + 1

    def forward(self, images: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Compute the features (B, C, H', W') of images (B, 3, H, W), and the mask `real` (B, H', W').

        The images must be normalised, and zero in the padding. `sizes` (B, 2) are their heights and widths in pixels,
        without padding. `real` is boolean, False in padding. If no image is padded, `sizes` may be None; `real` is then
        None. H' = ceil(H / 32), or ceil(H / 16) with dilation, or ceil(H / 8) for the ResNet "small"; likewise for W'.
        When no gradients are computed, a block may overwrite its input, so a hook that stores an input must copy it.
        """
        last = self.stage_maps(images, sizes)[-1]
        return last.features, last.real

    def stage_maps(self, images: Tensor, sizes: Tensor | None) -> list[FeatureMap]:
        """Compute the map of each stage, the highest resolution first; the arguments are those of `forward`."""
        maps = []
        shape = images.shape[-2:]
        real: dict[int, Tensor | None] = dict.fromkeys((2, 4, 8, 16, 32))
        if sizes is not None and not self.official_padding:
            real = {s: real_positions(shape, sizes, s)[:, None] for s in real}
        images = images.contiguous(memory_format=torch.channels_last)
        x = self.pool(conv_norm_relu(self.conv1, self.bn1, images, real=real[2]))
        for name, before, after in self.stages:
            for block in getattr(self, name):
                x = block(x, real[before], real[after])
                before = after
            # Later stages do not overwrite x, because the shortcut of their first block is a convolution.
            maps.append(FeatureMap(x, self.real_positions(x.shape[-2:], shape, sizes, after), after))
        return maps

    def real_positions(
        self, map_shape: Sequence[int], shape: Sequence[int], sizes: Tensor | None, stride: int
    ) -> Tensor | None:
        """Return the mask (B, H', W') of the positions that are not padding in a map of `map_shape` (H', W').

        `shape` is the padded (H, W) of the images, and `sizes` as in `forward`. With `official_padding`, the mask of
        the pixels is resampled by nearest neighbour, which may differ by a row or a column.
        """
        if sizes is None or not self.official_padding:
            return None if sizes is None else real_positions(shape, sizes, stride)
        real_pixels = real_positions(shape, sizes, 1)[:, None].float()
        return F.interpolate(real_pixels, size=tuple(map_shape))[:, 0].bool()


class PyramidBackbone(Backbone):
    """A ResNet whose `forward` returns the maps of its last `count` stages; None = of all stages.

    Raises ValueError if the ResNet has fewer stages.
    """

    def __init__(self, options: BackboneOptions, *, official_padding: bool, count: int | None):
        super().__init__(options, official_padding=official_padding)
        count = len(self.stages) if count is None else count
        if count > len(self.stages):
            raise ValueError(f"{options.name} has {len(self.stages)} stages, so it has no {count} maps")
        self.count = count
        blocks = [getattr(self, name)[-1] for name, _, _ in self.stages[-count:]]
        self.map_channels = [(block.conv3 if isinstance(block, Bottleneck) else block.conv2).out_channels
                             for block in blocks]  # fmt: skip

    def forward(self, images: Tensor, sizes: Tensor | None) -> list[FeatureMap]:  # type: ignore[override]
        """Compute the maps of the last `count` stages, the highest resolution first; see `Backbone.forward`."""
        return self.stage_maps(images, sizes)[-self.count :]


def real_positions(shape: Sequence[int], sizes: Tensor, stride: int) -> Tensor:
    """Return a boolean mask (B, H', W') of the positions that are not padding in a feature map with stride `stride`.

    `shape` is the padded (H, W) of the images in pixels, and `sizes` (B, 2) are their heights and widths without
    padding. H' = ceil(H / stride), because each layer of stride 2 maps H to ceil(H / 2). The code uses the formula of a
    convolution's output size, (H - 1) // stride + 1, which gives the same number. Symbolic tracing then recognises that
    the mask and the feature map have equal sizes.
    """
    height, width = ((side - 1) // stride + 1 for side in shape)
    rows, columns = ((sizes + stride - 1) // stride).unbind(1)  # (B,) each
    inside_rows = torch.arange(height, device=sizes.device) < rows[:, None]  # (B, H')
    inside_columns = torch.arange(width, device=sizes.device) < columns[:, None]  # (B, W')
    return inside_rows[:, :, None] & inside_columns[:, None, :]
