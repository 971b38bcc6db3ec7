"""The names that torchvision, timm and transformers give to the tensors of a ViT, and ours for them.

Recorded from the programs' own models: torchvision 0.29; timm 1.0.31, with the names of DeiT III's and DINOv2's
authors, which grew from it; transformers 5.23, whose models changed names with version 5 while published files did not.
Ours are those of a classifier's parts, with all positions in one table and, for transformers, q, k and v apart.
"""

from typing import NamedTuple

from common.weights.renaming import Table, with_prefixes


class Layout(NamedTuple):
    """One program's names."""

    sign: str  # a regular expression of how the name of the patches' matrix begins, which no other layout has
    names: Table


BLOCK = "encoder.blocks.{i}."
LAYOUTS = {
    "torchvision": Layout(
        sign=r"conv_proj\.",
        names=Table(
            ("conv_proj.", "patches."),
            ("class_token", "class_token"),
            ("encoder.pos_embedding", "positions"),
            ("encoder.ln.", "encoder.norm."),
            ("heads.pre_logits.", "representation."),
            ("heads.head.", "head."),
            *with_prefixes(
                "encoder.layers.encoder_layer_{i}.",
                BLOCK,
                (
                    ("ln_1.", "residuals.0.norm."),
                    ("self_attention.in_proj_", "attention.in_proj."),
                    ("self_attention.out_proj.", "attention.out_proj."),
                    ("ln_2.", "residuals.1.norm."),
                    ("mlp.{0|linear_1}.", "feed_forward.expand."),  # linear_1, _2: before vision#6053, of 2022
                    ("mlp.{3|linear_2}.", "feed_forward.contract."),
                ),
            ),
        ),
    ),
    "timm": Layout(
        sign=r"patch_embed\.proj\.",
        names=Table(
            ("patch_embed.proj.", "patches."),
            ("cls_token", "class_token"),
            ("{reg_token|register_tokens}", "registers"),  # the latter in DINOv2's own files
            ("pos_embed", "positions"),
            ("norm.", "encoder.norm."),
            ("fc_norm.", "pooled_norm."),
            ("pre_logits.fc.", "representation."),
            ("head.", "head."),
            *with_prefixes(
                "blocks.{|*.}{i}.",  # DINOv2's large files count chunks of blocks, too
                BLOCK,
                (
                    ("norm1.", "residuals.0.norm."),
                    ("attn.qkv.", "attention.in_proj."),
                    ("attn.q_norm.", "attention.q_norm."),
                    ("attn.k_norm.", "attention.k_norm."),
                    ("attn.proj.", "attention.out_proj."),
                    ("{ls1.gamma|gamma_1}", "residuals.0.scale"),  # the latter in DeiT III's own files
                    ("norm2.", "residuals.1.norm."),
                    ("mlp.fc1.", "feed_forward.expand."),
                    ("mlp.fc2.", "feed_forward.contract."),
                    ("{ls2.gamma|gamma_2}", "residuals.1.scale"),
                ),
            ),
        ),
    ),
    "transformers": Layout(
        sign=r"(?:\w+\.)?embeddings\.patch_embeddings\.",
        names=Table(
            ("classifier.", "head."),
            *with_prefixes(
                "{vit.|*.|}",
                "",
                (
                    ("embeddings.patch_embeddings.projection.", "patches."),
                    ("embeddings.cls_token", "class_token"),
                    ("embeddings.register_tokens", "registers"),
                    ("embeddings.position_embeddings", "positions"),
                    ("layernorm.", "encoder.norm."),
                    ("pooler.dense.", "representation."),  # with tanh, on the class token: Google's pre_logits
                ),
            ),
            *with_prefixes(
                "{vit.|*.|}{layers|encoder.layer}.{i}.",  # the models of version 5, and the hub's files
                BLOCK,
                (
                    ("{layernorm_before|norm1}.", "residuals.0.norm."),  # norm1 and norm2: DINOv2
                    ("attention.{q_proj|attention.query}.", "attention.q."),
                    ("attention.{k_proj|attention.key}.", "attention.k."),
                    ("attention.{v_proj|attention.value}.", "attention.v."),
                    ("attention.{o_proj|output.dense}.", "attention.out_proj."),
                    ("layer_scale1.lambda1", "residuals.0.scale"),
                    ("{layernorm_after|norm2}.", "residuals.1.norm."),
                    ("{mlp.fc1|intermediate.dense}.", "feed_forward.expand."),
                    ("{mlp.fc2|output.dense}.", "feed_forward.contract."),
                    ("layer_scale2.lambda1", "residuals.1.scale"),
                ),
            ),
        ),
    ),
}

# Not a classifier's weights: counters, what masked training puts in place of a patch, and heads of other kinds.
LEFT_OUT = r"n_averaged|(\w+\.)?(embeddings\.)?mask_token|(head|heads|linear_head|dino_head|ibot_head)\..*"
