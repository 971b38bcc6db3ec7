"""Peak memory that a contender needs in addition to its weights and inputs, which exist before the contender is called.

The peak memory is the highest memory use during the contender's second call minus the memory in use before the first.
It includes temporary memory and what the first call keeps for later calls (an optimizer's moments, gradients, packed
weights), but not what only the first call needs. On CUDA, the memory that PyTorch's allocator has given out is
measured. On the CPU under Linux, the process's anonymous memory is measured: memory from PyTorch, CTranslate2, NumPy,
PIL and compilers alike, but no libraries or mapped files; differences below about 10 MiB are noise. On other systems
nothing is measured.
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
# With this setting, glibc returns every freed block of 1 MB or more to the system. By default it keeps more and more
# freed blocks, which count as memory in use although the next allocation may not fit into them.
MALLOC_SETTING = ("MALLOC_MMAP_THRESHOLD_", "1000000")


def measure_peaks(build: Callable[[Setting], Row], setting: Setting) -> dict[str, int]:
    """Build a row and measure its contenders' peak memory in bytes; returns {} where it cannot be measured.

    On the CPU, building and measuring take place in a separate process, to which `build` is pickled.
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
    """The peak memory in bytes of each contender of a row; none of them has been called yet."""
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
    # VmHWM includes mapped files. The first call has mapped all of them, so their present size can be subtracted.
    return max(_status_bytes("VmHWM") - _status_bytes("RssFile") - _status_bytes("RssShmem") - initial, 0)


def _is_measurable() -> bool:
    """Whether this is a Linux that can reset and report the peak, with a glibc that can return freed memory."""
    try:
        (PROC_SELF / "clear_refs").write_text("5")
        return hasattr(ctypes.CDLL(None), "malloc_trim") and _status_bytes("RssAnon") > 0
    except (OSError, KeyError):
        return False


def _trim_heap() -> None:
    """Return freed memory to the system; if a later call reused it, the peak would not show what that call needs."""
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
