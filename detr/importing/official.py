"""Official DETR files (facebookresearch/detr, Carion et al. 2020, arXiv 2005.12872) to our names and back.

Only names change: every tensor has the same shape and the same meaning in both layouts.
"""

import re
from typing import Any

from torch import Tensor

from common.errors import UserError
from common.task import Adopted

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

# (official, ours): what a name begins with.
PARTS = (
    ("backbone.0.body.", "backbone."),
    ("backbone.1.row_embed.", "positions.rows."),
    ("backbone.1.col_embed.", "positions.columns."),
    ("transformer.encoder.layers.", "encoder.blocks."),
    ("transformer.encoder.norm.", "encoder.norm."),
    ("transformer.decoder.layers.", "decoder.blocks."),
    ("transformer.decoder.norm.", "decoder.norm."),
    ("class_embed.", "class_head."),
    ("bbox_embed.layers.0.", "box_head.0."),
    ("bbox_embed.layers.1.", "box_head.2."),
    ("bbox_embed.layers.2.", "box_head.4."),
    ("query_embed.", "queries."),
    ("input_proj.", "project."),
)
# (official, ours): what follows a layer's number; the rest of the name is the same.
ENCODER_LAYER = (
    ("self_attn.in_proj_", "attention.in_proj."),
    ("self_attn.out_proj.", "attention.out_proj."),
    ("linear1.", "feed_forward.expand."),
    ("linear2.", "feed_forward.contract."),
    ("norm1.", "residuals.0.norm."),
    ("norm2.", "residuals.1.norm."),
)
DECODER_LAYER = (
    *ENCODER_LAYER,
    ("multihead_attn.in_proj_", "cross_attention.in_proj."),
    ("multihead_attn.out_proj.", "cross_attention.out_proj."),
    ("norm3.", "residuals.2.norm."),
)
# Not a detector's weights: panoptic files' mask head, and counters that the official loader drops too.
MASK_HEAD = ("bbox_attention.", "mask_head.")
COUNTERS = (".num_batches_tracked", "total_ops", "total_params")

# Patterns of names that tell what a file is instead; the first that is found decides.
OTHERS = (
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
    tensors = content.get("model", content)
    if not isinstance(tensors, dict) or not any(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(
            'The checkpoint holds no weights, bare or under "model"; give a facebookresearch/detr file as published, '
            "or one that this program wrote."
        )
    weights, left_out = {}, []
    for whole, value in tensors.items():
        name = whole.removeprefix("detr.")
        ours = _renamed(name, forth=True)
        if name.startswith(MASK_HEAD) or name.endswith(COUNTERS):
            left_out.append(whole)
        elif ours is None or not isinstance(value, Tensor):
            raise UserError(_refusal(tensors, f"it has {whole}, which an official DETR does not"))
        else:
            weights[ours] = value
    for official, ours in PARTS:
        optional = official.startswith("backbone.1.") or official == "transformer.encoder.norm."
        if not optional and not any(name.startswith(ours) and name.endswith("weight") for name in weights):
            raise UserError(_refusal(tensors, f"it has no {official}*"))
    classes = len(weights["class_head.weight"]) - 1  # the last row is "no object"
    names = COCO_NAMES if classes == len(COCO_NAMES) else [f"class {i}" for i in range(classes)]
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    return Adopted(weights, {"categories": categories}, left_out)


def export(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A Detector's weights as an official file's content, {"model": ...}, which torch.save writes.

    Raises UserError for a tensor that the official network does not have.
    """
    names = {name: _renamed(name, forth=False) for name in weights}
    foreign = next((name for name, official in names.items() if official is None), None)
    if foreign is not None:
        raise UserError(f"{foreign} has no place in the official DETR; only a detr.detector.Detector can be exported.")
    return {"model": {str(official): weights[name] for name, official in names.items()}}


def _renamed(name: str, *, forth: bool) -> str | None:
    """An official name in our layout (or ours in the official one); None when it is no name there."""
    start = _matching(PARTS, name, forth)
    if start is None:
        return None
    old, new, rest = start
    if "coder.layers." not in old + new:
        return new + rest
    number, _, rest = rest.partition(".")
    inner = _matching(DECODER_LAYER if "decoder" in old else ENCODER_LAYER, rest, forth)
    return None if inner is None or not number.isdecimal() else f"{new}{number}.{inner[1]}{inner[2]}"


def _matching(table: tuple[tuple[str, str], ...], name: str, forth: bool) -> tuple[str, str, str] | None:
    """The start of `name` that `table` knows, its replacement, and the rest."""
    pairs = table if forth else tuple((ours, official) for official, ours in table)
    return next(((old, new, name.removeprefix(old)) for old, new in pairs if name.startswith(old)), None)


def _refusal(tensors: dict[str, Any], reason: str) -> str:
    what = next(
        (what for pattern, what in OTHERS if any(re.search(pattern, name) for name in tensors)), "something else"
    )
    return (
        f"The checkpoint is {what} and not an official DETR ({reason}); give a file of facebookresearch/detr in its "
        "published layout, or one that this program wrote."
    )
