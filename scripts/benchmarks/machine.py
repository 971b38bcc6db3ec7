"""Describe the machine and the package versions of a benchmark."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from common.machine import device as devices

PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "timm",
    "ctranslate2",
    "pillow",
    "scipy",
    "numpy",
)
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
MAX_IDLE_LOAD = 0.5  # a load average (running or waiting processes) of the last minute; above it, the machine is busy


def describe(device: torch.device) -> dict[str, Any]:
    """Describe processors, threads, device, system, and the present load (None: unknown)."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    fields = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    flags = [flag for flag in INSTRUCTIONS if flag in fields.get("flags", "").split()]
    return {
        "cpu": " ".join([fields.get("model name", platform.processor() or platform.machine()), *flags]),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": devices.describe(device),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
    }


def warnings(machine: dict[str, Any]) -> list[str]:
    """Sentences for the reader about conditions that make the times unreliable."""
    load = machine["load"]
    if load is None or load <= MAX_IDLE_LOAD:
        return []
    return [f"The machine was busy at the start (load {load:.2f}); times may be too long and their spread too wide."]


def versions() -> dict[str, str]:
    """The versions of Python and of those PACKAGES that are installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
