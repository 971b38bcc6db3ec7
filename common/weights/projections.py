"""Projections of queries, keys and values: three matrices in other programs, the rows of one in ours."""

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor


def join(tensors: Mapping[str, Tensor], *, zero_biases: bool = False) -> dict[str, Tensor]:
    """Every `attention.q`, `attention.k` and `attention.v` as one `attention.in_proj`, the rows in this order.

    Where one of the three is missing, all are dropped, so that `in_proj` is missing. With `zero_biases` a projection
    that has no bias at all gets zeros, which change nothing.
    """
    joined: dict[str, Tensor] = {}
    thirds: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"(.*attention\.)([qkv])\.(weight|bias)", name):
            thirds[f"{match[1]}in_proj.{match[3]}"][match[2]] = tensor
        else:
            joined[name] = tensor
    joined |= {name: torch.cat([three[p] for p in "qkv"]) for name, three in thirds.items() if len(three) == 3}
    if zero_biases:
        for name in [name for name in joined if name.endswith("attention.in_proj.weight")]:
            bias = f"{name.removesuffix('weight')}bias"
            if bias not in joined and bias not in thirds:  # a bias of queries alone is not completed
                joined[bias] = joined[name].new_zeros(len(joined[name]))
    return joined


def split(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every `attention.in_proj` as `attention.q`, `attention.k` and `attention.v`, views of its rows."""
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        attention, joint, leaf = name.rpartition("in_proj.")
        names = [f"{attention}{part}.{leaf}" for part in "qkv"] if joint else [name]
        apart.update(zip(names, tensor.chunk(len(names)), strict=True))
    return apart
