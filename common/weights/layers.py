"""Rows that several rename tables share: for torch.nn's Transformer layers and for ResNets.

A row is a pair (their name, our name); see renaming.py.
"""

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
