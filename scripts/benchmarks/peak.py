"""Peak memory that a contender needs beside its weights and inputs, which exist before it is called.

It is the peak during a contender's second call minus the memory in use before its first. It includes working memory and
what the first call leaves for the next (an optimizer's moments, gradients, weights packed for a kernel), but not what
only the first call needs. On CUDA it is the memory given out by PyTorch's allocator. On Linux it is the process's
anonymous memory, without libraries and files, whether PyTorch, CTranslate2, NumPy, PIL or torch.compile's compiler
allocated it; differences below about 10 MiB mean nothing. Elsewhere it is not measured.
"""

import ctypes
import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from scripts.benchmarks.timing import Row, Setting

PROC_SELF = Path("/proc/self")
# With this setting glibc returns each larger block to the system when it is freed. By default it soon keeps freed
# blocks, and they count as used even where the next allocation does not fit into them.
MALLOC_SETTING = ("MALLOC_MMAP_THRESHOLD_", "1000000")


def measure_peaks(build: Callable[[Setting], Row], setting: Setting) -> dict[str, int]:
    """Build a row and measure its contenders' peaks in bytes; empty where they cannot be measured.

    On the CPU this runs in a separate process, to which `build` is pickled.
    """
    if setting.device.type == "cuda":
        return _row_peaks(build(setting), setting.device)
    if setting.device.type != "cpu" or not _is_measurable():
        return {}
    with _environment(*MALLOC_SETTING), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_in_process, build, setting, torch.get_num_threads()).result()


def _in_process(build: Callable[[Setting], Row], setting: Setting, threads: int) -> dict[str, int]:
    torch.set_num_threads(threads)
    return _row_peaks(build(setting), setting.device)


def _row_peaks(row: Row, device: torch.device) -> dict[str, int]:
    """Peaks in bytes of contenders that have not been called yet."""
    with row.use_threads():
        return {name: peak_bytes(work, device) for name, work in row.contenders.items()}


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The peak memory during the second call of `work` minus the memory before its first call."""
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
    (PROC_SELF / "clear_refs").write_text("5")  # resets the high-water mark (man 5 proc)
    work()
    # The high-water mark includes mapped files, which the first call maps and no call unmaps.
    return max(_status_bytes("VmHWM") - _status_bytes("RssFile") - _status_bytes("RssShmem") - initial, 0)


def _is_measurable() -> bool:
    """Whether Linux reports the peak and glibc can return free memory."""
    try:
        (PROC_SELF / "clear_refs").write_text("5")
        return hasattr(ctypes.CDLL(None), "malloc_trim") and _status_bytes("RssAnon") > 0
    except (OSError, KeyError):
        return False


def _trim_heap() -> None:
    """Return free memory to the system; memory kept for reuse would hide a later call's need."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(name: str) -> int:
    lines = (PROC_SELF / "status").read_text(encoding="utf-8").splitlines()
    kibibytes: str = {line.partition(":")[0]: line.partition(":")[2] for line in lines}[name]
    return 1024 * int(kibibytes.split()[0])


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for processes that start inside the block."""
    previous = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if previous is not None:
            os.environ[name] = previous
