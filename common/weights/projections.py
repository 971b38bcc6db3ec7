"""Query, key and value projections: three matrices in other programs, stacked as the rows of one matrix in ours."""

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from common.errors import UserError


def join(tensors: Mapping[str, Tensor], *, zero_biases: bool = False) -> dict[str, Tensor]:
    """Stack the rows of `attention.q`, `attention.k` and `attention.v` into `attention.in_proj`.

    Where one of the three is missing, the other two are dropped, so that `in_proj` is reported as missing. With
    `zero_biases`, attention without any of the three biases gets an `in_proj.bias` of zeros. Raises UserError for a
    part that is not of floats, which concatenation would convert.
    """
    joined: dict[str, Tensor] = {}
    groups: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"(.*attention\.)([qkv])\.(weight|bias)", name):
            if not tensor.is_floating_point():
                raise UserError(f"The checkpoint holds {name} as {tensor.dtype}; give a file of weights of floats.")
            groups[f"{match[1]}in_proj.{match[3]}"][match[2]] = tensor
        else:
            joined[name] = tensor
    joined |= {name: torch.cat([group[p] for p in "qkv"]) for name, group in groups.items() if len(group) == 3}
    if zero_biases:
        for name in [name for name in joined if name.endswith("attention.in_proj.weight")]:
            bias = f"{name.removesuffix('weight')}bias"
            if bias not in joined and bias not in groups:  # a bias in `groups` alone lacks one of q, k and v
                joined[bias] = joined[name].new_zeros(len(joined[name]))
    return joined


def split(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split the rows of each `attention.in_proj` into the views `attention.q`, `attention.k` and `attention.v`."""
    parts: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        attention, joint, leaf = name.rpartition("in_proj.")
        names = [f"{attention}{part}.{leaf}" for part in "qkv"] if joint else [name]
        parts.update(zip(names, tensor.chunk(len(names)), strict=True))
    return parts
