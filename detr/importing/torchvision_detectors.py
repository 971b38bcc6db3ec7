"""Import of torchvision's detectors: Faster R-CNN, Mask R-CNN, RetinaNet, FCOS and SSD.

Our models hold torchvision's networks as `net`, so the names differ by this prefix and, in files of earlier versions of
torchvision, by the names of the heads' convolutions.
"""

from typing import Any

from torch import Tensor

from common.errors import UserError
from common.task import Adopted
from common.weights.renaming import Table, identify_format, rename
from common.weights.unwrapping import unwrap
from detr.importing.coco_categories import numbered_categories

FORMATS = (  # a pattern of tensor names that identifies the detector; the first that matches decides
    (r"^roi_heads\.keypoint_", "Keypoint R-CNN"),
    (
        r"^roi_heads\.box_head\.\d|^backbone\.fpn\..*\.1\.(weight|running_mean)$",
        "a detector of torchvision's version 2",
    ),
    (r"^roi_heads\.mask_predictor\.", "Mask R-CNN"),
    (r"^roi_heads\.box_head\.fc6\.", "Faster R-CNN"),
    (r"^head\.regression_head\.bbox_ctrness\.", "FCOS"),
    (r"^head\.regression_head\.bbox_reg\.", "RetinaNet"),
    (r"^head\.regression_head\.module_list\.", "SSD"),
    (r"^(detr\.)?(transformer|class_embed)\.", "an official DETR, which model=detr_r50 reads"),
    (r"^(backbone\.0\.body|layer4\.0)\.", "a backbone alone (which model.backbone.weights=FILE takes)"),
)
PREFIX = ("{path}", "net.{path}")
OLD_RPN = ("rpn.head.conv.{leaf}", "net.rpn.head.conv.0.0.{leaf}")
OLD_TOWERS = [(f"head.{{path}}_head.conv.{2 * i}.{{leaf}}", f"net.head.{{path}}_head.conv.{i}.0.{{leaf}}")
              for i in range(4)]  # fmt: skip
OLD_MASKS = [(f"roi_heads.mask_head.mask_fcn{i + 1}.{{leaf}}", f"net.roi_heads.mask_head.{i}.0.{{leaf}}")
             for i in range(4)]  # fmt: skip
NAMES = {  # (torchvision's, ours) of each detector
    "Faster R-CNN": Table(OLD_RPN, PREFIX),
    "Mask R-CNN": Table(OLD_RPN, *OLD_MASKS, PREFIX),
    "RetinaNet": Table(*OLD_TOWERS, PREFIX),
    "FCOS": Table(PREFIX),
    "SSD": Table(PREFIX),
}
HAS_BACKGROUND = ("Faster R-CNN", "Mask R-CNN", "SSD")
MASK_PARTS = ("net.roi_heads.mask_head.", "net.roi_heads.mask_predictor.")


def adopt(content: dict[str, Any], masks: bool = False) -> Adopted:
    """Rename the tensors of a torchvision detector to ours, and list its classes; a column is a category id.

    Accepts {"model": ...}, as torchvision's references write, or a bare state dict. With COCO's 91 columns, the classes
    have COCO's names, and unused ids are named "N/A". With any other number they are named "class 1" and so on. Column
    0 of Faster R-CNN, Mask R-CNN and SSD is the background, and therefore no class. Without the class head, which may
    be removed for fine-tuning, the task state is empty.

    The mask head of a Mask R-CNN is left out unless `masks` is True.

    Raises UserError if the file holds no such detector. The message names its format if it is recognised.
    """
    tensors, extra = unwrap(content, ("model",), "a detector of torchvision as published", ("model", "net"))
    detector = identify_format(tensors, FORMATS)
    if detector not in NAMES:
        raise UserError(
            f"The checkpoint is {detector or 'something else'} and not Faster R-CNN, Mask R-CNN, RetinaNet, FCOS or "
            "SSD of torchvision; give such a file as it was published, or one that this program wrote."
        )
    counters = [name for name in tensors if name.endswith(".num_batches_tracked")]
    rest = {name: tensor for name, tensor in tensors.items() if name not in counters}
    weights = rename(rest, NAMES[detector].to_ours).tensors
    columns = _columns(weights)
    left_out = [*counters, *extra]
    if not masks:
        left_out += [name.removeprefix("net.") for name in weights if name.startswith(MASK_PARTS)]
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(MASK_PARTS)}
    if not columns:
        return Adopted(weights, {}, left_out)
    return Adopted(weights, {"categories": numbered_categories(columns)[detector in HAS_BACKGROUND :]}, left_out)


def _columns(weights: dict[str, Tensor]) -> int:
    """Return the number of class scores of a box, with the background if there is one; 0 without a class head."""
    scores = weights.get("net.roi_heads.box_predictor.cls_score.weight")
    if scores is not None:
        return len(scores)
    for classes, boxes in (("cls_logits", "bbox_reg"), ("module_list.0", "module_list.0")):
        logits = weights.get(f"net.head.classification_head.{classes}.weight")
        sides = weights.get(f"net.head.regression_head.{boxes}.weight")
        if logits is not None and sides is not None and len(sides) >= 4:
            return len(logits) // (len(sides) // 4)  # both have one row for each box of a position
    return 0
