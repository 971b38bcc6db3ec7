"""The weights of a foreign file, without wrappers, prefixes and half precision."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError

PREFIX = re.compile(r"^(?:module\.|_orig_mod\.)+")  # of DataParallel and of compiled models


def unwrap(content: dict[str, Any], wrappers: Sequence[str], expected: str) -> tuple[dict[str, Tensor], list[str]]:
    """A file's tensors, and the keys of what is left out: other sets of weights, and values that are not tensors.

    Weights are bare, or under one of the keys `wrappers`, of which the first that holds tensors counts. Raises
    UserError when there are none; `expected` names the supported files.
    """
    holders = [key for key in wrappers if _holds_tensors(content.get(key))]
    weights = content[holders[0]] if holders else content
    if not _holds_tensors(weights):
        raise UserError(
            f"The checkpoint holds no weights, bare or under {_listed(wrappers)}; give {expected}, or a file that this "
            "program wrote."
        )
    other_keys = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    tensors = {PREFIX.sub("", name): value for name, value in weights.items() if isinstance(value, Tensor)}
    return tensors, holders[1:] + other_keys


def floats(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with half types converted to fp32."""
    half = (torch.float16, torch.bfloat16)
    return {name: tensor.float() if tensor.dtype in half else tensor for name, tensor in tensors.items()}


def _holds_tensors(content: Any) -> bool:
    return isinstance(content, dict) and any(isinstance(value, Tensor) for value in content.values())


def _listed(keys: Sequence[str]) -> str:
    quoted = [f'"{key}"' for key in keys]
    return " or ".join(filter(None, (", ".join(quoted[:-1]), quoted[-1])))
