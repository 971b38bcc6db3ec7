"""Report an out-of-memory error with the batch that caused it, and with advice on what to change."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from common.errors import UserError
from common.machine.threads import CGROUPS
from common.task import Batch

TRAINING_ADVICE = "lower trainer.micro_batch (the step remains the same), or set trainer.precision=bf16"
EVALUATION_ADVICE = "lower trainer.micro_batch (the numbers remain the same), or set trainer.precision=bf16"
UPDATE_ADVICE = (
    "use trainer.strategy=fsdp in several processes, optimizer.name=sgd, which has less state, or a smaller model"
)
SINGLE_SAMPLE_ADVICE = (
    "one sample alone is too much, so give smaller images or shorter texts, a smaller model, or more memory"
)
# torch 2.15 has a class only for the errors of CUDA's caching allocator. The texts of other out-of-memory errors
# contain one of these.
OUT_OF_MEMORY_MESSAGES = (
    "DefaultCPUAllocator",  # "can't allocate memory", or "not enough memory" on Windows and macOS
    "out of memory",  # the CUDA driver, and MPS
    "STATUS_ALLOC_FAILED",  # cuBLAS and cuDNN
)
MAX_LISTED_SAMPLES = 4  # in an error message; the message also counts the others


@contextmanager
def report_out_of_memory(what: str, batch: Batch, device: torch.device, advice: str) -> Iterator[None]:
    """A context that turns an out-of-memory error into a UserError.

    The error's sentence begins with `what`, such as "Step 12", states the shapes and sample ids of the batch, and ends
    with `advice`. For a batch of one sample, SINGLE_SAMPLE_ADVICE replaces any advice except UPDATE_ADVICE. Other
    errors propagate unchanged.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        advice = SINGLE_SAMPLE_ADVICE if len(batch["ids"]) == 1 and advice != UPDATE_ADVICE else advice
        raise UserError(f"{what} ran out of memory on {_usage(device)} with {describe(batch)}: {advice}.") from None


def capacity(device: torch.device) -> int | None:
    """The total memory of a device in bytes, used or not; None if the operating system does not state it.

    For a device other than a CUDA GPU, it is the machine's memory, or the container's limit if that is lower.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return None
    return min([machine, *_container_limits(CGROUPS)])


def _container_limits(folder: Path) -> list[int]:
    """A list with the container's memory limit in bytes, from version 2 or 1 of Linux's control groups.

    The list is empty if no limit is stated. Where there is no limit, version 1 states a very large number.
    """
    for file in (folder / "memory.max", folder / "memory" / "memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max" instead of a number
            return [int(file.read_text("utf-8"))]
    return []


def is_out_of_memory(error: Exception) -> bool:
    """Whether PyTorch, Python or the operating system raised `error` because memory ran out."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in OUT_OF_MEMORY_MESSAGES)


def describe(batch: Batch) -> str:
    """The shapes of a batch's tensors, largest first, and its samples: "images (2, 3, 40, 60) of samples 7, 8"."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    names = sorted(tensors, key=lambda name: -tensors[name].numel())
    ids = batch["ids"]
    first = ", ".join(str(i) for i in ids[:MAX_LISTED_SAMPLES])
    more = f" and {len(ids) - MAX_LISTED_SAMPLES} more" if len(ids) > MAX_LISTED_SAMPLES else ""
    shapes = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in names)
    return f"{shapes} of {'sample' if len(ids) == 1 else 'samples'} {first}{more}"


def _usage(device: torch.device) -> str:
    """The device's name and, for a CUDA GPU, the amount of its memory that all processes together use."""
    if device.type != "cuda":
        return f"the {device.type}"
    name = torch.cuda.get_device_name(device)
    with suppress(RuntimeError):  # the query itself may need memory
        free, total = torch.cuda.mem_get_info(device)
        name += f" ({(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB in use)"
    return name
