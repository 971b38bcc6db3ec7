"""Extract the weights from another program's file: remove wrappers and prefixes, convert half precision to fp32."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError

# Keys under which training programs store the moving average of the weights.
EMA_KEYS = ("model_ema", "state_dict_ema", "ema_model", "ema_state_dict", "ema")
# Keys under which training programs store the weights, such as Lightning's state_dict and DeepSpeed's module.
COMMON_WRAPPERS = ("state_dict", "module", "model_state_dict")
# The prefix that DataParallel ("module.") and torch.compile ("_orig_mod.") add to tensor names. It may follow the name
# of the attribute ("model." or "net.") in which a LightningModule keeps the model.
PREFIX = re.compile(r"^(?:(?:model|net)\.)?(?:module\.|_orig_mod\.)+")
BESIDE_THE_MODEL = ("criterion",)  # first words of the names of tensors that a LightningModule keeps beside its model


def unwrap(
    content: dict[str, Any], wrappers: Sequence[str], expected: str, attributes: Sequence[str] = ("net",)
) -> tuple[dict[str, Tensor], list[str]]:
    """Return a file's tensors, and the keys of other sets of weights and of entries that are not tensors.

    The tensors are looked up under the keys `wrappers` and COMMON_WRAPPERS of `content`; the first of these keys that
    holds tensors is used. If none does, the tensors in `content` itself are used or, if there are none either, those
    one level deeper: content[key][key2], where both keys are among the ones above.

    The second result lists what is left out: the other keys above that hold tensors, and the entries beside the
    returned tensors that are not tensors.

    Prefixes of DataParallel and torch.compile are removed from the names. A LightningModule keeps the model in an
    attribute, so all names of the model begin with the attribute's name. If this name is one of `attributes`, it is
    removed, too. By default, "model" is not among `attributes`, because in some layouts all names begin with "model."
    without a LightningModule.

    Raises UserError if there are no weights, or if a tensor's key is not a string. The message asks for `expected`.
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
    if unnamed := [name for name, value in weights.items() if isinstance(value, Tensor) and not isinstance(name, str)]:
        raise UserError(f"The checkpoint holds a tensor under {unnamed[0]!r} and not under a name; give {expected}.")
    other_keys = [str(name) for name, value in weights.items() if not isinstance(value, Tensor)]
    tensors = {PREFIX.sub("", name): value for name, value in weights.items() if isinstance(value, Tensor)}
    return _without_attribute(tensors, attributes), holders[1:] + other_keys


def _without_attribute(tensors: dict[str, Tensor], attributes: Sequence[str]) -> dict[str, Tensor]:
    """Remove the first word of all names if it is the same in all names of the model and is one of `attributes`.

    This is repeated with the shorter names. A word is a part of a name between dots. Names whose first word is in
    BESIDE_THE_MODEL do not belong to the model, and are not shortened.
    """
    words = {name.split(".")[0] for name in tensors} - set(BESIDE_THE_MODEL)
    if len(words) != 1 or not words <= set(attributes):
        return tensors
    prefix = f"{words.pop()}."
    return _without_attribute({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, attributes)


def select_kind(content: dict[str, Any], kind: str) -> tuple[dict[str, Any], list[str]]:
    """Select raw or averaged weights in the content of another program's file; `kind` is the value of weights=.

    Returns the content and notes for the user. With "ema", the moving average is returned under the key "model", and
    all other weights are removed. With "raw", all averages are removed. With "auto", the content stays as it is, and
    `unwrap` chooses later; if the file holds both an average and other weights, a note says so. Raises UserError if the
    file does not hold the requested kind.
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
    """Convert tensors in fp16 and bf16 to fp32; other tensors are returned unchanged."""
    half = (torch.float16, torch.bfloat16)
    return {name: tensor.float() if tensor.dtype in half else tensor for name, tensor in tensors.items()}


def _holds_tensors(content: Any) -> bool:
    return isinstance(content, dict) and any(isinstance(value, Tensor) for value in content.values())


def _wraps_tensors(content: Any, keys: Sequence[str]) -> bool:
    return isinstance(content, dict) and any(_holds_tensors(content.get(key)) for key in keys)


def _listed(keys: Sequence[str]) -> str:
    quoted = [f'"{key}"' for key in keys]
    return " or ".join(filter(None, (", ".join(quoted[:-1]), quoted[-1])))
