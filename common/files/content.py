"""Check a checkpoint's content: the types of the fields in Triptych's files, and the kind of each tensor in any file.

Two fields are checked more closely elsewhere: the task's state against `OptionalTask.state_schema`, and the config by
config/check.py.
"""

from collections.abc import Sequence
from typing import Annotated, Any, TypedDict

import torch
from torch import Tensor

from common.files import schema
from common.types import Count, Range

Weights = dict[str, Tensor]
Finite = Annotated[float, Range(low=-3e38, high=3e38)]  # a number of fp32
# TO_RESTORE: the fields that are needed to restore a model. TO_RESUME: the fields that are needed to resume a run,
# except `windows`, which `resume_mistake` also requires.
TO_RESTORE = ("step", "model", "average", "task", "config")
TO_RESUME = (*TO_RESTORE, "best", "optimizer", "scaler", "overflows", "window_steps")


class MovingAverage(TypedDict):
    """The moving average of the weights, as `Average.state_dict` returns it (train/ema.py)."""

    updates: Count
    weights: Weights


class Mean(TypedDict):
    """The steps of the checkpoints that were averaged, and whether EMA weights were averaged (train/averaging.py)."""

    steps: list[int]
    ema: bool


class Scaler(TypedDict):
    """The state of the gradient scaler of an fp16 run."""

    scale: float
    growth_factor: float
    backoff_factor: float
    growth_interval: Count
    _growth_tracker: Count


class Moments(TypedDict, total=False):
    """The optimizer's state of one parameter. Each optimizer has only some of these keys."""

    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    momentum_buffer: Tensor | None  # None without momentum


class Config(TypedDict, total=False):
    """The sections of a config."""

    model: dict[str, Any]
    data: dict[str, Any]
    task: dict[str, Any]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    trainer: dict[str, Any]


class Content(TypedDict, total=False):
    """The fields of a checkpoint.

    `train.state.checkpoint_content` writes all of them except `mean`, which train/averaging.py adds, `int8`, the ranges
    that train/calibration.py adds, and `window`, which only earlier versions wrote. Files of earlier versions lack some
    fields.
    """

    step: Count
    best: float | None
    ranking: list[tuple[float, int]]
    evaluations_since_best: Count
    model: Weights
    average: MovingAverage | None
    mean: Mean
    optimizer: dict[str, Any]
    scaler: dict[str, float]
    overflows: Count
    windows: list[Weights]
    window: dict[str, float]
    window_steps: Count
    said: list[str]
    lines: dict[str, int]
    task: dict[str, Any]
    samples: Count
    fingerprints: dict[str, dict[str, str]]
    teacher: str | None
    int8: dict[str, tuple[Finite, Finite]]
    config: Config


def first_mistake(content: dict[str, Any], required: Sequence[str] = ()) -> str | None:
    """Describe the first field that is missing or has a wrong type, as "step is null, expected a whole number".

    The result is None if there is no mistake. Fields in `required` must not be missing.
    """
    missing = [f"{name} is missing" for name in required if name not in content]
    if mistake := missing[0] if missing else schema.mistake(content, Content, ""):
        return mistake
    return schema.plain_mistake(content.get("config"), "config")


def resume_mistake(content: dict[str, Any]) -> str | None:
    """Describe the first mistake that prevents resuming a run from a loaded checkpoint.

    The mistake is a missing field, or a wrong type in `windows`, `scaler` or `optimizer`. The types of the other fields
    were checked by `first_mistake` when the file was loaded. The result is None if there is no mistake.
    """
    if missing := [f"{name} is missing" for name in TO_RESUME if name not in content]:
        return missing[0]
    if not content.get("windows") and "window" not in content:  # `window` is the field of earlier versions
        return "windows is missing, or empty"
    for sums in content.get("windows", []):
        if names := [name for name, value in sums.items() if value.numel() != 1 or value.is_complex()]:
            return f"windows.{names[0]} is a tensor of {tuple(sums[names[0]].shape)}, expected one number"
    scaler = schema.mistake(content["scaler"], Scaler, "scaler") if content["scaler"] else None  # empty without fp16
    return scaler or schema.mistake(content["optimizer"], dict[str, Moments], "optimizer")


def unusable_tensor(content: Any) -> str | None:
    """Describe an unusable tensor in nested containers, as "model.head, a sparse tensor".

    A tensor is unusable if it is sparse, nested, quantised or without content. If there are several, one of them is
    described. The result is None if all tensors can be used.
    """
    pending, visited = [("", content)], set[int]()
    while pending:
        name, value = pending.pop()
        if isinstance(value, Tensor) and (kind := _unusual_kind(value)):
            return f"{name}, {kind}"
        if isinstance(value, dict | list | tuple) and id(value) not in visited:  # a pickle may hold a cycle
            visited.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            pending += [(f"{name}.{key}" if name else f"{key}", item) for key, item in items]
    return None


def _unusual_kind(tensor: Tensor) -> str | None:
    if tensor.is_nested or tensor.layout != torch.strided:
        return "a nested tensor" if tensor.is_nested else "a sparse tensor"
    if tensor.is_quantized:
        return "a quantised tensor"
    return "a tensor without content (on the device meta)" if tensor.is_meta else None
