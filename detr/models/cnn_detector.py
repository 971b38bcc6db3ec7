"""The base class of CNN detectors: torchvision's models behind this program's batches, trainer and precisions.

The networks, losses, samplers and non-maximum suppression are torchvision's, unchanged. This file converts batches to
lists of images without padding, and converts labels. It also differs from torchvision's own use of the models:

- Images are not resized (except by SSD), because the data have resized them.
- Images of a batch are padded to a common size only if they have nearly the same size, so an image's detections do not
  depend on the other images. `official_padding` restores torchvision's behaviour.
- Under autocast, feature maps, the last layer of each head, box decoding, NMS and losses are computed in fp32. In bf16,
  with its 8 significant bits, torchvision's anchors and boxes would be wrong by pixels.
"""

import math
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from common.machine.device import full_precision
from common.types import Fraction, Positive
from common.weights.backbones import WeightsOptions, load_weights

# For each image: boxes (n, 4) xyxy in pixels, labels (n,) class indices and, for masks, uint8 masks (n, h, w).
Targets = list[dict[str, Tensor]]
SIZE_DIVISOR = 32  # torchvision pads each side of an image to a multiple of this number of pixels


@dataclass(frozen=True, kw_only=True)
class DetectionOptions:
    """Which detections of an image are kept.

    threshold: the score that a detection must exceed.
    nms: if two detections of a class have an IoU above `nms`, the one with the lower score is dropped.
    limit: maximum number of detections in an image.
    """

    threshold: Fraction
    nms: Fraction
    limit: Positive


class CnnDetector(nn.Module, ABC):
    """A detector of torchvision, `net`, as a model of the task `CnnDetection`.

    A subclass builds `net`, and names the tensors that belong to classes in `decided_by_data`. Tensors have
    torchvision's names with the prefix "net.".
    """

    # Each rank would gather the parts of the backbone as often as it has groups of images.
    unshardable = "torchvision's detectors run a different number of times on each process"
    background: ClassVar[int]  # 1 if index 0 of the class scores is the background, otherwise 0
    decided_by_data: Sequence[str]
    # What depends on the micro-batch in the losses of torchvision.
    depends_on_micro_batch: ClassVar[tuple[str, ...]] = ()

    def __init__(self, net: nn.Module, *, official_padding: bool, last_layers: Sequence[nn.Module]):
        """Wrap `net`; `last_layers` are the layers whose outputs are class scores and boxes."""
        super().__init__()
        self.net, self.official_padding = net, official_padding
        self.backbone_options: WeightsOptions | None = None
        _part(net, "backbone").register_forward_hook(_upcast_outputs)
        for layer in last_layers:
            compute_in_full_precision(layer)
        self.to(memory_format=torch.channels_last)  # the fastest memory layout for convolutions

    @property
    def per_micro_batch(self) -> tuple[str, ...]:
        """What makes a training step depend on how it is split into micro-batches."""
        return (*self.depends_on_micro_batch, *(("padding",) if self.official_padding else ()))

    def forward(self, images: Tensor, sizes: Tensor | None, targets: Targets | None = None) -> dict[str, Any]:
        """Compute losses in training mode, and detections in evaluation mode.

        Args:
            images: normalised (B, 3, H, W), padded at the bottom and right.
            sizes: (B, 2) heights and widths without padding; None = no padding.
            targets: the objects of each image, in training mode. Sides of boxes must be positive.

        Returns:
            {"losses": scalars by torchvision's names, means over the images} in training mode, and otherwise
            {"detections": a dict for each image: boxes (n, 4) xyxy in pixels of the image in the batch, scores (n,),
            labels (n,) class indices and, of a detector with masks, masks (n, 1, h, w) as probabilities}, sorted by
            descending score.
        """
        unpadded = list(images)
        if sizes is not None:
            pairs = zip(unpadded, sizes.tolist(), strict=True)
            unpadded = [image[:, :height, :width] for image, (height, width) in pairs]
        if self.training:
            assert targets is not None, "training needs targets"
            return {"losses": self._losses(unpadded, targets)}
        detections: list[dict[str, Tensor]] = [{}] * len(unpadded)
        for group in self._groups(unpadded):
            for i, answer in zip(group, self.net([unpadded[i] for i in group]), strict=True):
                detections[i] = {**answer, "labels": answer["labels"] - self.background}
        return {"detections": detections}

    def _losses(self, images: list[Tensor], targets: Targets) -> dict[str, Tensor]:
        """Return torchvision's losses, averaged over groups of images with weights by the number of images."""
        means: dict[str, Tensor] = {}
        for group in self._groups(images):
            own = [{**targets[i], "labels": targets[i]["labels"] + self.background} for i in group]
            for name, loss in self.net([images[i] for i in group], own).items():
                share = loss.float() * (len(group) / len(images))
                means[name] = means[name] + share if name in means else share
        return means

    def _groups(self, images: list[Tensor]) -> list[list[int]]:
        """Return the indices of images that are computed together: those that torchvision pads to the same size.

        With `official_padding`, all images are computed together.
        """
        if self.official_padding:
            return [list(range(len(images)))]
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(images):
            padded = tuple(math.ceil(side / SIZE_DIVISOR) for side in image.shape[1:])
            groups.setdefault(padded, []).append(i)
        return list(groups.values())

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the backbone alone; the rest depends on the data (matches, samples, NMS), which cannot be traced."""
        _part(self.net, "backbone").compile(*args, **kwargs)

    def fetch_weights(self) -> str | None:
        """Load the backbone's weights that `model.backbone.weights` names; returns lines for the log.

        Returns None, and loads nothing, if `model.backbone.weights` is "none". This method is called only for a new run
        that does not start from a checkpoint.
        """
        options = self.backbone_options
        if options is None or options.weights == "none":
            return None
        warnings = load_weights(self.pretrained_part(), options)
        line = f"weights   initialised at random, except the backbone: {options.weights}"
        return "\n".join([line, *(f"warning   {warning}" for warning in warnings)])

    def pretrained_part(self) -> nn.Module:
        """The part of the network that `model.backbone.weights` initialises."""
        return _part(_part(self.net, "backbone"), "body")


class Unresized(GeneralizedRCNNTransform):  # type: ignore[misc]
    """torchvision's conversion of a list of images to a batch, without resizing, for images that are normalised."""

    def __init__(self) -> None:
        super().__init__(1, 1, [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], SIZE_DIVISOR)  # the first two numbers are not used

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        """Return the image and its target unchanged."""
        return image, target


class _FullPrecisionConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x.device):
            return super().forward(x.float())


class _FullPrecisionLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x.device):
            return super().forward(x.float())


def compute_in_full_precision(layer: nn.Module) -> None:
    """Make a convolution or linear map compute in fp32, also under autocast."""
    # Exchanging the class keeps the layer's tensors and names, and the layer can still be copied.
    layer.__class__ = {nn.Conv2d: _FullPrecisionConv2d, nn.Linear: _FullPrecisionLinear}[type(layer)]


def _upcast_outputs(module: nn.Module, inputs: Any, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert feature maps to fp32: torchvision computes anchors in their type."""
    return {name: value.float() for name, value in outputs.items()}


def _part(module: nn.Module, name: str) -> nn.Module:
    part = getattr(module, name)
    assert isinstance(part, nn.Module)
    return part
