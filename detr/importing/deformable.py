"""Import and export of official Deformable DETR files (fundamentalvision/Deformable-DETR, Zhu et al. 2021).

The tensors have the same shapes and meanings in official files and in our checkpoints; only their names differ. An
official file holds some heads several times: without box refinement one head for each layer, all equal; with
refinement a second copy of the heads in the decoder. An import keeps one of them, after checking that they are equal.
"""

import re
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.task import Adopted
from common.weights.layers import RESNET
from common.weights.renaming import Table, identify_format, rename, with_prefixes
from common.weights.unwrapping import unwrap
from detr.importing.coco_categories import numbered_categories

_SAMPLING = (
    ("sampling_offsets.", "sampling_offsets."),
    ("attention_weights.", "attention_weights."),
    ("value_proj.", "value_proj."),
    ("output_proj.", "out_proj."),
)
_FEED_FORWARD = (("linear1.", "feed_forward.expand."), ("linear2.", "feed_forward.contract."))
_ENCODER_LAYER = (
    *with_prefixes("self_attn.", "attention.", _SAMPLING),
    *_FEED_FORWARD,
    ("norm1.", "residuals.0.norm."),
    ("norm2.", "residuals.1.norm."),
)
_DECODER_LAYER = (
    *with_prefixes("cross_attn.", "cross_attention.", _SAMPLING),
    ("self_attn.in_proj_", "attention.in_proj."),
    ("self_attn.out_proj.", "attention.out_proj."),
    *_FEED_FORWARD,
    ("norm1.", "residuals.1.norm."),  # of cross-attention: unlike in DETR, it is the first norm
    ("norm2.", "residuals.0.norm."),
    ("norm3.", "residuals.2.norm."),
)
COMMON_NAMES = (  # (official, ours), of Deformable DETR and of DINO
    *with_prefixes("backbone.0.body.", "backbone.", RESNET),
    ("input_proj.{i}.0.", "project.{i}.conv."),
    ("input_proj.{i}.1.", "project.{i}.norm."),
    ("transformer.level_embed", "level_embedding"),
    *with_prefixes("transformer.encoder.layers.{i}.", "encoder.blocks.{i}.", _ENCODER_LAYER),
    *with_prefixes("transformer.decoder.layers.{i}.", "decoder.blocks.{i}.", _DECODER_LAYER),
    ("transformer.enc_output.", "proposals.project."),
    ("transformer.enc_output_norm.", "proposals.norm."),
)
NAMES = Table(
    *COMMON_NAMES,
    ("transformer.reference_points.", "reference_points."),
    ("query_embed.", "queries."),
    ("transformer.pos_trans.", "box_embedding.0."),
    ("transformer.pos_trans_norm.", "box_embedding.1."),
    ("class_embed.{i}.", "class_head.{i}."),
    ("bbox_embed.{i}.layers.0.", "box_head.{i}.0."),
    ("bbox_embed.{i}.layers.1.", "box_head.{i}.2."),
    ("bbox_embed.{i}.layers.2.", "box_head.{i}.4."),
)
DECODER = "transformer.decoder."  # prefix of the official decoder's copies of the heads
LEFT_OUT = r".*(\.num_batches_tracked|total_ops|total_params)"
REQUIRED = (
    *(
        "backbone.0.body.conv1.weight",
        "input_proj.0.0.weight",
        "transformer.level_embed",
        "bbox_embed.0.layers.0.weight",
    ),
    "transformer.encoder.layers.0.self_attn.sampling_offsets.weight",
    "transformer.decoder.layers.0.cross_attn.sampling_offsets.weight",
)
OTHER_FORMATS = (
    (r"^label_enc|ref_point_head|tgt_embed", "a DINO, DN- or DAB-DETR"),
    (r"^model\.(backbone|encoder|decoder)\.", "a model in the layout of transformers"),
)


def recognises(content: dict[str, Any]) -> bool:
    """Whether a file's content has sampling offsets, as those of Deformable DETR and its descendants have."""
    entries = [content, *(value for value in content.values() if isinstance(value, dict))]
    return any("sampling_offsets" in str(name) for entry in entries for name in entry)


def adopt(content: dict[str, Any]) -> Adopted:
    """Rename the tensors of an official file to our names, and list its classes; the class index is the category id.

    Accepts {"model": ...} or a bare state dict of each of the four published variants: with one or several levels, with
    box refinement, and with two stages. With COCO's 91 columns, index i is COCO's id i, and unused ids are named "N/A".
    With any other number, classes are named "class 0", "class 1" and so on.

    Raises UserError if the file has an entry that official Deformable DETR does not have, if a tensor is missing, or if
    tensors that must be equal differ.
    """
    tensors, extra = unwrap(content, ("model",), "a Deformable-DETR file as published", ("model", "net"))
    tensors, repeated = without_repeated_heads(tensors)
    weights, _, left_out, unknown = rename(tensors, NAMES.to_ours, LEFT_OUT)
    if unknown or extra:
        name = [*unknown, *extra][0]
        raise UserError(_refusal(tensors, f"it has {name}, which an official Deformable DETR does not"))
    if missing := next((name for name in REQUIRED if name not in tensors), None):
        raise UserError(_refusal(tensors, f"it has no {missing}"))
    if not repeated:
        weights = shared_heads(weights)
    head = next((weights[name] for name in ("class_head.weight", "class_head.0.weight") if name in weights), None)
    return Adopted(weights, {} if head is None else {"categories": numbered_categories(len(head))}, left_out)


def export(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Convert a DeformableDetector's weights to the content of an official file, {"model": ...}, for torch.save.

    Raises UserError for a tensor that the official network does not have.
    """
    refined, two_stage = "box_head.0.0.weight" in weights, "proposals.project.weight" in weights
    renamed = rename(weights if refined else repeat_heads(weights), NAMES.to_theirs)
    if renamed.unknown:
        raise UserError(
            f"{renamed.unknown[0]} has no place in the official Deformable DETR; only "
            "detr.models.deformable_detector.DeformableDetector can be exported."
        )
    heads = (*["bbox_embed."] * refined, *["class_embed."] * two_stage)
    return {"model": renamed.tensors | copies_in_decoder(renamed.tensors, heads)}


def repeat_heads(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name the class and the box head that all decoder layers share once for each layer."""
    layers = 1 + max(int(match[1]) for name in weights if (match := re.match(r"decoder\.blocks\.(\d+)\.", name)))
    repeated: dict[str, Tensor] = {}
    for name, value in weights.items():
        head, _, rest = name.partition(".")
        shared = head in ("class_head", "box_head")
        repeated |= {f"{head}.{layer}.{rest}": value for layer in range(layers)} if shared else {name: value}
    return repeated


def copies_in_decoder(tensors: dict[str, Tensor], heads: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the tensors of `heads` (prefixes of official names) under the names of the decoder's copies."""
    return {f"{DECODER}{name}": value for name, value in tensors.items() if heads and name.startswith(heads)}


def without_repeated_heads(tensors: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Remove the decoder's copies of the heads; returns the other tensors, and the names of the removed ones.

    Raises UserError if a copy differs from its original.
    """
    repeated = [name for name in tensors if name.startswith((f"{DECODER}bbox_embed.", f"{DECODER}class_embed."))]
    for name in repeated:
        _check_equal(tensors, name.removeprefix(DECODER), name)
    return {name: value for name, value in tensors.items() if name not in repeated}, repeated


def shared_heads(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keep one of the equal heads of all layers; raises UserError if they differ."""
    shared: dict[str, Tensor] = {}
    for name, value in weights.items():
        match = re.fullmatch(r"(class_head|box_head)\.(\d+)\.(.+)", name)
        if match and match[2] != "0":
            _check_equal(weights, f"{match[1]}.0.{match[3]}", name)
        else:
            shared[f"{match[1]}.{match[3]}" if match else name] = value
    return shared


def _check_equal(tensors: dict[str, Any], name: str, copy: str) -> None:
    if name not in tensors or not torch.equal(tensors[name], tensors[copy]):
        names = [NAMES.to_theirs(x) or x for x in (name, copy)]
        raise UserError(
            f"The checkpoint's tensors {names[0]} and {names[1]} differ, although they are one tensor in the official "
            "network; give the file as published."
        )


def _refusal(tensors: dict[str, Any], reason: str) -> str:
    format_name = identify_format(tensors, OTHER_FORMATS) or "something else"
    return (
        f"The checkpoint is {format_name} and not an official Deformable DETR ({reason}); give a file of "
        "fundamentalvision/Deformable-DETR in its published layout, or one that this program wrote."
    )
