"""Settings of OpenMP's threads, and the number of workers that load data.

OpenMP reads its settings when torch is imported, so every program makes them first.

A thread that waits for other threads usually spins, which keeps its core busy. If another process needs the machine's
cores as well, the thread that is waited for may have no core, and training may take more than twenty times as long. A
thread that sleeps while it waits leaves its core to others, but waking it takes longer than most waits. Here threads
spin for a fraction of a millisecond, which is longer than most waits, and then sleep.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

SPINS = 8000  # rounds of GNU's OpenMP, that of torch on Linux, before a thread sleeps: about 0.15 to 0.4 ms
MAX_AUTO_WORKERS = 16  # each one holds four batches in memory
CGROUPS = Path("/sys/fs/cgroup")  # where Linux states the limits of a container


def missing_settings(environment: Mapping[str, str], count: bool = True) -> dict[str, str]:
    """The variables to add to `environment`, except those that the user has already set in it.

    With the variables, threads sleep after a short wait, unless the user has chosen a policy. By default, OpenMP starts
    one thread for each core that this process may use. If a container limits processor time to fewer cores, which
    OpenMP does not know, the variables set the number of threads to this limit, rounded up; with `count=False`, they
    never set the number.
    """
    settings = {} if "OMP_WAIT_POLICY" in environment else {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": str(SPINS)}
    share = _processor_share(CGROUPS)
    if count and share is not None and share < _cores():
        settings["OMP_NUM_THREADS"] = str(max(1, math.ceil(share)))
    return {name: value for name, value in settings.items() if name not in environment}


def worker_count(workers: int | Literal["auto"], processes: int) -> int:
    """The number of workers that load data for one of `processes` on this machine.

    `auto` is the number of cores that this process may use, divided by `processes`, and at most MAX_AUTO_WORKERS.
    """
    if workers != "auto":
        return workers
    share = _processor_share(CGROUPS)
    cores = _cores() if share is None else min(_cores(), max(1, int(share)))
    return min(MAX_AUTO_WORKERS, cores // processes)


def _cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor_share(folder: Path) -> float | None:
    """The processor time that a container may use, in cores: 1.5 for `docker run --cpus 1.5`; None if unlimited.

    Reads cpu.max of version 2 of Linux's control groups, or the two files of version 1.
    """
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text("utf-8").split()
        else:
            quota, period = ((folder / "cpu" / f"cpu.cfs_{name}_us").read_text("utf-8") for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError):  # "max" instead of a number, or a system without these files
        return None
