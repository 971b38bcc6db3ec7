"""Extract the weights from another program's file: remove wrappers and prefixes, convert half types to fp32."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError

# Keys under which training programs store the moving average of the weights.
EMA_KEYS = ("model_ema", "state_dict_ema", "ema_model", "ema_state_dict", "ema")
# Keys that hold the weights in files of training programs: Lightning's state_dict, DeepSpeed's module, and others.
COMMON_WRAPPERS = ("state_dict", "module", "model_state_dict")
# Of DataParallel and of compiled models, also as an attribute of a LightningModule.
PREFIX = re.compile(r"^(?:(?:model|net)\.)?(?:module\.|_orig_mod\.)+")
BESIDE_THE_MODEL = ("criterion",)  # first words of tensors that a LightningModule keeps beside its model


def unwrap(
    content: dict[str, Any], wrappers: Sequence[str], expected: str, attributes: Sequence[str] = ("net",)
) -> tuple[dict[str, Tensor], list[str]]:
    """A file's tensors, and the keys of what is left out: other sets of weights, and values that are not tensors.

    Weights are bare, or under one of the keys `wrappers` or COMMON_WRAPPERS, of which the first that holds tensors
    counts, also one level deeper. Prefixes of DataParallel and compilation are removed, and the name of a
    LightningModule's attribute, one of `attributes`, where all names begin with it. Only a caller that lists "model"
    has it removed, because some layouts have that prefix themselves. Raises UserError when there are no weights;
    `expected` names the supported files.
    """
    keys = tuple(dict.fromkeys((*wrappers, *COMMON_WRAPPERS)))
    holders = [key for key in keys if _holds_tensors(content.get(key))]
    weights = content[holders[0]] if holders else content
    if not _holds_tensors(weights):
        outer = next((content[key] for key in keys if _wraps_tensors(content.get(key), keys)), None)
        if outer is not None:
            return unwrap(outer, wrappers, expected, attributes)
        raise UserError(
            f"The checkpoint holds no weights, bare or under {_listed(wrappers)}; give {expected}, or a file that this "
            "program wrote."
        )
    other_keys = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    tensors = {PREFIX.sub("", name): value for name, value in weights.items() if isinstance(value, Tensor)}
    return _without_attribute(tensors, attributes), holders[1:] + other_keys


def _without_attribute(tensors: dict[str, Tensor], attributes: Sequence[str]) -> dict[str, Tensor]:
    """The tensors without the first word of their names, where this is one of `attributes` for the whole model."""
    words = {name.split(".")[0] for name in tensors} - set(BESIDE_THE_MODEL)
    if len(words) != 1 or not words <= set(attributes):
        return tensors
    prefix = f"{words.pop()}."
    return _without_attribute({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, attributes)


def select_kind(content: dict[str, Any], kind: str) -> tuple[dict[str, Any], list[str]]:
    """A foreign file's content with the kind of weights that `weights=` requests, and notes on a choice.

    With "ema" the moving average moves to "model", and no other weights are left. With "raw" the average is removed.
    "auto" leaves the content as it is, for `unwrap` to choose, and notes an average beside other weights. Raises
    UserError when the file does not hold the requested kind.
    """
    averages = [key for key in EMA_KEYS if _holds_tensors(content.get(key))]
    rest = {key: value for key, value in content.items() if key not in averages}
    has_raw = any(isinstance(value, Tensor) or _holds_tensors(value) for value in rest.values())
    if kind == "ema":
        if not averages:
            raise UserError(
                f"weights=ema, but this file of another program holds no averaged weights under {_listed(EMA_KEYS)}; "
                "leave weights= out to take the weights that it holds."
            )
        others = {k: v for k, v in rest.items() if not isinstance(v, Tensor) and not _holds_tensors(v)}
        return {**others, "model": content[averages[0]]}, [f'averaged weights (EMA), under "{averages[0]}" in the file']
    if kind == "raw":
        if not has_raw:
            raise UserError("weights=raw, but this file holds averaged weights only; leave weights= out.")
        return rest, []
    notes = [f'the file also holds averaged weights under "{averages[0]}"; weights=ema takes them'] if averages else []
    return content, notes if has_raw else []


def floats(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert tensors of half types to fp32."""
    half = (torch.float16, torch.bfloat16)
    return {name: tensor.float() if tensor.dtype in half else tensor for name, tensor in tensors.items()}


def _holds_tensors(content: Any) -> bool:
    return isinstance(content, dict) and any(isinstance(value, Tensor) for value in content.values())


def _wraps_tensors(content: Any, keys: Sequence[str]) -> bool:
    return isinstance(content, dict) and any(_holds_tensors(content.get(key)) for key in keys)


def _listed(keys: Sequence[str]) -> str:
    quoted = [f'"{key}"' for key in keys]
    return " or ".join(filter(None, (", ".join(quoted[:-1]), quoted[-1])))
