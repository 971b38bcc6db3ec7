"""Rows that several rename tables share: for torch.nn's Transformer layers, for transformers' GPT-2 and for ResNets.

A row is a pair (their name, our name); see renaming.py.
"""

from common.weights.renaming import with_prefixes

# The tensor names of torch.nn.TransformerEncoderLayer and TransformerDecoderLayer, which official DETR uses, too.
TORCH_ENCODER_LAYER = (
    ("self_attn.in_proj_", "attention.in_proj."),
    ("self_attn.out_proj.", "attention.out_proj."),
    ("linear1.", "feed_forward.expand."),
    ("linear2.", "feed_forward.contract."),
    ("norm1.", "residuals.0.norm."),
    ("norm2.", "residuals.1.norm."),
)
TORCH_DECODER_LAYER = (
    *TORCH_ENCODER_LAYER,
    ("multihead_attn.in_proj_", "cross_attention.in_proj."),
    ("multihead_attn.out_proj.", "cross_attention.out_proj."),
    ("norm3.", "residuals.2.norm."),
)
# Our ResNets have torchvision's tensor names, except num_batches_tracked, which frozen batch norms do not need.
RESNET = (("{path}.", "{path}."), ("{path}.running_{statistic}", "{path}.running_{statistic}"))
# transformers' GPT-2 and image GPT, without the output. In files that were saved without a head, names have no prefix.
GPT2 = with_prefixes(
    "{transformer.|}",
    "",
    (
        ("wpe.", "positions.table."),
        ("wte.", "embedding."),
        ("ln_f.", "decoder.norm."),
        *with_prefixes(
            "h.{i}.",
            "decoder.blocks.{i}.",
            (
                ("ln_1.", "residuals.0.norm."),
                ("ln_2.", "residuals.1.norm."),
                ("attn.c_attn.", "attention.in_proj."),
                ("attn.c_proj.", "attention.out_proj."),
                ("mlp.c_fc.", "feed_forward.expand."),
                ("mlp.c_proj.", "feed_forward.contract."),
            ),
        ),
    ),
)
# Names of the causal masks in older files of these two models.
GPT2_MASKS = r"(.*\.)?attn\.(masked_)?bias"
# Our names of the matrices that are stored as (in, out).
GPT2_TRANSPOSED = r".*(attention\.(in|out)_proj|feed_forward\.(expand|contract))\.weight"
