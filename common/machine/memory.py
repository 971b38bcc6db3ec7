"""Out of memory: which batch it was, and what to lower."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from common.errors import UserError
from common.task import Batch

TRAINING_ADVICE = "lower trainer.micro_batch (a step stays the same step), or set trainer.precision=bf16"
EVALUATION_ADVICE = "lower trainer.micro_batch (its numbers stay the same), or set trainer.precision=bf16"
UPDATE_ADVICE = (
    "use trainer.strategy=fsdp in several processes, optimizer.name=sgd, which keeps less, or a smaller model"
)
SINGLE_SAMPLE_ADVICE = (
    "one sample alone is too much, so give smaller images or shorter texts, a smaller model, or more memory"
)
OUT_OF_MEMORY_MESSAGES = (  # torch has an exception for CUDA's own allocator alone (2.15)
    "DefaultCPUAllocator",  # "can't allocate memory", or "not enough memory" on Windows and macOS
    "out of memory",  # the CUDA driver, and MPS
    "STATUS_ALLOC_FAILED",  # cuBLAS and cuDNN
)
MAX_LISTED_SAMPLES = 4  # samples; of more than that there is the number


@contextmanager
def report_out_of_memory(what: str, batch: Batch, device: torch.device, advice: str) -> Iterator[None]:
    """Turn running out of memory inside into a UserError: the batch's shapes and samples, and `advice`.

    `what` begins the sentence: "Step 12". Other errors pass.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        advice = SINGLE_SAMPLE_ADVICE if len(batch["ids"]) == 1 and advice != UPDATE_ADVICE else advice
        raise UserError(f"{what} ran out of memory on {_filling(device)} with {describe(batch)}: {advice}.") from None


def is_out_of_memory(error: Exception) -> bool:
    """Whether this is what PyTorch, Python or the system raise when memory is short."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY_MESSAGES))


def describe(batch: Batch) -> str:
    """The shapes of a batch's tensors, the largest first, and its samples: "images (2, 3, 40, 60) of samples 7, 8"."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    names = sorted(tensors, key=lambda name: -tensors[name].numel())
    ids = batch["ids"]
    first = ", ".join(str(i) for i in ids[:MAX_LISTED_SAMPLES])
    more = f" and {len(ids) - MAX_LISTED_SAMPLES} more" if len(ids) > MAX_LISTED_SAMPLES else ""
    shapes = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in names)
    return f"{shapes} of {'sample' if len(ids) == 1 else 'samples'} {first}{more}"


def _filling(device: torch.device) -> str:
    """The device's name, and how full a GPU is, with what other processes hold there."""
    if device.type != "cuda":
        return f"the {device.type}"
    name = torch.cuda.get_device_name(device)
    with suppress(RuntimeError):  # where there is not even enough for asking
        free, total = torch.cuda.mem_get_info(device)
        name += f" ({(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB in use)"
    return name
