"""Faster R-CNN: a network proposes regions of an image, and a second one classifies each region and refines its box.

Ren et al. 2015, "Faster R-CNN", arXiv 1506.01497, with a feature pyramid (Lin et al. 2017, arXiv 1612.03144), and
with masks Mask R-CNN (He et al. 2017, arXiv 1703.06870). The networks are torchvision's; see cnn_detector.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torchvision.models.detection import faster_rcnn, mask_rcnn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from common.types import Positive
from detr.models.anchors import AnchorOptions, anchor_generator
from detr.models.cnn_detector import CnnDetector, DetectionOptions, Unresized
from detr.models.pyramid import SMALL_STRIDES, PyramidOptions, pyramid


@dataclass(frozen=True, kw_only=True)
class ProposalOptions:
    """The region proposal network.

    candidates: number of proposals of each feature map before non-maximum suppression, in training and in evaluation.
    kept: number of proposals of an image after non-maximum suppression, in training and in evaluation.
    sampled: number of anchors of an image that its loss samples, at most half of them positive.
    """

    candidates: tuple[Positive, Positive]
    kept: tuple[Positive, Positive]
    sampled: Positive


@dataclass(frozen=True, kw_only=True)
class RegionOptions:
    """The head that classifies proposals.

    pool: height and width of the features that RoIAlign computes for each proposal.
    hidden: width of the two hidden layers.
    sampled: number of proposals of an image that its loss samples, at most a quarter of them positive.
    """

    pool: Positive
    hidden: Positive
    sampled: Positive


@dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """The head that predicts a mask of each detection, in twice the resolution of its input.

    pool: height and width of the features that RoIAlign computes for each detection.
    channels: numbers of channels of the convolutions; the last number is also that of the upsampled features.
    """

    pool: Positive
    channels: list[Positive]


class FasterRCNN(CnnDetector):
    """torchvision's Faster R-CNN with a feature pyramid; with `masks`, its Mask R-CNN."""

    background = 1
    decided_by_data: Sequence[str] = ("net.roi_heads.box_predictor",)
    depends_on_micro_batch = ("Faster R-CNN's random samples of anchors and proposals",)

    def __init__(
        self,
        *,
        classes: int,
        backbone: PyramidOptions,
        width: Positive,
        anchors: AnchorOptions,
        proposals: ProposalOptions,
        regions: RegionOptions,
        detections: DetectionOptions,
        official_padding: bool,
        masks: MaskOptions | None = None,
    ):
        """Build the network; `width` is the number of channels of the feature pyramid.

        masks: the head for masks; None = the network predicts boxes alone.

        Raises UserError if `anchors` do not fit the number of feature maps.
        """
        levels = len(SMALL_STRIDES) if backbone.name == "small" else 4
        pooled = 0 if backbone.name == "small" else 1  # the coarsest map serves proposals only
        resolution, maps = (regions.pool, regions.pool), [str(i) for i in range(levels)]
        net = faster_rcnn.FasterRCNN(
            pyramid(backbone, width, 1, LastLevelMaxPool()),
            rpn_anchor_generator=anchor_generator(anchors, levels + pooled),
            rpn_pre_nms_top_n_train=proposals.candidates[0],
            rpn_pre_nms_top_n_test=proposals.candidates[1],
            rpn_post_nms_top_n_train=proposals.kept[0],
            rpn_post_nms_top_n_test=proposals.kept[1],
            rpn_batch_size_per_image=proposals.sampled,
            box_roi_pool=MultiScaleRoIAlign(maps, resolution, 2),
            box_head=faster_rcnn.TwoMLPHead(width * regions.pool**2, regions.hidden),
            box_predictor=faster_rcnn.FastRCNNPredictor(regions.hidden, classes + self.background),
            box_score_thresh=detections.threshold,
            box_nms_thresh=detections.nms,
            box_detections_per_img=detections.limit,
            box_batch_size_per_image=regions.sampled,
        )
        net.transform = Unresized()
        last = [net.rpn.head.cls_logits, net.rpn.head.bbox_pred]
        last += [net.roi_heads.box_predictor.cls_score, net.roi_heads.box_predictor.bbox_pred]
        if masks is not None:
            _add_masks(net.roi_heads, masks, maps, width, classes + self.background)
            last.append(net.roi_heads.mask_predictor.mask_fcn_logits)
        super().__init__(net, official_padding=official_padding, last_layers=last)
        self.backbone_options = backbone
        if masks is not None:
            self.decided_by_data = (*self.decided_by_data, "net.roi_heads.mask_predictor.mask_fcn_logits")


def _add_masks(heads: RoIHeads, options: MaskOptions, maps: list[str], width: int, columns: int) -> None:
    """Add to torchvision's heads the parts that predict a mask for each class, as its Mask R-CNN does."""
    channels = options.channels
    heads.mask_roi_pool = MultiScaleRoIAlign(maps, (options.pool, options.pool), 2)
    heads.mask_head = mask_rcnn.MaskRCNNHeads(width, channels, 1)
    heads.mask_predictor = mask_rcnn.MaskRCNNPredictor(channels[-1], channels[-1], columns)
