"""What comparisons of a model with another program share: the file, the config's keys, differences, and the report."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.files import checkpoint

# What differs is the order of fp32 sums: 7e-7 of the largest logit in ViT-B/16. GELU by tanh instead of exact would
# give 2e-4 there, and eps 1e-5 instead of 1e-6 2e-5, but both sides have the same; a misplaced tensor gives more.
TOLERANCE = 1e-4


def absolute(ours: Tensor, expected: Tensor) -> float:
    """The largest difference; infinite when shapes differ or anything is no number."""
    if ours.shape != expected.shape or not torch.isfinite(ours).all():
        return float("inf")
    return float((ours - expected).abs().max())


def relative(ours: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest deviation from the mean, which a shared bias does not hide.

    Infinite when shapes differ or anything is no number.
    """
    scale = float((expected - expected.mean()).abs().max())
    return absolute(ours, expected) / (scale or 1.0)


def foreign(path: Path) -> dict[str, Any]:
    """The content of a file that another program wrote; raises UserError for one of ours."""
    content = checkpoint.load(path)
    if checkpoint.is_ours(content):
        raise UserError(
            f"{path} was written by this program; give a file of another one, which it can be compared with."
        )
    return content


def refuse_another_model(path: Path, options: dict[str, Any], needed: Iterable[tuple[str, Any]]) -> None:
    """Raise UserError with the overrides that are missing, where `model` of the config is not as the file needs it."""
    wrong = [override(f"model.{key}", value) for key, value in needed if value != option(options, key)]
    if wrong:
        raise UserError(f"{path} holds another model than the config describes; give {' '.join(wrong)}.")


def option(options: dict[str, Any], key: str) -> Any:
    """The value of a dotted key."""
    value: Any = options
    for part in key.split("."):
        value = value[part]
    return value


def override(key: str, value: Any) -> str:
    """A key and its value as the command line takes them."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def report(rows: Iterable[tuple[str, str]], *, same: bool) -> str:
    """Names and what they tell, and the verdict."""
    lines = [f"{name:12}{words}" for name, words in rows]
    return "\n".join([*lines, f"{'same answers' if same else 'OTHER ANSWERS'}: the limit is {TOLERANCE:g}"])
