"""Where the numbers are computed, and how precisely."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from common.errors import UserError

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose(name: str, local_rank: int = 0) -> torch.device:
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


def only_deterministic(wanted: bool) -> None:
    """Let torch take algorithms alone that give the same bits each time; it raises where it has none for an operation.

    cuBLAS also wants CUBLAS_WORKSPACE_CONFIG in the environment, which the door sets.
    """
    torch.use_deterministic_algorithms(wanted)


def describe(device: torch.device) -> str:
    """A few words for the start of a run."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The one precision path of training, evaluation and prediction: fp32 is plain, the others are autocast."""
    return torch.autocast(device.type, TYPES[precision], enabled=precision != "fp32")


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`; lists and words stay as they are."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
