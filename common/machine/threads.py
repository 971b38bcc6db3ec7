"""Settings of OpenMP's threads, and the number of workers that load data.

OpenMP reads its settings when torch is imported, so the doors and most scripts set them before that import.

A thread that waits for another thread usually spins, which keeps its core busy. If other processes need cores as well,
there may be no core left for the other thread, and training may take more than twenty times as long. A thread that
sleeps while it waits leaves its core to others, but waking it takes longer than most waits. Therefore, threads here
spin for a fraction of a millisecond, which is longer than most waits, and then sleep.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

# Iterations of the loop in which a waiting thread of GNU's OpenMP (which torch uses on Linux) spins before it sleeps.
# They take about 0.15 to 0.4 ms.
SPINS = 8000
MAX_AUTO_WORKERS = 16  # each worker holds up to four batches in memory
CGROUPS = Path("/sys/fs/cgroup")  # where Linux states the limits of a container


def missing_settings(environment: Mapping[str, str], count: bool = True) -> dict[str, str]:
    """Return the OpenMP variables to add to `environment`; variables that it already holds are left out.

    OMP_WAIT_POLICY and GOMP_SPINCOUNT make threads sleep after a short wait; both are left out if the user has set
    OMP_WAIT_POLICY. OMP_NUM_THREADS is the number of threads. By default, OpenMP starts one thread for each core that
    this process may use. It does not know of a container's limit on processor time. If this limit is lower than the
    number of cores, OMP_NUM_THREADS is set to the limit, rounded up; with `count=False`, it is never set.
    """
    settings = {} if "OMP_WAIT_POLICY" in environment else {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": str(SPINS)}
    share = _processor_share(CGROUPS)
    if count and share is not None and share < _cores():
        settings["OMP_NUM_THREADS"] = str(max(1, math.ceil(share)))
    return {name: value for name, value in settings.items() if name not in environment}


def worker_count(workers: int | Literal["auto"], processes: int) -> int:
    """The number of workers that load data for each of the `processes` processes on this machine.

    `workers` is a number or "auto". For "auto", the number of cores that this process may use is divided by `processes`
    and rounded down. If a container's limit on processor time is lower than this number of cores, the limit is divided
    instead. The result is at most MAX_AUTO_WORKERS. With 0 workers, each process loads its data itself.
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

    It is read from cpu.max in version 2 of Linux's control groups, or from two files in version 1.
    """
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text("utf-8").split()
        else:
            quota, period = ((folder / "cpu" / f"cpu.cfs_{name}_us").read_text("utf-8") for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError):  # "max" instead of a number, or a system without these files
        return None
