"""Where the numbers are computed, and how precisely."""

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

from common.errors import UserError

Precision = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def select(name: str, local_rank: int = 0) -> torch.device:
    """The device for `trainer.device`: auto is CUDA when there is one and else the CPU; Apple's GPU only by name.

    Raises UserError when the device asked for is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("trainer.device=cuda, but PyTorch sees no CUDA GPU here; use trainer.device=auto or cpu.")
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank + 1} of this machine has no GPU: there are {torch.cuda.device_count()}; start as "
                "many processes as GPUs (--nproc-per-node), or use trainer.device=cpu."
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("trainer.device=mps, but PyTorch sees no Apple GPU here; use trainer.device=auto or cpu.")
    return torch.device(name)


def describe(device: torch.device) -> str:
    """A few words for the start of a run."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def resolve_precision(name: Precision, device: torch.device) -> Precision:
    """What `trainer.precision` means on a device: auto is bf16 where its processor multiplies in it, and else fp32.

    Where it does not, PyTorch's bf16 is fp32 with detours, and slower than fp32 itself.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and _multiplies_bf16() else "fp32"


def _multiplies_bf16() -> bool:
    """Whether this processor has instructions for it."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # newer versions have it
    asks = (getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("avx512_bf16", "amx_tile"))
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")) or any(ask() for ask in asks)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The one precision path of training, evaluation and prediction: fp32 is plain, the others are autocast."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def compute_dtype(device: torch.device) -> torch.dtype:
    """What products are computed in just now, so that their inputs may as well be: autocast's type, or fp32."""
    enabled = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else torch.float32


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Where autocast leaves types alone, for what half precision would spoil."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


class DeviceCopier:
    """Copies between host and device; with a GPU on a stream of their own, beside what it computes."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batches: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches on the device, one after another, each while the one before is computed with.

        The first may go while the device is still at the step before, if its memory is pinned.
        """
        if self._stream is None:
            yield from (to_device(batch, self.device) for batch in batches)
            return
        computing, ahead = torch.cuda.current_stream(self.device), deque[dict[str, Any]]()
        for number, batch in enumerate(batches):
            with torch.cuda.stream(self._stream):
                ahead.append(to_device(batch, self.device))
            if number:
                yield _handed_over(ahead.popleft(), self._stream, computing)
        yield from (_handed_over(batch, self._stream, computing) for batch in ahead)

    def to_host(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """The tensor on the host, and the event at which it has arrived there; None: it has."""
        if not tensor.is_cuda:
            return tensor.cpu(), None
        copy = tensor.to("cpu", non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return copy, arrived


def _handed_over(batch: dict[str, Any], copying: torch.cuda.Stream, computing: torch.cuda.Stream) -> dict[str, Any]:
    computing.wait_stream(copying)
    for tensor in batch.values():
        if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
            tensor.record_stream(computing)  # or its memory would be given away while it is read
    return batch


def constant(values: Any, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Numbers as a tensor on the device of `like`, for which the host does not wait, as it would in torch.tensor."""
    return torch.tensor(values, dtype=dtype).to(like.device, non_blocking=True)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`; lists and words stay as they are."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
