"""Describe what an evaluation's numbers were computed from: checkpoint, data, versions and command."""

import os
import platform
import sys
from importlib import metadata
from typing import Any

import torch

from common.config.diff import flatten
from common.config.paths import is_path
from common.files import names
from common.machine import distributed
from common.task import Split
from common.train import data_identity
from common.train.assembly import Components


def provenance(config: dict[str, Any], parts: Components, split: Split) -> dict[str, Any]:
    """Return the entries of evaluate.py's results.json that are not metrics.

    "checkpoint" is the absolute path of the weights' file. "weights" describes the weights: for a checkpoint of this
    program, its step and whether the weights are averaged. "files" holds the absolute paths in the config's section
    `data`. "digests" holds digests of the content of `split`, which identify the same data under other paths.
    """
    weights, *lines = parts.weights_line.removeprefix("weights").strip().splitlines()
    notes = [line.removeprefix("note").strip() for line in lines] + [*getattr(parts.task, "evaluation_notes", list)()]
    data_paths = {key: value for key, value in flatten({"data": config["data"]}).items() if is_path(key)}
    return {
        "checkpoint": os.path.abspath(parts.file or config["checkpoint"]),
        "weights": weights,
        "notes": notes,
        "split": split,
        "samples": parts.data.count(split),
        "files": {key: os.path.abspath(value) for key, value in data_paths.items() if isinstance(value, str)},
        "digests": data_identity.fingerprint_of(parts.data, split),
        "device": parts.device.type,
        "precision": parts.trainer.precision,
        "processes": distributed.world_size(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triptych": _own_version()},
        "command": names.shell_command(["torchrun" if distributed.world_size() > 1 else "python", *sys.argv]),
    }


def _own_version() -> str | None:
    """Return the installed version of this program; None if it runs without being installed."""
    try:
        return metadata.version("triptych")
    except metadata.PackageNotFoundError:
        return None
