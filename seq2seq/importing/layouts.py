"""The table of tensor names, and functions that reorder embedding rows, to import transformers' Marian and fairseq.

transformers' Marian layout derives from fairseq's, so one table serves both. The table includes the names that fairseq
used before 2019.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.weights.renaming import with_prefixes

BLOCK = r"(encoder|decoder)\.layers\.\d+\."
ZERO_ROW = -1  # in an order of rows, this index stands for a row of zeros
# The exponential of this logit is zero even in double precision. The logit is finite, because infinite logits can lead
# to NaN.
MASKED_LOGIT = -1e9

_BLOCK = (
    ("self_attn.{qkv}_proj.", "attention.{qkv}."),
    ("self_attn.in_proj_", "attention.in_proj."),
    ("self_attn.out_proj.", "attention.out_proj."),
    ("fc1.", "feed_forward.expand."),
    ("fc2.", "feed_forward.contract."),
    ("{self_attn_layer_norm|layer_norms.0}.", "residuals.0.norm."),
)
_ENCODER_BLOCK = (*_BLOCK, ("{final_layer_norm|layer_norms.1}.", "residuals.1.norm."))
_DECODER_BLOCK = (
    *_BLOCK,
    ("encoder_attn.{qkv}_proj.", "cross_attention.{qkv}."),
    ("encoder_attn.in_proj_", "cross_attention.in_proj."),
    ("encoder_attn.out_proj.", "cross_attention.out_proj."),
    ("{encoder_attn_layer_norm|layer_norms.1}.", "residuals.1.norm."),
    ("{final_layer_norm|layer_norms.2}.", "residuals.2.norm."),
)
# Rows of (their name, our name), see common.weights.renaming. After renaming, the query, key and value projections are
# still separate tensors, which common.weights.projections.join joins.
BLOCKS = (
    *with_prefixes("encoder.layers.{i}.", "encoder.blocks.{i}.", _ENCODER_BLOCK),
    *with_prefixes("decoder.layers.{i}.", "decoder.blocks.{i}.", _DECODER_BLOCK),
)


def reorder_rows(matrix: Tensor, order: Sequence[int]) -> Tensor:
    """The rows of a matrix (V, ...) in `order`; ZERO_ROW gives zeros."""
    return torch.cat([matrix, torch.zeros_like(matrix[:1])])[torch.tensor(order)]


def embeddings(
    matrices: tuple[Tensor, Tensor, Tensor], orders: tuple[Sequence[int], Sequence[int]]
) -> dict[str, Tensor]:
    """The embedding matrices of a file by our names, with their rows in our order.

    `matrices` are those of source (V', C), target (V, C) and output (V, C); `orders` hold, for source and for target,
    the file's row for each of our rows. If all three matrices are equal, one is returned, for a model with tied="all".
    If only target and output are equal, they are returned as one, for a model with tied="target".
    """
    source, target, output = matrices
    weights = {"embedding.weight": reorder_rows(target, orders[1])}
    if not torch.equal(output, target):
        weights["output.weight"] = reorder_rows(output, orders[1])
    if len(weights) > 1 or not torch.equal(source, target):
        weights["source_embedding.weight"] = reorder_rows(source, orders[0])
    return weights
