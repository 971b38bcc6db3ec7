"""SSD: default boxes on six feature maps of VGG-16 predict classes and boxes, for images resized to 300 x 300 pixels.

Liu et al. 2016, "SSD: Single Shot MultiBox Detector", arXiv 1512.02325. The network is torchvision's; see
cnn_detector.py. The aspect ratio of images is not kept.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import Tensor, nn
from torchvision.models.detection import ssd300_vgg16

from common.data.images import MEAN, STD
from common.types import Range
from detr.models.cnn_detector import CnnDetector, DetectionOptions

CAFFE_MEAN = (0.48235, 0.45882, 0.40784)  # of RGB values in [0, 1]; the weights expect values from 0 to 255 minus it


@dataclass(frozen=True, kw_only=True)
class VggOptions:
    """VGG-16 (Simonyan and Zisserman 2015, arXiv 1409.1556).

    weights: "none" (initialised at random), "imagenet_v1" (the weights that torchvision publishes for SSD), or the path
        of a file with torchvision's tensor names, for pixels from 0 to 255 minus their mean.
    frozen: number of stages that are not trained, counted from the input; torchvision freezes 1.
    """

    name: Literal["vgg16"]
    weights: str
    frozen: Annotated[int, Range(low=0, high=4)]


class SSD(CnnDetector):
    """torchvision's SSD300 with VGG-16."""

    background = 1
    decided_by_data = ("net.head.classification_head",)
    depends_on_micro_batch = ("SSD's number of matched default boxes, which divides its losses",)

    def __init__(self, *, classes: int, backbone: VggOptions, detections: DetectionOptions):
        """Build the network."""
        # The data's normalisation by MEAN and STD is undone: torchvision subtracts image_mean and divides by image_std.
        pairs = zip(CAFFE_MEAN, MEAN, STD, strict=True)
        net = ssd300_vgg16(
            weights=None,
            weights_backbone=None,
            num_classes=classes + self.background,
            image_mean=[(caffe - mean) / std for caffe, mean, std in pairs],
            image_std=[1 / (255 * std) for std in STD],
            score_thresh=detections.threshold,
            nms_thresh=detections.nms,
            detections_per_img=detections.limit,
        )
        features = list(net.backbone.features)
        ends = [i for i, layer in enumerate(features) if isinstance(layer, nn.MaxPool2d)] + [len(features)]
        for layer in features[: ends[backbone.frozen - 1] if backbone.frozen else 0]:
            layer.requires_grad_(False)
        heads = (net.head.classification_head, net.head.regression_head)
        last = [layer for head in heads for layer in head.module_list]
        super().__init__(net, official_padding=False, last_layers=last)
        self.backbone_options = backbone

    def pretrained_part(self) -> nn.Module:
        """The convolutions of VGG-16, with their names in torchvision's VGG: features.0.weight and so on."""
        backbone: Any = self.net.backbone
        *rest, _ = backbone.extra[0]  # the last are the layers that SSD adds
        return nn.ModuleDict({"features": nn.Sequential(*backbone.features, *rest)})

    def _groups(self, images: list[Tensor]) -> list[list[int]]:
        """Return one group of all images, because they are resized to the same size."""
        return [list(range(len(images)))]
