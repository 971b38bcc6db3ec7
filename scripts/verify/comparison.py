"""Functions for comparisons with another program: load its file, check config keys, measure differences, report."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.files import checkpoint
from common.weights.unwrapping import select_kind

# The largest `relative_difference` at which outputs agree. In ViT-B/16, another order of fp32 sums changes logits by
# 7e-7 of the largest logit, and a misplaced tensor changes them by more than 1e-4. The tanh approximation of GELU
# changes them by 2e-4 (above the limit), and an eps of 1e-5 instead of 1e-6 by 2e-5 (below it). A wrong option is not
# noticed if both models take it from the config.
TOLERANCE = 1e-4


def absolute_difference(ours: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference of two corresponding elements.

    The result is infinite if the shapes differ or if `ours` is not finite everywhere.
    """
    if ours.shape != expected.shape or not torch.isfinite(ours).all():
        return float("inf")
    return float((ours - expected).abs().max())


def relative_difference(ours: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference, divided by the largest deviation of `expected` from its mean.

    An offset common to all expected values does not change this divisor. If the divisor is zero, the difference is not
    divided. The result is infinite if the shapes differ or if `ours` is not finite everywhere.
    """
    scale = float((expected - expected.mean()).abs().max())
    return absolute_difference(ours, expected) / (scale or 1.0)


def load_foreign(path: Path, weights: str = "auto") -> dict[str, Any]:
    """Load another program's file, select its raw or averaged weights, and return its content.

    `weights` is "raw", "ema" (averaged), or "auto", which leaves the content as it is (see `select_kind`). Raises
    UserError for a file that this program wrote, and for a file without the requested weights.
    """
    content = checkpoint.load(path)
    if checkpoint.is_ours(content):
        raise UserError(
            f"{path} was written by this program; give a file of another program, to compare the two programs."
        )
    try:
        return select_kind(content, weights)[0]
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def check_options(path: Path, options: dict[str, Any], required: Iterable[tuple[str, Any]]) -> None:
    """Raise UserError if `options`, the section `model` of the config, differ from `required`.

    `required` holds pairs of a dotted key and its value. The message lists the overrides that correct the config.
    """
    overrides = [override(f"model.{key}", value) for key, value in required if value != option(options, key)]
    if overrides:
        raise UserError(f"{path} holds another model than the config describes; give {' '.join(overrides)}.")


def option(options: dict[str, Any], key: str) -> Any:
    """Return the value of the dotted key `key` in nested options."""
    value: Any = options
    for part in key.split("."):
        value = value[part]
    return value


def override(key: str, value: Any) -> str:
    """Format a key and its value as an override on the command line, key=value."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"


def report(rows: Iterable[tuple[str, str]], *, agree: bool) -> str:
    """Format a line for each (name, text) of `rows`, and a last line that says whether outputs agree, and the limit."""
    lines = [f"{name:12}{text}" for name, text in rows]
    return "\n".join([*lines, f"{'outputs agree' if agree else 'OUTPUTS DIFFER'}: the limit is {TOLERANCE:g}"])
