"""Convert query, key and value projections between three matrices (other programs) and one matrix (ours).

Our attention modules stack the rows of the three matrices in one, `in_proj`.
"""

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from common.errors import UserError


def join(tensors: Mapping[str, Tensor], *, zero_biases: bool = False) -> dict[str, Tensor]:
    """Stack the rows of `attention.q`, `attention.k` and `attention.v` into `attention.in_proj`.

    If any of the three is missing, the others are dropped, so that `in_proj` is later reported as missing. With
    `zero_biases`, an attention layer that has none of the three biases gets an `in_proj.bias` of zeros. Raises
    UserError if one of the three is not floating-point, because concatenation could convert it to floats silently.
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
            if bias not in joined and bias not in groups:  # a bias in `groups` but not in `joined` lacks q, k or v
                joined[bias] = joined[name].new_zeros(len(joined[name]))
    return joined


def split(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split the rows of each `attention.in_proj` into the views `attention.q`, `attention.k` and `attention.v`.

    Tensors with other names are returned unchanged.
    """
    parts: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        attention, joint, leaf = name.rpartition("in_proj.")
        names = [f"{attention}{part}.{leaf}" for part in "qkv"] if joint else [name]
        parts.update(zip(names, tensor.chunk(len(names)), strict=True))
    return parts
