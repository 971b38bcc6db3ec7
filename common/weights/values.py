"""Check the values of a checkpoint's weights: refuse kinds of numbers that the model does not have, and report NaN."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError

MAX_NAMES = 3  # maximum number of tensors that the note names; it also counts the others


def refuse_other_kinds(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise UserError if a tensor has another kind of numbers than the model's tensor of the same name.

    Without this check, copying the tensors into the model would silently convert integers to floats, for example. Where
    the model has floats, `tensors` must have floats of any precision. Where the model has complex numbers, they must
    have complex numbers. Where the model has integers (counters) or booleans, they may have any real numbers.
    """
    for name, ours in model.state_dict().items():
        theirs = tensors.get(name)
        if theirs is None:
            continue
        floats = ours.is_floating_point() and not theirs.is_floating_point()
        if floats or theirs.is_complex() != ours.is_complex():
            kinds = f"{str(theirs.dtype).removeprefix('torch.')}, expected {str(ours.dtype).removeprefix('torch.')}"
            raise UserError(f"{path} holds {name} as {kinds}; give a file of weights as they were trained.")


def non_finite_note(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return a list with one sentence that names floating-point tensors with NaN or infinite values.

    The list is empty if there are no such tensors.
    """
    names = [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if not names:
        return []
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return [f"NaN or infinite values are in {', '.join(names[:MAX_NAMES])}{more}: what the model computes is worthless"]
