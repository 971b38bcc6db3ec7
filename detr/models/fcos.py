"""FCOS: every position of the feature maps predicts a class, its distances to the sides of a box, and its centerness.

Tian et al. 2019, "FCOS: Fully Convolutional One-Stage Object Detection", arXiv 1904.01355. The network is
torchvision's; see cnn_detector.py. It has no anchors: torchvision's square "anchors" are the strides of the maps.
"""

from torchvision.models.detection import fcos
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from common.errors import UserError
from common.types import Layers, Positive
from detr.models.cnn_detector import CnnDetector, DetectionOptions, Unresized
from detr.models.pyramid import SMALL_STRIDES, PyramidOptions, pyramid

STRIDES = (8, 16, 32, 64, 128)  # of the feature maps on a ResNet
GROUPS = 32  # of the group norms in torchvision's heads


class FCOS(CnnDetector):
    """torchvision's FCOS with a feature pyramid."""

    background = 0
    decided_by_data = ("net.head.classification_head.cls_logits",)
    depends_on_micro_batch = ("FCOS's number of positive positions, which divides its losses",)

    def __init__(
        self,
        *,
        classes: int,
        backbone: PyramidOptions,
        width: Positive,
        head_layers: Layers,
        detections: DetectionOptions,
        official_padding: bool,
    ):
        """Build the network.

        width: number of channels of the feature pyramid and of the heads, a multiple of 32.
        head_layers: number of convolutions of each head before its last layer.
        """
        if width % GROUPS:
            raise UserError(f"model.width={width} must be divisible by {GROUPS}, the groups of FCOS's group norms.")
        strides = SMALL_STRIDES if backbone.name == "small" else STRIDES
        net = fcos.FCOS(
            pyramid(backbone, width, 2, LastLevelP6P7(width, width)),
            num_classes=classes,
            anchor_generator=AnchorGenerator(tuple((stride,) for stride in strides), ((1.0,),) * len(strides)),
            head=fcos.FCOSHead(width, 1, classes, head_layers),
            score_thresh=detections.threshold,
            nms_thresh=detections.nms,
            detections_per_img=detections.limit,
        )
        net.transform = Unresized()
        regression = net.head.regression_head
        last = [net.head.classification_head.cls_logits, regression.bbox_reg, regression.bbox_ctrness]
        super().__init__(net, official_padding=official_padding, last_layers=last)
        self.backbone_options = backbone
