"""Peak memory: what a contender needs beside its weights and inputs, which lie there from the start.

It is the peak of a contender's second call over what lay there before its first. So it holds what a call works with and
what the first call left for the next (an optimizer's moments, gradients, weights in a kernel's order), and not what the
first call did once. On CUDA it is what PyTorch's allocator gave out; on Linux it is the process's own memory, libraries
and files left out, whoever took it: PyTorch, CTranslate2, NumPy or PIL, and torch.compile's compiler; it begins to tell
contenders apart at some 10 MiB. Elsewhere it is not known.
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

SELF = Path("/proc/self")
# By this glibc gives every larger piece back as soon as it is free. Else it soon keeps them, and where the next piece
# does not go into the one before, both count.
RETURNED = ("MALLOC_MMAP_THRESHOLD_", "1000000")


def peaks(build: Callable[[Setting], Row], setting: Setting) -> dict[str, int]:
    """Bytes, by contender, of a row that is made anew; empty where they are not known.

    On the CPU that is done in a process of its own, for which `build` is pickled.
    """
    if setting.device.type == "cuda":
        return of(build(setting), setting.device)
    if setting.device.type != "cpu" or not _is_known():
        return {}
    with _environment(*RETURNED), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_in_process, build, setting, torch.get_num_threads()).result()


def _in_process(build: Callable[[Setting], Row], setting: Setting, threads: int) -> dict[str, int]:
    torch.set_num_threads(threads)
    return of(build(setting), setting.device)


def of(row: Row, device: torch.device) -> dict[str, int]:
    """Bytes, by contender, none of which has been called before."""
    with row.threaded():
        return {name: peak(work, device) for name, work in row.contenders.items()}


def peak(work: Callable[[], object], device: torch.device) -> int:
    """Bytes at the peak of the second call over those before the first."""
    return _on_cuda(work, device) if device.type == "cuda" else _on_cpu(work)


def _on_cuda(work: Callable[[], object], device: torch.device) -> int:
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return int(torch.cuda.max_memory_allocated(device) - before)


def _on_cpu(work: Callable[[], object]) -> int:
    _give_back()
    before = _status("RssAnon")
    work()
    _give_back()
    (SELF / "clear_refs").write_text("5")  # lets the high-water mark begin anew (man 5 proc)
    work()
    # The mark counts mapped files, too, which a first call maps and no call unmaps.
    return max(_status("VmHWM") - _status("RssFile") - _status("RssShmem") - before, 0)


def _is_known() -> bool:
    """Whether Linux tells the peak, and glibc gives back what is free."""
    try:
        (SELF / "clear_refs").write_text("5")
        return hasattr(ctypes.CDLL(None), "malloc_trim") and _status("RssAnon") > 0
    except (OSError, KeyError):
        return False


def _give_back() -> None:
    """Return free memory to the system: what is kept for later would hide that it is used."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int:
    lines = (SELF / "status").read_text(encoding="utf-8").splitlines()
    kibibytes: str = {line.partition(":")[0]: line.partition(":")[2] for line in lines}[name]
    return 1024 * int(kibibytes.split()[0])


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """For processes that start inside."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
