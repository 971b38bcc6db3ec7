"""Official DETR files (facebookresearch/detr, Carion et al. 2020, arXiv 2005.12872) to our names and back.

Only names change: every tensor has the same shape and the same meaning in both layouts.
"""

from typing import Any

from torch import Tensor

from common.errors import UserError
from common.task import Adopted
from common.weights.layers import RESNET, TORCH_DECODER_LAYER, TORCH_ENCODER_LAYER
from common.weights.renaming import Table, identify_format, rename, with_prefixes
from common.weights.unwrapping import unwrap

# COCO's classes by category id, which is the official class index; the published ids have holes.
COCO_NAMES = tuple(
    "N/A,person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,N/A,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,N/A,backpack,umbrella,N/A,N/A,"
    "handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,"
    "tennis racket,bottle,N/A,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,"
    "hot dog,pizza,donut,cake,chair,couch,potted plant,bed,N/A,dining table,N/A,N/A,toilet,N/A,tv,laptop,mouse,"
    "remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,N/A,book,clock,vase,scissors,teddy bear,"
    "hair drier,toothbrush".split(",")
)

NAMES = Table(  # (official, ours); panoptic files have "detr." before all
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
REQUIRED_PREFIXES = (
    *("backbone.0.body.", "transformer.encoder.layers.", "transformer.decoder.layers.", "transformer.decoder.norm."),
    *("class_embed.", *(f"bbox_embed.layers.{i}." for i in range(3)), "query_embed.", "input_proj."),
)
# Not a detector's weights: panoptic files' mask head, and counters that the official loader drops too.
LEFT_OUT = r"(detr\.)?(bbox_attention|mask_head)\..*|.*(\.num_batches_tracked|total_ops|total_params)"

# Patterns of names that tell what a file is instead; the first that matches decides.
OTHER_FORMATS = (
    ("sampling_offsets", "a Deformable DETR or one of its descendants (DINO, RT-DETR)"),
    ("ca_qpos_proj", "a conditional, DAB- or DN-DETR"),
    ("class_labels_classifier", "a model in the layout of transformers"),
    (r"^(backbone\.body|rpn|roi_heads)\.", "a detector of torchvision"),
    (r"^layer4\.0\.", "a ResNet alone (which model.backbone.weights=FILE takes)"),
)


def adopt(content: dict[str, Any]) -> Adopted:
    """The content of an official file in our names, with its classes: the class index is the category id.

    Takes {"model": ...} and bare weights, of R50, DC5 (whose names are R50's) and R101, with sine or learned positions,
    pre-norm too, and panoptic files without their mask head. With COCO's 91 classes index i is COCO's id i, and ids
    that COCO does not use are called "N/A"; with any other number the classes are "class 0", "class 1" and so on.
    Raises UserError for any other file, saying what it is.
    """
    tensors, beside = unwrap(content, ("model",), "a facebookresearch/detr file as published")
    weights, sources, left_out, unknown = rename(tensors, NAMES.to_ours, LEFT_OUT)
    if unknown or beside:
        raise UserError(_refusal(tensors, f"it has {[*unknown, *beside][0]}, which an official DETR does not"))
    matrices = [name.removeprefix("detr.") for name in sources.values() if name.endswith("weight")]
    missing = next((part for part in REQUIRED_PREFIXES if not any(name.startswith(part) for name in matrices)), None)
    if missing:
        raise UserError(_refusal(tensors, f"it has no {missing}*"))
    classes = len(weights["class_head.weight"]) - 1  # the last row is "no object"
    names = COCO_NAMES if classes == len(COCO_NAMES) else [f"class {i}" for i in range(classes)]
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    return Adopted(weights, {"categories": categories}, left_out)


def export(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A Detector's weights as an official file's content, {"model": ...}, which torch.save writes.

    Raises UserError for a tensor that the official network does not have.
    """
    renamed = rename(weights, NAMES.to_theirs)
    if renamed.unknown:
        name = renamed.unknown[0]
        raise UserError(
            f"{name} has no place in the official DETR; only detr.models.detector.Detector can be exported."
        )
    return {"model": renamed.tensors}


def _refusal(tensors: dict[str, Any], reason: str) -> str:
    what = identify_format(tensors, OTHER_FORMATS) or "something else"
    return (
        f"The checkpoint is {what} and not an official DETR ({reason}); give a file of facebookresearch/detr in its "
        "published layout, or one that this program wrote."
    )
