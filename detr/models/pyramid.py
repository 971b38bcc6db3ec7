"""Feature pyramids, the backbones of CNN detectors: feature maps of several strides with the same number of channels.

Lin et al. 2017, "Feature Pyramid Networks for Object Detection", arXiv 1612.03144. The pyramid itself and the ResNets
are torchvision's.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from common.errors import UserError
from common.types import Count, Fraction

SMALL_STAGES = ((3, 32, 64, 64), (64, 128, 128), (128, 128))  # channels of each stage, from its input to its output
SMALL_STRIDES = (4, 8, 16)
GROUPS = 8  # of the small pyramid's group norms


@dataclass(frozen=True, kw_only=True)
class PyramidOptions:
    """The choice of a backbone with a feature pyramid.

    name: "small" has the strides 4, 8 and 16, and suits 64-pixel images; the others are torchvision's ResNets.
    weights: "none" (initialised at random), "imagenet_v1" (ImageNet weights that torchvision publishes), or the path of
        a file with torchvision's tensor names; for the ResNet alone, not for the pyramid.
    frozen: number of parts that are not trained, counted from the input: the stem, layer1, layer2, ... of a ResNet;
        torchvision freezes 2. The stages of "small" can be frozen, too.
    norm_eps: what a ResNet's frozen batch norms add to the variance; "small" has group norms instead.
    """

    name: Literal["small", "resnet18", "resnet34", "resnet50", "resnet101"]
    weights: str
    frozen: Count
    norm_eps: Fraction


class SmallPyramid(nn.Module):
    """Six convolutions with group norms, and a pyramid on the outputs of three stages, with strides 4, 8 and 16.

    Group norms do not depend on how a step is split into micro-batches, and need no pretrained statistics.
    """

    def __init__(self, width: int):
        super().__init__()
        self.out_channels = width
        self.body = nn.ModuleList(_stage(channels, first=i == 0) for i, channels in enumerate(SMALL_STAGES))
        self.fpn = FeaturePyramidNetwork([channels[-1] for channels in SMALL_STAGES], width)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the feature maps "0", "1" and "2" (B, width, H', W') of images (B, 3, H, W), the finest first."""
        maps: dict[str, Tensor] = {}
        x = images
        for i, stage in enumerate(self.body):
            x = stage(x)
            maps[str(i)] = x
        pyramid: dict[str, Tensor] = self.fpn(maps)
        return pyramid


def _stage(channels: tuple[int, ...], first: bool) -> nn.Sequential:
    """Convolutions from each of `channels` to the next; the first has stride 2, in the first stage the second, too."""
    norm = partial(nn.GroupNorm, GROUPS)
    strides = [2, 2 if first else 1, 1]
    pairs = zip(channels, channels[1:], strides, strict=False)
    return nn.Sequential(
        *(Conv2dNormActivation(inputs, outputs, 3, stride, norm_layer=norm) for inputs, outputs, stride in pairs)
    )


def pyramid(options: PyramidOptions, width: int, first_stage: int, top: ExtraFPNBlock) -> nn.Module:
    """Build a pyramid with `width` channels on the stages of a ResNet from `first_stage` to 4, with `top` above it.

    `first_stage` and `top` do not apply to "small". Raises UserError if more parts are to be frozen than there are.
    """
    if options.name == "small":
        if options.weights != "none":
            raise UserError(
                f"model.backbone.weights={options.weights}: the backbone small has no pretrained weights; give none, "
                "or start from checkpoint=FILE."
            )
        network: nn.Module = SmallPyramid(width)
        parts: list[list[nn.Module]] = [[stage] for stage in network.body.children()]  # type: ignore[union-attr]
    else:
        norm = partial(FrozenBatchNorm2d, eps=options.norm_eps)
        body = getattr(resnet, options.name)(weights=None, norm_layer=norm)
        stages = range(first_stage, 5)
        channels = [body.inplanes // 8 * 2 ** (stage - 1) for stage in stages]
        names = {f"layer{stage}": str(i) for i, stage in enumerate(stages)}
        parts = [[body.conv1, body.bn1], *([getattr(body, f"layer{i}")] for i in range(1, 5))]
        network = BackboneWithFPN(body, names, channels, width, extra_blocks=top)
    if options.frozen > len(parts):
        raise UserError(f"model.backbone.frozen={options.frozen}: {options.name} has {len(parts)} parts.")
    for module in [module for part in parts[: options.frozen] for module in part]:
        module.requires_grad_(False)
    return network
