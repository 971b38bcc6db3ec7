"""Check the values of a checkpoint's weights against the model: kinds of numbers that no training writes, and NaN."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError

MAX_NAMES = 3


def refuse_other_kinds(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise UserError if the file holds another kind of numbers (boolean, integer, float, complex) than the model has.

    Copying into the model would convert, for example, integers to floats silently. Floats may have any precision, and
    the model's integers, which are counters, may be stored as any real numbers.
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
    """A sentence with the first names of tensors that hold NaN or infinite values; empty if there are none."""
    names = [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if not names:
        return []
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return [f"NaN or infinite values are in {', '.join(names[:MAX_NAMES])}{more}: what the model computes is worthless"]
