"""Names of a ViT's tensors in torchvision, timm and transformers, and this project's names for them.

The names are those of torchvision 0.29, timm 1.0.31 and transformers 5.23. The files that the authors of DeiT III and
DINOv2 published have variants of timm's names. Version 5 of transformers uses new names in its models, while published
files keep the old ones.

Some of our names in these tables are intermediate, and adopt.py converts the tensors further. It splits "positions"
into the positions of the class token, the distillation token, registers and patches. It joins "attention.q",
"attention.k" and "attention.v" of transformers into one matrix.
"""

from typing import NamedTuple

from common.weights.renaming import Table, with_prefixes


class Layout(NamedTuple):
    """The names of one program's tensors."""

    pattern: str  # regular expression for the start of the patch embedding's name, which identifies the layout
    names: Table  # (theirs, ours)


BLOCK = "encoder.blocks.{i}."
REQUIRED_IN_EACH_BLOCK = tuple(  # our names of the tensors that every block has
    f"{part}.{leaf}"
    for part in (
        "attention.in_proj",
        "attention.out_proj",
        "feed_forward.expand",
        "feed_forward.contract",
        "residuals.0.norm",
        "residuals.1.norm",
    )
    for leaf in ("weight", "bias")
)
LAYOUTS = {
    "torchvision": Layout(
        pattern=r"conv_proj\.",
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
                    ("mlp.{0|linear_1}.", "feed_forward.expand."),  # linear_1: before torchvision's pull request 6053
                    ("mlp.{3|linear_2}.", "feed_forward.contract."),
                ),
            ),
        ),
    ),
    "timm": Layout(
        pattern=r"patch_embed\.proj\.",
        names=Table(
            ("patch_embed.proj.", "patches."),
            ("cls_token", "class_token"),
            ("{reg_token|register_tokens}", "registers"),  # the latter in files of DINOv2's authors
            ("dist_token", "distillation_token"),
            ("pos_embed", "positions"),
            ("norm.", "encoder.norm."),
            ("fc_norm.", "pooled_norm."),
            ("pre_logits.fc.", "representation."),
            ("head.", "head."),
            ("head_dist.", "distillation_head."),
            *with_prefixes(
                "blocks.{|*.}{i}.",  # the larger files of DINOv2's authors also number chunks of blocks
                BLOCK,
                (
                    ("norm1.", "residuals.0.norm."),
                    ("attn.qkv.", "attention.in_proj."),
                    ("attn.q_norm.", "attention.q_norm."),
                    ("attn.k_norm.", "attention.k_norm."),
                    ("attn.proj.", "attention.out_proj."),
                    ("{ls1.gamma|gamma_1}", "residuals.0.scale"),  # the latter in files of DeiT III's authors
                    ("norm2.", "residuals.1.norm."),
                    ("mlp.fc1.", "feed_forward.expand."),
                    ("mlp.fc2.", "feed_forward.contract."),
                    ("{ls2.gamma|gamma_2}", "residuals.1.scale"),
                ),
            ),
        ),
    ),
    "transformers": Layout(
        pattern=r"(?:\w+\.)?embeddings\.patch_embeddings\.",
        names=Table(
            ("{classifier|cls_classifier}.", "head."),  # the latter in DeiT
            ("distillation_classifier.", "distillation_head."),
            *with_prefixes(
                "{vit.|*.|}",
                "",
                (
                    ("embeddings.patch_embeddings.projection.", "patches."),
                    ("embeddings.cls_token", "class_token"),
                    ("embeddings.distillation_token", "distillation_token"),
                    ("embeddings.register_tokens", "registers"),
                    ("embeddings.position_embeddings", "positions"),
                    ("layernorm.", "encoder.norm."),
                    ("pooler.dense.", "representation."),  # a hidden layer with tanh
                ),
            ),
            *with_prefixes(
                "{vit.|*.|}{layers|encoder.layer}.{i}.",  # encoder.layer: in published files
                BLOCK,
                (
                    ("{layernorm_before|norm1}.", "residuals.0.norm."),  # norm1 and norm2 in DINOv2
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

# Tensors that a classifier does not use: the counter of averaged models, the mask token of masked image modelling, the
# decoder of a masked autoencoder, and heads for other purposes.
LEFT_OUT = (
    r"n_averaged|(\w+\.)?(embeddings\.)?mask_token|(decoder\.)?decoder_(embed|pos_embed|blocks|layers|norm|pred)(\..*)?|"
    r"(head|heads|linear_head|dino_head|ibot_head)\..*"
)
