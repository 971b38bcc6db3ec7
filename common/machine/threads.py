"""Settings of OpenMP's threads, which it reads once, when torch is imported: they are made in the doors, before that.

A thread that waits for others usually spins. Beside another busy process the one that it waits for has no core, the
spinning ones hold theirs, and training may take more than twenty times as long; a thread that sleeps leaves its core.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")  # where Linux states the limits of a container


def missing_settings(environment: Mapping[str, str], count: bool = True) -> dict[str, str]:
    """The variables to add to `environment`, except those that the user has already set in it.

    Threads wait without spinning. Their number is OpenMP's own, one for each core that this process may use, unless a
    container's share of processor time is smaller, which OpenMP does not know: then it is that share, rounded up. With
    `count=False` their number is left alone.
    """
    settings = {"OMP_WAIT_POLICY": "passive"}
    share = _processor_share(CGROUPS)
    if count and share is not None and share < _cores():
        settings["OMP_NUM_THREADS"] = str(max(1, math.ceil(share)))
    return {name: value for name, value in settings.items() if name not in environment}


def _cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor_share(folder: Path) -> float | None:
    """The cores' worth of time that a container may use: 1.5 for `docker run --cpus 1.5`; None if it is unlimited.

    Reads cpu.max of the second version of Linux's control groups, or the two files of the first.
    """
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text("utf-8").split()
        else:
            quota, period = ((folder / "cpu" / f"cpu.cfs_{name}_us").read_text("utf-8") for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError):  # "max" instead of a number, or a system without these files
        return None
