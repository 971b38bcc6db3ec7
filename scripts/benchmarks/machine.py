"""Where a benchmark was measured: what a reader needs to judge its numbers."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from common.machine import device as devices

PACKAGES = (
    "pycocotools",
    "faster-coco-eval",
    "torch",
    "torchvision",
    "transformers",
    "timm",
    "ctranslate2",
    "pycocotools",
    "faster-coco-eval",
    "pillow",
    "scipy",
    "numpy",
)
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
BUSY = 0.5  # mean number of processes that ran or waited in the last minute


def describe(device: torch.device) -> dict[str, Any]:
    """The processors and the system; the load says whether they were idle when it began (None: not known)."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    said = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    flags = [flag for flag in INSTRUCTIONS if flag in said.get("flags", "").split()]
    return {
        "cpu": " ".join([said.get("model name", platform.processor() or platform.machine()), *flags]),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": devices.describe(device),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
    }


def warnings(machine: dict[str, Any]) -> list[str]:
    """What makes its numbers doubtful, a sentence each."""
    load = machine["load"]
    if load is None or load <= BUSY:
        return []
    return [f"The machine was busy when this began (load {load:.2f}), so times may be too long and spread too wide."]


def versions() -> dict[str, str]:
    """Of Python and of the packages that take part, of those that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
