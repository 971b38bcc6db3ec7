"""Import and export of official DETR files (facebookresearch/detr, Carion et al. 2020, arXiv 2005.12872).

The tensors of the detector have the same shapes and meanings in official files and in our checkpoints; only their names
differ.
"""

from typing import Any

from torch import Tensor

from common.errors import UserError
from common.task import Adopted
from common.weights.layers import RESNET, TORCH_DECODER_LAYER, TORCH_ENCODER_LAYER
from common.weights.renaming import Table, identify_format, rename, with_prefixes
from common.weights.unwrapping import unwrap
from detr.importing.coco_categories import PANOPTIC_COUNT, numbered_categories, panoptic_categories

NAMES = Table(  # (official, ours); panoptic files have the prefix "detr."
    *with_prefixes(
        "{|detr.}",
        "",
        (
            *with_prefixes("backbone.0.body.", "backbone.", RESNET),
            ("backbone.1.row_embed.", "positions.rows."),
            ("backbone.1.col_embed.", "positions.columns."),
            *with_prefixes("transformer.encoder.layers.{i}.", "encoder.blocks.{i}.", TORCH_ENCODER_LAYER),
            ("transformer.encoder.norm.", "encoder.norm."),
            *with_prefixes("transformer.decoder.layers.{i}.", "decoder.blocks.{i}.", TORCH_DECODER_LAYER),
            ("transformer.decoder.norm.", "decoder.norm."),
            ("class_embed.", "class_head."),
            ("bbox_embed.layers.0.", "box_head.0."),
            ("bbox_embed.layers.1.", "box_head.2."),
            ("bbox_embed.layers.2.", "box_head.4."),
            ("query_embed.", "queries."),
            ("input_proj.", "project."),
        ),
    ),
)
MASK_HEAD = (
    ("bbox_attention.q_linear.", "mask_head.attention.query."),
    ("bbox_attention.k_linear.", "mask_head.attention.key."),
    *((f"mask_head.lay{i + 1}.", f"mask_head.convs.{i}.") for i in range(5)),
    *((f"mask_head.gn{i + 1}.", f"mask_head.norms.{i}.") for i in range(5)),
    *((f"mask_head.adapter{i + 1}.", f"mask_head.adapters.{i}.") for i in range(3)),
    ("mask_head.out_lay.", "mask_head.output."),
)
NAMES_WITH_MASKS = Table(*NAMES.rows, *MASK_HEAD)
REQUIRED_PREFIXES = (
    *("backbone.0.body.", "transformer.encoder.layers.", "transformer.decoder.layers.", "transformer.decoder.norm."),
    *(*(f"bbox_embed.layers.{i}." for i in range(3)), "input_proj."),
)
# Tensors of official files that our detector does not have: the mask head of panoptic files (unless it is wanted), the
# criterion's class weights, and counters that the official loader drops.
LEFT_OUT = (
    r"(detr\.)?(bbox_attention|mask_head)\..*|criterion\.empty_weight|.*(\.num_batches_tracked|total_ops|total_params)"
)

# Patterns of tensor names that identify unsupported formats; the first that matches decides.
OTHER_FORMATS = (
    ("sampling_offsets", "a Deformable DETR or one of its descendants (DINO, RT-DETR)"),
    ("ca_qpos_proj", "a conditional, DAB- or DN-DETR"),
    ("class_labels_classifier", "a model in the layout of transformers"),
    (r"^(backbone\.body|rpn|roi_heads)\.", "a detector of torchvision"),
    (r"^layer4\.0\.", "a ResNet alone (which model.backbone.weights=FILE takes)"),
)


def adopt(content: dict[str, Any], masks: bool = False) -> Adopted:
    """Rename the tensors of an official file to our names, and list its classes; the class index is the category id.

    Accepts {"model": ...} or a bare state dict of a model with ResNet-50 or ResNet-101, with or without dilation (DC5),
    with sine or learned positions, post-norm or pre-norm. The mask head of a panoptic file is left out unless `masks`
    is True. With COCO's 91 classes, index i is COCO's id i, and unused ids are named "N/A". With the 250 classes of
    official panoptic files, names are those of COCO's panoptic task. With any other number of classes, they are named
    "class 0", "class 1" and so on. A file for fine-tuning, from which the class head or the queries were removed, is
    also accepted. Without the class head, the task state is empty.

    Raises UserError if the file has an entry that official DETR does not have, or if it lacks the weights of a part in
    REQUIRED_PREFIXES. The message names the format of the file if it is recognised.
    """
    tensors, extra = unwrap(content, ("model",), "a facebookresearch/detr file as published", ("model", "net"))
    names = NAMES_WITH_MASKS if masks else NAMES
    weights, sources, left_out, unknown = rename(tensors, names.to_ours, LEFT_OUT)
    if unknown or extra:
        raise UserError(_refusal(tensors, f"it has {[*unknown, *extra][0]}, which an official DETR does not"))
    weight_names = [name.removeprefix("detr.") for name in sources.values() if name.endswith("weight")]
    missing = [prefix for prefix in REQUIRED_PREFIXES if not any(name.startswith(prefix) for name in weight_names)]
    if missing:
        raise UserError(_refusal(tensors, f"it has no {missing[0]}*"))
    if "class_head.weight" not in weights:
        return Adopted(weights, {}, left_out)
    classes = len(weights["class_head.weight"]) - 1  # the last row is "no object"
    categories = panoptic_categories() if classes == PANOPTIC_COUNT else numbered_categories(classes)
    return Adopted(weights, {"categories": categories}, left_out)


def export(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Convert a Detector's weights to the content of an official file, {"model": ...}, for torch.save.

    With a mask head, the names of all other tensors begin with "detr.", as in official panoptic files.

    Raises UserError for a tensor that the official network does not have.
    """
    renamed = rename(weights, NAMES_WITH_MASKS.to_theirs)
    if renamed.unknown:
        name = renamed.unknown[0]
        raise UserError(
            f"{name} has no place in the official DETR; only detr.models.detector.Detector can be exported."
        )
    if not any(name.startswith("mask_head.") for name in weights):
        return {"model": renamed.tensors}
    head = tuple(theirs for theirs, _ in MASK_HEAD)
    return {"model": {f"{'' if name.startswith(head) else 'detr.'}{name}": x for name, x in renamed.tensors.items()}}


def _refusal(tensors: dict[str, Any], reason: str) -> str:
    format_name = identify_format(tensors, OTHER_FORMATS) or "something else"
    return (
        f"The checkpoint is {format_name} and not an official DETR ({reason}); give a file of facebookresearch/detr in "
        "its published layout, or one that this program wrote."
    )
