"""The names that transformers' Marian and fairseq give to the tensors of a Transformer's blocks, and ours for them.

Marian's layout grew from fairseq's, so one table serves both; the names that fairseq used before 2019 are in it, too.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK = r"(encoder|decoder)\.layers\.(\d+)\."
NOTHING = -1  # in an order of rows: a row of zeros
# A logit that takes no part in a softmax, not even in double precision; finite, so that nothing becomes NaN.
OFF = -1e9

_IN_BLOCK = (
    (r"self_attn\.([qkv])_proj\.", r"attention.\1."),
    (r"self_attn\.in_proj_", "attention.in_proj."),
    (r"self_attn\.out_proj\.", "attention.out_proj."),
    (r"encoder_attn\.([qkv])_proj\.", r"cross_attention.\1."),
    (r"encoder_attn\.in_proj_", "cross_attention.in_proj."),
    (r"encoder_attn\.out_proj\.", "cross_attention.out_proj."),
    (r"fc1\.", "feed_forward.expand."),
    (r"fc2\.", "feed_forward.contract."),
    (r"(?:self_attn_layer_norm|layer_norms\.0)\.", "residuals.0.norm."),
)
_NORMS = {
    "encoder": ((r"(?:final_layer_norm|layer_norms\.1)\.", "residuals.1.norm."),),
    "decoder": (
        (r"(?:encoder_attn_layer_norm|layer_norms\.1)\.", "residuals.1.norm."),
        (r"(?:final_layer_norm|layer_norms\.2)\.", "residuals.2.norm."),
    ),
}


def ours(name: str) -> str | None:
    """Our name for a tensor of a block, with q, k and v still apart; None for any other name."""
    block = re.match(BLOCK, name)
    if block is None:
        return None
    for pattern, meaning in (*_IN_BLOCK, *_NORMS[block[1]]):
        if match := re.fullmatch(f"{pattern}(weight|bias)", name[block.end() :]):
            return f"{block[1]}.blocks.{int(block[2])}.{match.expand(meaning)}{match[match.lastindex or 0]}"
    return None


def joined(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values as the rows of one matrix; where one of them is missing, so is the whole."""
    whole: dict[str, Tensor] = {}
    thirds: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in parts.items():
        if match := re.fullmatch(r"(.*attention\.)([qkv])\.(weight|bias)", name):
            thirds[f"{match[1]}in_proj.{match[3]}"][match[2]] = tensor
        else:
            whole[name] = tensor
    return whole | {name: torch.cat([three[p] for p in "qkv"]) for name, three in thirds.items() if len(three) == 3}


def rows(table: Tensor, order: Sequence[int]) -> Tensor:
    """The rows of a table (V, ...) in this order; NOTHING gives zeros."""
    return torch.cat([table, torch.zeros_like(table[:1])])[torch.tensor(order)]


def embeddings(tables: tuple[Tensor, Tensor, Tensor], orders: tuple[Sequence[int], Sequence[int]]) -> dict[str, Tensor]:
    """A file's matrices of source (V', C), target and output (V, C) by our names, with the rows in our order.

    `orders` are those of the source's and the target's entries. Matrices that are equal become one, as far as our
    `model.tied` can say it: all three, target and output, or none.
    """
    source, target, output = tables
    weights = {"embedding.weight": rows(target, orders[1])}
    if not torch.equal(output, target):
        weights["output.weight"] = rows(output, orders[1])
    if len(weights) > 1 or not torch.equal(source, target):
        weights["source_embedding.weight"] = rows(source, orders[0])
    return weights


def raised(tensors: dict[str, Any]) -> dict[str, Any]:
    """Half types in fp32."""
    half = (torch.float16, torch.bfloat16)
    return {name: t.float() if isinstance(t, Tensor) and t.dtype in half else t for name, t in tensors.items()}
