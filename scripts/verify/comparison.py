"""Shared parts of comparing a model with another program: reading the file, config keys, differences, the report."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.files import checkpoint
from common.weights.unwrapping import select_kind

# Another order of fp32 sums gives 7e-7 of the largest logit in ViT-B/16. A tanh instead of the exact GELU gives 2e-4,
# eps 1e-5 instead of 1e-6 gives 2e-5, but both sides take these from the config; a misplaced tensor gives more.
TOLERANCE = 1e-4


def absolute_difference(ours: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; infinite if shapes differ or `ours` is not finite."""
    if ours.shape != expected.shape or not torch.isfinite(ours).all():
        return float("inf")
    return float((ours - expected).abs().max())


def relative_difference(ours: Tensor, expected: Tensor) -> float:
    """The largest difference divided by the largest deviation of `expected` from its mean.

    That scale ignores an offset common to all values. The result is infinite if shapes differ or `ours` is not finite.
    """
    scale = float((expected - expected.mean()).abs().max())
    return absolute_difference(ours, expected) / (scale or 1.0)


def load_foreign(path: Path, weights: str = "auto") -> dict[str, Any]:
    """Load a file that another program wrote, with its raw or averaged `weights`; raises UserError for one of ours."""
    content = checkpoint.load(path)
    if checkpoint.is_ours(content):
        raise UserError(
            f"{path} was written by this program; give a file of another program, with which it can be compared."
        )
    try:
        return select_kind(content, weights)[0]
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def check_options(path: Path, options: dict[str, Any], required: Iterable[tuple[str, Any]]) -> None:
    """Raise UserError with the missing overrides if `options` (the config's `model`) differ from `required`."""
    overrides = [override(f"model.{key}", value) for key, value in required if value != option(options, key)]
    if overrides:
        raise UserError(f"{path} holds another model than the config describes; give {' '.join(overrides)}.")


def option(options: dict[str, Any], key: str) -> Any:
    """The value of a dotted key in nested options."""
    value: Any = options
    for part in key.split("."):
        value = value[part]
    return value


def override(key: str, value: Any) -> str:
    """An override as the command line takes it: key=value."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def report(rows: Iterable[tuple[str, str]], *, agree: bool) -> str:
    """Format rows of (name, text), and the verdict in the last line."""
    lines = [f"{name:12}{text}" for name, text in rows]
    return "\n".join([*lines, f"{'outputs agree' if agree else 'OUTPUTS DIFFER'}: the limit is {TOLERANCE:g}"])
