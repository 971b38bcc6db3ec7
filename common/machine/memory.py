"""Out of memory: which batch it was, and what to lower."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from common.errors import UserError
from common.task import Batch

TRAINING = "lower trainer.micro_batch (a step stays the same step), or set trainer.precision=bf16"
EVALUATION = "lower trainer.micro_batch (its numbers stay the same), or set trainer.precision=bf16"
UPDATE = "use trainer.strategy=fsdp in several processes, optimizer.name=sgd, which keeps less, or a smaller model"
ALONE = "one sample alone is too much, so give smaller images or shorter texts, a smaller model, or more memory"
SIGNS = (  # torch has an exception for CUDA's own allocator alone (2.15)
    "DefaultCPUAllocator",  # "can't allocate memory", or "not enough memory" on Windows and macOS
    "out of memory",  # the CUDA driver, and MPS
    "STATUS_ALLOC_FAILED",  # cuBLAS and cuDNN
)
NAMED = 4  # samples; of more than that there is the number


@contextmanager
def named(what: str, batch: Batch, device: torch.device, advice: str) -> Iterator[None]:
    """Turn running out of memory inside into a UserError: the batch's shapes and samples, and `advice`.

    `what` begins the sentence: "Step 12". Other errors pass.
    """
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        advice = ALONE if len(batch["ids"]) == 1 and advice != UPDATE else advice
        raise UserError(f"{what} ran out of memory on {_filling(device)} with {describe(batch)}: {advice}.") from None


def ran_out(error: Exception) -> bool:
    """Whether this is what PyTorch, Python or the system raise when memory is short."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS))


def describe(batch: Batch) -> str:
    """The shapes of a batch's tensors, the largest first, and its samples: "images (2, 3, 40, 60) of samples 7, 8"."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    names = sorted(tensors, key=lambda name: -tensors[name].numel())
    ids = batch["ids"]
    first = ", ".join(str(i) for i in ids[:NAMED])
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
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
