"""Devices, precisions, and copies between host and device."""

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

from common.errors import UserError
from common.machine import allocation

Precision = Literal["auto", "fp32", "bf16", "fp16", "int8"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def select(name: str, local_rank: int = 0) -> torch.device:
    """The device for `trainer.device`: "auto" is CUDA if available, else the CPU; only "mps" selects Apple's GPU.

    Of several CUDA GPUs, the one with the number `local_rank` is selected. If the CPU is selected, this process keeps
    freed memory from then on (allocation.py). Raises UserError if the requested device is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("trainer.device=cuda, but PyTorch sees no CUDA GPU here; use trainer.device=auto or cpu.")
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank + 1} of this machine has no GPU: there are {torch.cuda.device_count()}; start "
                "one process per GPU (--nproc-per-node), or use trainer.device=cpu."
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("trainer.device=mps, but PyTorch sees no Apple GPU here; use trainer.device=auto or cpu.")
    if name == "cpu":
        allocation.keep_freed_memory()
    return torch.device(name)


def describe(device: torch.device) -> str:
    """The device's name, and for a CPU its number of threads, for the lines that a run prints at its start."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def resolve_precision(name: Precision, device: torch.device) -> Precision:
    """Resolve `trainer.precision`: auto is bf16 if the CPU or CUDA GPU has instructions for it, else fp32.

    Without such instructions, PyTorch emulates bf16 in fp32, which is slower than fp32 itself. A name other than auto
    is returned unchanged.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and _cpu_has_bf16() else "fp32"


def _cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for matrix products in bf16: AVX-512 BF16 or AMX."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # in newer versions of torch
    checks = (getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("avx512_bf16", "amx_tile"))
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")) or any(check() for check in checks)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """A context in which training, evaluation and prediction run: autocast to `precision`, disabled for fp32.

    For int8, which only quantised maps compute in, it is the context for auto.
    """
    if precision == "int8":
        precision = resolve_precision("auto", device)
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which matrix products on `device` are now computed: autocast's if it is enabled, else fp32."""
    enabled = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else torch.float32


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """A context without autocast, for computations that would be too inexact in bf16 or fp16."""
    # Exported graphs are traced in fp32, and nested contexts are beyond torch.export (torch 2.15).
    available = torch.amp.is_autocast_available(device.type) and not torch.compiler.is_exporting()
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


class DeviceCopier:
    """Copies batches to the device and tensors to the host.

    Batches are copied to a CUDA GPU in a separate CUDA stream, so that the GPU can compute during the copy.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batches: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the batches on the device, in order.

        On a CUDA GPU, the copy of a batch is started before the previous batch is yielded, so that a batch is copied
        while the previous one is in use. If the first batch is in pinned memory, it is copied while the GPU still
        computes what was queued before this call.
        """
        if self._stream is None:
            yield from (to_device(batch, self.device) for batch in batches)
            return
        compute_stream, prefetched = torch.cuda.current_stream(self.device), deque[dict[str, Any]]()
        for number, batch in enumerate(batches):
            with torch.cuda.stream(self._stream):
                prefetched.append(to_device(batch, self.device))
            if number:
                yield _synchronised(prefetched.popleft(), self._stream, compute_stream)
        yield from (_synchronised(batch, self._stream, compute_stream) for batch in prefetched)

    def to_host(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Copy a tensor to the host; returns the copy, and a CUDA event that marks the completion of the copy.

        The caller must synchronise with the event before it reads the copy. For a tensor that is not on a CUDA GPU, the
        copy is already complete, and the event is None.
        """
        if not tensor.is_cuda:
            return tensor.cpu(), None
        copy = tensor.to("cpu", non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return copy, copied


def _synchronised(batch: dict[str, Any], copy: torch.cuda.Stream, compute: torch.cuda.Stream) -> dict[str, Any]:
    """Make the stream `compute` wait until the stream `copy` has copied the batch; returns the batch."""
    compute.wait_stream(copy)
    for tensor in batch.values():
        if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
            tensor.record_stream(compute)  # otherwise the tensor's memory could be reused before `compute` reads it
    return batch


def constant(values: Any, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Copy `values` as a tensor to the device of `like`, without blocking the host.

    `torch.tensor(values, device=like.device)` would block.
    """
    return torch.tensor(values, dtype=dtype).to(like.device, non_blocking=True)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Copy the tensors of a batch to `device`; other values are unchanged."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
