"""Import and export of official DINO files (IDEA-Research/DINO, Zhang et al. 2022, arXiv 2203.03605).

The names are those of the official code's DINO-4scale and DINO-5scale with a ResNet. An official file holds the shared
heads once for each layer, and all of them a second time in the decoder; an import checks that these are equal, and
keeps one.
"""

from typing import Any

from torch import Tensor

from common.errors import UserError
from common.task import Adopted
from common.weights.renaming import Table, rename
from common.weights.unwrapping import unwrap
from detr.importing.coco_categories import numbered_categories
from detr.importing.deformable import (
    COMMON_NAMES,
    LEFT_OUT,
    copies_in_decoder,
    repeat_heads,
    shared_heads,
    without_repeated_heads,
)

NAMES = Table(  # (official, ours)
    *COMMON_NAMES,
    ("transformer.decoder.norm.", "norm."),
    ("transformer.decoder.ref_point_head.layers.0.", "position_head.0."),
    ("transformer.decoder.ref_point_head.layers.1.", "position_head.2."),
    ("transformer.tgt_embed.", "queries."),
    ("transformer.refpoint_embed.", "query_boxes."),
    ("label_enc.", "label_embedding."),
    ("class_embed.{i}.", "class_head.{i}."),
    ("bbox_embed.{i}.layers.0.", "box_head.{i}.0."),
    ("bbox_embed.{i}.layers.1.", "box_head.{i}.2."),
    ("bbox_embed.{i}.layers.2.", "box_head.{i}.4."),
    ("transformer.enc_out_class_embed.", "proposal_class_head."),
    ("transformer.enc_out_bbox_embed.layers.0.", "proposal_box_head.0."),
    ("transformer.enc_out_bbox_embed.layers.1.", "proposal_box_head.2."),
    ("transformer.enc_out_bbox_embed.layers.2.", "proposal_box_head.4."),
)
REQUIRED = (
    *(
        "backbone.0.body.conv1.weight",
        "input_proj.0.0.weight",
        "transformer.level_embed",
        "bbox_embed.0.layers.0.weight",
    ),
    *("transformer.decoder.ref_point_head.layers.0.weight", "transformer.tgt_embed.weight"),
)


def recognises(content: dict[str, Any]) -> bool:
    """Whether a file's content has the position head of DINO's decoder."""
    entries = [content, *(value for value in content.values() if isinstance(value, dict))]
    return any("transformer.decoder.ref_point_head." in str(name) for entry in entries for name in entry)


def adopt(content: dict[str, Any]) -> Adopted:
    """Rename the tensors of an official file to our names, and list its classes; the class index is the category id.

    Accepts {"model": ...} or a bare state dict with a ResNet. With 91 columns, index i is COCO's id i. Label embeddings
    beyond those of the classes are left out: official files of fewer classes often keep COCO's 92. Raises UserError if
    the file has an entry that this network does not have, if a tensor is missing, or if tensors that must be equal
    differ.
    """
    tensors, extra = unwrap(content, ("model",), "a DINO file as published", ("model", "net"))
    tensors, _ = without_repeated_heads(tensors)
    weights, _, left_out, unknown = rename(tensors, NAMES.to_ours, LEFT_OUT)
    if unknown or extra:
        raise UserError(_refusal(f"it has {[*unknown, *extra][0]}, which DINO with a ResNet does not"))
    if missing := next((name for name in REQUIRED if name not in tensors), None):
        raise UserError(_refusal(f"it has no {missing}"))
    weights = shared_heads(weights)
    if "class_head.weight" not in weights:
        return Adopted(weights, {}, left_out)
    classes = len(weights["class_head.weight"])
    if (labels := weights.get("label_embedding.weight")) is not None:
        weights["label_embedding.weight"] = labels[: classes + 1]  # `dn_labelbook_size` may exceed the classes
    return Adopted(weights, {"categories": numbered_categories(classes)}, left_out)


def export(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Convert a Dino's weights to the content of an official file, {"model": ...}, for torch.save.

    Raises UserError for a tensor that the official network does not have.
    """
    renamed = rename(repeat_heads(weights), NAMES.to_theirs)
    if renamed.unknown:
        raise UserError(
            f"{renamed.unknown[0]} has no place in the official DINO; only detr.models.dino.Dino can be exported."
        )
    return {"model": renamed.tensors | copies_in_decoder(renamed.tensors, ("class_embed.", "bbox_embed."))}


def _refusal(reason: str) -> str:
    return (
        f"The checkpoint is not an official DINO with a ResNet ({reason}); give a file of IDEA-Research/DINO in its "
        "published layout, or one that this program wrote."
    )
