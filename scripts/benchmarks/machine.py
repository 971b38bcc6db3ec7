"""Describe the machine on which a benchmark runs, and list the versions of the packages that benchmarks use."""

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
    "gensim",
    "timm",
    "ctranslate2",
    "openvino",
    "nncf",
    "onnxruntime",
    "pillow",
    "scipy",
    "numpy",
)
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
# The machine counts as busy if its load average of the last minute is above this value. The load average is the mean
# number of running or waiting processes.
MAX_IDLE_LOAD = 0.5


def describe(device: torch.device) -> dict[str, Any]:
    """Return a dict that describes the machine.

    cpu: the model name and those of the instruction sets INSTRUCTIONS that the CPU has.
    cores: the number of logical cores.
    threads: PyTorch's number of CPU threads.
    device: the name of `device`.
    load: the load average of the last minute; None if the system does not report it.
    system: the operating system and its version.
    """
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
    """Return warnings about conditions that make the times in a report unreliable.

    `machine` is the result of `describe`. The list has one warning if the machine was busy when `describe` was called;
    otherwise it is empty.
    """
    load = machine["load"]
    if load is None or load <= MAX_IDLE_LOAD:
        return []
    return [f"The machine was busy at the start (load {load:.2f}); times may be too long and their spread too wide."]


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages among PACKAGES: name -> version."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
