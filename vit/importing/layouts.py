"""The names that torchvision, timm and transformers give to the tensors of a ViT, and ours for them.

Recorded from the programs' own models: torchvision 0.29; timm 1.0.31, with the names of DeiT III's and DINOv2's
authors, which grew from it; transformers 5.23, whose models changed names with version 5 while published files did not.
"""

import re
from typing import NamedTuple

from torch import Tensor

Table = tuple[tuple[str, str], ...]  # (theirs, ours): regular expressions of names without their "weight" or "bias"


class Parts(NamedTuple):
    """A foreign file's tensors under our names, but for q, k, v, tokens and positions, which are not joined yet."""

    tensors: dict[str, Tensor]
    names: dict[str, str]  # ours -> the file's
    left_out: list[str]
    unknown: list[str]  # names that change what a network computes and have no place in ours


class Layout(NamedTuple):
    """One program's names."""

    sign: str  # how the name of the patches' matrix begins, which no other layout has
    outside: Table
    block: str  # what a block's names begin with; its group is the block's number
    inside: Table


LAYOUTS = {
    "torchvision": Layout(
        sign=r"conv_proj\.",
        outside=(
            (r"conv_proj\.", "patches."),
            (r"class_token", "class_token"),
            (r"encoder\.pos_embedding", "positions"),
            (r"encoder\.ln\.", "encoder.norm."),
            (r"heads\.pre_logits\.", "representation."),
            (r"heads\.head\.", "head."),
        ),
        block=r"encoder\.layers\.encoder_layer_(\d+)\.",
        inside=(
            (r"ln_1\.", "residuals.0.norm."),
            (r"self_attention\.in_proj_", "attention.in_proj."),
            (r"self_attention\.out_proj\.", "attention.out_proj."),
            (r"ln_2\.", "residuals.1.norm."),
            (r"mlp\.(?:0|linear_1)\.", "feed_forward.expand."),  # linear_1, _2: before vision#6053, of 2022
            (r"mlp\.(?:3|linear_2)\.", "feed_forward.contract."),
        ),
    ),
    "timm": Layout(
        sign=r"patch_embed\.proj\.",
        outside=(
            (r"patch_embed\.proj\.", "patches."),
            (r"cls_token", "class_token"),
            (r"reg_token|register_tokens", "registers"),  # the latter in DINOv2's own files
            (r"pos_embed", "positions"),
            (r"norm\.", "encoder.norm."),
            (r"fc_norm\.", "pooled_norm."),
            (r"pre_logits\.fc\.", "representation."),
            (r"head\.", "head."),
        ),
        block=r"blocks\.(?:\d+\.)?(\d+)\.",  # DINOv2's large files count chunks of blocks, too
        inside=(
            (r"norm1\.", "residuals.0.norm."),
            (r"attn\.qkv\.", "attention.in_proj."),
            (r"attn\.q_norm\.", "attention.q_norm."),
            (r"attn\.k_norm\.", "attention.k_norm."),
            (r"attn\.proj\.", "attention.out_proj."),
            (r"ls1\.gamma|gamma_1", "residuals.0.scale"),  # the latter in DeiT III's own files
            (r"norm2\.", "residuals.1.norm."),
            (r"mlp\.fc1\.", "feed_forward.expand."),
            (r"mlp\.fc2\.", "feed_forward.contract."),
            (r"ls2\.gamma|gamma_2", "residuals.1.scale"),
        ),
    ),
    "transformers": Layout(
        sign=r"(?:\w+\.)?embeddings\.patch_embeddings\.",
        outside=(
            (r"(?:\w+\.)?embeddings\.patch_embeddings\.projection\.", "patches."),
            (r"(?:\w+\.)?embeddings\.cls_token", "class_token"),
            (r"(?:\w+\.)?embeddings\.register_tokens", "registers"),
            (r"(?:\w+\.)?embeddings\.position_embeddings", "positions"),
            (r"(?:\w+\.)?layernorm\.", "encoder.norm."),
            (r"(?:\w+\.)?pooler\.dense\.", "representation."),  # with tanh, on the class token: Google's pre_logits
            (r"classifier\.", "head."),
        ),
        block=r"(?:\w+\.)?(?:encoder\.layer|layers)\.(\d+)\.",  # the hub's files, and the models of version 5
        inside=(
            (r"layernorm_before\.|norm1\.", "residuals.0.norm."),  # norm1 and norm2: DINOv2
            (r"attention\.(?:attention\.query|q_proj)\.", "attention.q."),
            (r"attention\.(?:attention\.key|k_proj)\.", "attention.k."),
            (r"attention\.(?:attention\.value|v_proj)\.", "attention.v."),
            (r"attention\.(?:output\.dense|o_proj)\.", "attention.out_proj."),
            (r"layer_scale1\.lambda1", "residuals.0.scale"),
            (r"layernorm_after\.|norm2\.", "residuals.1.norm."),
            (r"intermediate\.dense\.|mlp\.fc1\.", "feed_forward.expand."),
            (r"output\.dense\.|mlp\.fc2\.", "feed_forward.contract."),
            (r"layer_scale2\.lambda1", "residuals.1.scale"),
        ),
    ),
}

# Not a classifier's weights: counters, what masked training puts in place of a patch, and heads of other kinds.
ASIDE = r"n_averaged|(\w+\.)?(embeddings\.)?mask_token|(head|heads|linear_head|dino_head|ibot_head)\..*"


def parts(tensors: dict[str, Tensor], layout: Layout) -> Parts:
    """The tensors of one of the PyTorch layouts under our names."""
    found = Parts({}, {}, [], [])
    for name, tensor in tensors.items():
        ours = _renamed(layout, name)
        if ours is not None:
            found.tensors[ours], found.names[ours] = tensor, name
        else:
            (found.left_out if re.fullmatch(ASIDE, name) else found.unknown).append(name)
    return found


def _renamed(layout: Layout, name: str) -> str | None:
    block = re.match(layout.block, name)
    table, rest = (layout.inside, name[block.end() :]) if block else (layout.outside, name)
    for theirs, ours in table:
        leaf = "(weight|bias)" if ours.endswith(".") else "()"
        if match := re.fullmatch(f"(?:{theirs}){leaf}", rest):
            return f"encoder.blocks.{int(block[1])}.{ours}{match[1]}" if block else f"{ours}{match[1]}"
    return None
