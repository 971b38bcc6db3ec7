"""Peak memory: what a contender needs beside its weights and inputs.

It is the peak of a contender's second call over what lay there before its first. So it holds what a call works with and
what the first call left for the next (an optimizer's moments, gradients, weights in a kernel's order), and not what the
first call did once. On CUDA it is what PyTorch's allocator gave out; on Linux it is the process's own memory, libraries
and files left out, whoever took it: PyTorch, CTranslate2, NumPy or PIL. Elsewhere it is not known.
"""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from scripts.benchmarks.timing import Row

SELF = Path("/proc/self")


def peaks(row: Row, device: torch.device) -> dict[str, int]:
    """Bytes, by contender; of a row that is new, since it is called before the contenders' first calls."""
    with row.threaded():
        found = {name: peak(work, device) for name, work in row.contenders.items()}
    return {name: taken for name, taken in found.items() if taken is not None}


def peak(work: Callable[[], object], device: torch.device) -> int | None:
    """Bytes at the peak of the second call over those before the first; None where that is not known."""
    if device.type == "cuda":
        return _on_cuda(work, device)
    if device.type == "cpu" and _is_known():
        return _on_cpu(work)
    return None


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
