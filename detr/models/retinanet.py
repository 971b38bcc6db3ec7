"""RetinaNet: every anchor predicts its class by sigmoids, trained with the focal loss, and a box.

Lin et al. 2017, "Focal Loss for Dense Object Detection", arXiv 1708.02002. The network is torchvision's; see
cnn_detector.py. Its loss is a mean over images, so a step does not depend on how it is split into micro-batches.
"""

from functools import partial
from typing import Literal

from torch import nn
from torchvision.models.detection import retinanet
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from common.errors import UserError
from common.types import Positive
from detr.models.anchors import AnchorOptions, anchor_generator
from detr.models.cnn_detector import CnnDetector, DetectionOptions, Unresized
from detr.models.pyramid import SMALL_STRIDES, PyramidOptions, pyramid

GROUPS = 32  # of the group norms, as in torchvision


class RetinaNet(CnnDetector):
    """torchvision's RetinaNet with a feature pyramid."""

    background = 0
    decided_by_data = ("net.head.classification_head.cls_logits",)

    def __init__(
        self,
        *,
        classes: int,
        backbone: PyramidOptions,
        width: Positive,
        anchors: AnchorOptions,
        head_norm: Literal["none", "group"],
        detections: DetectionOptions,
        official_padding: bool,
    ):
        """Build the network.

        width: number of channels of the feature pyramid and of the heads.
        head_norm: "group" for a group norm after each convolution of the heads, as in torchvision's version 2, with
            which they learn faster from random weights; "none" as in the paper.

        Raises UserError if `anchors` do not fit the number of feature maps.
        """
        if head_norm == "group" and width % GROUPS:
            raise UserError(f"model.width={width} must be divisible by {GROUPS}, or give model.head_norm=none.")
        generator = anchor_generator(anchors, len(SMALL_STRIDES) if backbone.name == "small" else 5)
        norm = partial(nn.GroupNorm, GROUPS) if head_norm == "group" else None
        net = retinanet.RetinaNet(
            pyramid(backbone, width, 2, LastLevelP6P7(width, width)),
            num_classes=classes,
            anchor_generator=generator,
            head=retinanet.RetinaNetHead(width, generator.num_anchors_per_location()[0], classes, norm),
            score_thresh=detections.threshold,
            nms_thresh=detections.nms,
            detections_per_img=detections.limit,
        )
        net.transform = Unresized()
        last = [net.head.classification_head.cls_logits, net.head.regression_head.bbox_reg]
        super().__init__(net, official_padding=official_padding, last_layers=last)
        self.backbone_options = backbone
