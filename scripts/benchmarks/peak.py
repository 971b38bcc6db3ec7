"""Measure the peak memory that a contender needs in addition to its weights and inputs.

Weights and inputs exist before the contender is called. The peak memory is the highest memory use during the
contender's second call, minus the memory in use before its first call. It includes temporary memory, and what the first
call keeps for later calls: an optimizer's moments, gradients, packed weights. It excludes what only the first call
needs.

On CUDA, the memory that PyTorch's allocator has allocated is measured. On the CPU under Linux with glibc, the process's
anonymous memory is measured. This includes the memory of PyTorch, CTranslate2, NumPy, PIL and compilers, and excludes
the code of libraries and mapped files. Differences below about 10 MiB are noise. On other systems and devices, nothing
is measured.
"""

import ctypes
import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from scripts.benchmarks.timing import Row, Setting

PROC_SELF = Path("/proc/self")
# With this setting, glibc returns every freed block of 1 MB or more to the system at once. By default, glibc raises
# this threshold while the program runs, and keeps freed blocks that are smaller. Blocks that are kept count as memory
# in use, although the next allocation may not fit into them.
MALLOC_SETTING = ("MALLOC_MMAP_THRESHOLD_", "1000000")


def measure_peaks(build: Callable[[Setting], Row], setting: Setting) -> dict[str, int]:
    """Build a benchmark and measure the peak memory of each contender; returns contender -> bytes.

    Returns {} where peak memory cannot be measured. On the CPU, the benchmark is built and measured in a separate
    process, so `build` must be picklable.
    """
    if setting.device.type == "cuda":
        return _row_peaks(build(setting), setting.device)
    if setting.device.type != "cpu" or not _is_measurable():
        return {}
    with _environment(*MALLOC_SETTING), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_in_process, build, replace(setting, in_process=True), torch.get_num_threads()).result()


def _in_process(build: Callable[[Setting], Row], setting: Setting, threads: int) -> dict[str, int]:
    torch.set_num_threads(threads)
    return _row_peaks(build(setting), setting.device)


def _row_peaks(row: Row, device: torch.device) -> dict[str, int]:
    """Measure the peak memory of each contender in bytes. No contender may have been called before."""
    with row.use_threads():
        return {name: peak_bytes(work, device) for name, work in row.contenders.items()}


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Return the peak memory during the second call of `work` minus the memory before its first call, in bytes."""
    return _on_cuda(work, device) if device.type == "cuda" else _on_cpu(work)


def _on_cuda(work: Callable[[], object], device: torch.device) -> int:
    gc.collect()
    initial = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return int(torch.cuda.max_memory_allocated(device) - initial)


def _on_cpu(work: Callable[[], object]) -> int:
    _trim_heap()
    initial = _status_bytes("RssAnon")
    work()
    _trim_heap()
    (PROC_SELF / "clear_refs").write_text("5")  # resets VmHWM, the peak memory (man 5 proc)
    work()
    # VmHWM also counts mapped files and shared memory. The first call has mapped all of them, so their present size
    # equals their size at the peak, and it is subtracted.
    return max(_status_bytes("VmHWM") - _status_bytes("RssFile") - _status_bytes("RssShmem") - initial, 0)


def _is_measurable() -> bool:
    """Whether the system can reset and report this process's peak memory (Linux) and take back freed memory (glibc)."""
    try:
        (PROC_SELF / "clear_refs").write_text("5")
        return hasattr(ctypes.CDLL(None), "malloc_trim") and _status_bytes("RssAnon") > 0
    except (OSError, KeyError):
        return False


def _trim_heap() -> None:
    """Return freed memory to the system.

    Without this, the next call could reuse freed memory that counts as in use before the call, and the measured peak
    would be too low.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(name: str) -> int:
    lines = (PROC_SELF / "status").read_text(encoding="utf-8").splitlines()
    kibibytes: str = {line.partition(":")[0]: line.partition(":")[2] for line in lines}[name]
    return 1024 * int(kibibytes.split()[0])


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable inside the block, for processes that are started there."""
    previous = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if previous is not None:
            os.environ[name] = previous
