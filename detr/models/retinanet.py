"""RetinaNet: every anchor predicts its class by sigmoids, trained with the focal loss, and a box.

Lin et al. 2017, "Focal Loss for Dense Object Detection", arXiv 1708.02002. The network is torchvision's; see
cnn_detector.py. Its loss is a mean over images, so a step does not depend on how it is split into micro-batches.
"""

from torchvision.models.detection import retinanet
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from common.types import Positive
from detr.models.anchors import AnchorOptions, anchor_generator
from detr.models.cnn_detector import CnnDetector, DetectionOptions, Unresized
from detr.models.pyramid import SMALL_STRIDES, PyramidOptions, pyramid


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
        detections: DetectionOptions,
        official_padding: bool,
    ):
        """Build the network; `width` is the number of channels of the feature pyramid and of the heads.

        Raises UserError if `anchors` do not fit the number of feature maps.
        """
        net = retinanet.RetinaNet(
            pyramid(backbone, width, 2, LastLevelP6P7(width, width)),
            num_classes=classes,
            anchor_generator=anchor_generator(anchors, len(SMALL_STRIDES) if backbone.name == "small" else 5),
            score_thresh=detections.threshold,
            nms_thresh=detections.nms,
            detections_per_img=detections.limit,
        )
        net.transform = Unresized()
        last = [net.head.classification_head.cls_logits, net.head.regression_head.bbox_reg]
        super().__init__(net, official_padding=official_padding, last_layers=last)
        self.backbone_options = backbone
