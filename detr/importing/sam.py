"""Import and export of the files of facebookresearch/segment-anything (Kirillov et al. 2023, arXiv 2304.02643)."""

from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.task import Adopted
from common.weights import projections
from common.weights.renaming import Table, rename, with_prefixes
from common.weights.unwrapping import unwrap

ATTENTION = (("{qkv}_proj.", "{qkv}."), ("out_proj.", "out_proj."))
NAMES = Table(  # (official, ours)
    *with_prefixes(
        "image_encoder.",
        "image_encoder.",
        (
            ("pos_embed", "positions"),
            ("patch_embed.proj.", "patches."),
            ("blocks.{i}.norm1.", "encoder.blocks.{i}.residuals.0.norm."),
            ("blocks.{i}.norm2.", "encoder.blocks.{i}.residuals.1.norm."),
            ("blocks.{i}.attn.rel_pos_h", "encoder.blocks.{i}.attention.rows"),
            ("blocks.{i}.attn.rel_pos_w", "encoder.blocks.{i}.attention.columns"),
            ("blocks.{i}.attn.qkv.", "encoder.blocks.{i}.attention.in_proj."),
            ("blocks.{i}.attn.proj.", "encoder.blocks.{i}.attention.out_proj."),
            ("blocks.{i}.mlp.lin1.", "encoder.blocks.{i}.feed_forward.expand."),
            ("blocks.{i}.mlp.lin2.", "encoder.blocks.{i}.feed_forward.contract."),
            ("neck.{i}.", "neck.{i}."),
        ),
    ),
    *with_prefixes(
        "prompt_encoder.",
        "prompt_encoder.",
        (
            ("pe_layer.positional_encoding_gaussian_matrix", "frequencies"),
            ("point_embeddings.{i}.weight", "labels.{i}"),
            ("not_a_point_embed.", "no_point."),
            ("no_mask_embed.", "no_mask."),
            ("mask_downscaling.{i}.", "mask_downscaling.{i}."),
        ),
    ),
    *with_prefixes(
        "mask_decoder.",
        "mask_decoder.",
        (
            *with_prefixes("transformer.layers.{i}.self_attn.", "blocks.{i}.self_attention.", ATTENTION),
            *with_prefixes(
                "transformer.layers.{i}.cross_attn_token_to_image.", "blocks.{i}.token_attention.", ATTENTION
            ),
            *with_prefixes(
                "transformer.layers.{i}.cross_attn_image_to_token.", "blocks.{i}.image_attention.", ATTENTION
            ),
            *((f"transformer.layers.{{i}}.norm{n + 1}.", f"blocks.{{i}}.residuals.{n}.norm.") for n in range(4)),
            ("transformer.layers.{i}.mlp.lin1.", "blocks.{i}.feed_forward.expand."),
            ("transformer.layers.{i}.mlp.lin2.", "blocks.{i}.feed_forward.contract."),
            *with_prefixes("transformer.final_attn_token_to_image.", "final_attention.", ATTENTION),
            ("transformer.norm_final_attn.", "final_residual.norm."),
            ("iou_token.", "iou_token."),
            ("mask_tokens.", "mask_tokens."),
            ("output_upscaling.{i}.", "upscaling.{i}."),
            *((f"output_hypernetworks_mlps.{{i}}.layers.{n}.", f"mask_heads.{{i}}.{2 * n}.") for n in range(3)),
            *((f"iou_prediction_head.layers.{n}.", f"iou_head.{2 * n}.") for n in range(3)),
        ),
    ),
)
REQUIRED = (
    "image_encoder.pos_embed",
    "image_encoder.blocks.0.attn.rel_pos_h",
    "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    "mask_decoder.mask_tokens.weight",
)
LEFT_OUT = r"pixel_(mean|std)"  # constants of the preprocessing, which some copies of the files hold
LABELS = [f"prompt_encoder.labels.{i}" for i in range(4)]  # one row each of our table


def adopt(content: dict[str, Any]) -> Adopted:
    """Rename the tensors of an official file, a bare state dict, to our names.

    Raises UserError if the file has an entry that SAM does not have, or lacks one that it needs.
    """
    tensors, extra = unwrap(content, ("model",), "a SAM file as published", ("model", "net"))
    weights, _, left_out, unknown = rename(tensors, NAMES.to_ours, LEFT_OUT)
    if missing := next((name for name in REQUIRED if name not in tensors), None):
        raise UserError(_refusal(f"it has no {missing}"))
    if unknown or extra:
        raise UserError(_refusal(f"it has {[*unknown, *extra][0]}, which SAM with a ViT does not"))
    rows = [weights.pop(name) for name in LABELS if name in weights]
    weights["prompt_encoder.labels.weight"] = torch.cat(rows)
    return Adopted(projections.join(weights), {}, left_out)


def export(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a Sam's weights to the content of an official file, for torch.save.

    Raises UserError for a tensor that the official network does not have.
    """
    decoder = {name: tensor for name, tensor in weights.items() if name.startswith("mask_decoder.")}
    parts = {**weights, **dict(zip(LABELS, weights["prompt_encoder.labels.weight"].split(1), strict=True))}
    parts = {name: tensor for name, tensor in parts.items() if name not in (*decoder, "prompt_encoder.labels.weight")}
    renamed = rename({**parts, **projections.split(decoder)}, NAMES.to_theirs)
    if renamed.unknown:
        raise UserError(
            f"{renamed.unknown[0]} has no place in the official SAM; only detr.models.sam.Sam can be exported."
        )
    return renamed.tensors


def _refusal(reason: str) -> str:
    return (
        f"The checkpoint is not an official SAM with a ViT ({reason}); give a file of "
        "facebookresearch/segment-anything in its published layout, or one that this program wrote."
    )
