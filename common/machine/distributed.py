"""Communication between the processes of a run, and data-parallel training with DDP and FSDP.

This is the only file that uses torch.distributed. A single process runs the same code with world size 1; the functions
of this file then do not communicate. With the strategy `ddp`, each rank holds the whole model, and `data_parallel` sums
the gradients over ranks. With `fsdp`, every parameter is a DTensor, of which each rank holds a part (`shard`).
Checkpoints always hold full tensors, so that a run can be resumed with any strategy and any number of processes.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import UserError
from common.machine import torchrun

# If a process fails, the other processes lose their connection to it and fail, too. They wait this many seconds before
# they record their error. torchrun compares the times of errors in whole seconds and reports the earliest error, which
# should be that of the process that failed first.
PEER_ERROR_DELAY = 3.0

MEETING_REMEDY = "start them with torchrun, or set MASTER_ADDR to the machine of rank 0 and MASTER_PORT to a free port"

Row = TypeVar("Row", bound=tuple[Any, ...])


def world_size() -> int:
    """The number of processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process in the run, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """The number of this process on its machine, from 0, which is also the number of its GPU."""
    return torchrun.this_process(os.environ).local_rank


def local_world_size() -> int:
    """The number of processes of this run on this machine."""
    return torchrun.this_process(os.environ).local_world_size


def is_main() -> bool:
    """Whether this process is rank 0, which writes the run's folder."""
    return rank() == 0


def init_process_group(device: torch.device, timeout: float) -> None:
    """Join the group that torchrun describes in the environment; does nothing for a single process.

    `timeout` is the number of seconds after which a process that waits for another one raises an error. Tensors on the
    CPU and Python objects are sent by gloo, even if there are GPUs, so that a collective on them does not wait for the
    GPU. Raises UserError if the processes cannot connect.
    """
    if _is_under_torchrun() and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        except (dist.DistError, ValueError) as error:  # a port in use or out of range, a machine that does not answer
            address = ":".join(os.environ.get(name, f"({name} is not set)") for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise UserError(f"the processes cannot meet at {address} ({_reason(error)}); {MEETING_REMEDY}.") from error


def _reason(error: Exception) -> str:
    """Why the processes cannot connect, without PyTorch's details."""
    text = str(error).partition("\n")[0].rstrip(".")
    return "this port is in use by another process" if "EADDRINUSE" in text else text


@contextmanager
def process_group(device: torch.device, timeout: float) -> Iterator[None]:
    """A context inside which this process belongs to the group of all processes; see `init_process_group`.

    If an exception is raised inside, the context writes it to torchrun's error file, so that torchrun shows its
    traceback. The context destroys the group afterwards, because this makes the other processes fail, too, and torchrun
    takes the earliest error for the cause. A UserError is not written: the process prints it without a traceback.
    Stopped and KeyboardInterrupt are not written either.
    """
    init_process_group(device, timeout)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if "by peer" in str(error) or isinstance(error, dist.DistBackendError):
            time.sleep(PEER_ERROR_DELAY)
        if _is_under_torchrun():
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            handler = get_error_handler()
            handler.initialize()
            handler.record_exception(error)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _is_under_torchrun() -> bool:
    return torchrun.this_process(os.environ).world_size > 1


def gather(value: Any) -> list[Any]:
    """Collect the `value` of every rank on all ranks; returns the values in order of rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_samples(rows: list[Row], expected: int | None) -> list[Row]:
    """Collect the rows of all ranks on every rank; returns them in ascending order of their sample ids.

    A row belongs to one sample and begins with the sample's id; no id may occur twice. `expected` is the number of
    samples over all ranks, which is checked; None if it is unknown.
    """
    all_rows = [row for rank_rows in gather(rows) for row in rank_rows]
    counts = Counter(row[0] for row in all_rows)
    duplicates = sorted(sample for sample, count in counts.items() if count > 1)
    assert not duplicates, f"every sample must be evaluated once; more than once: {duplicates[:5]}"
    assert expected in (None, len(counts)), f"{len(counts)} of {expected} samples were evaluated"
    return sorted(all_rows, key=lambda row: row[0])


def broadcast(value: Any) -> Any:
    """Return the `value` of rank 0 on all ranks."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank."""
    return bool(sum_over_ranks(torch.tensor(int(flag)))) if world_size() > 1 else flag


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum `tensor` over ranks in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def data_parallel(module: nn.Module) -> nn.Module:
    """Wrap `module` so that its backward pass also sums gradients over ranks (PyTorch's DDP).

    A forward pass may use different parameters on different ranks. A parameter that no rank has used keeps `grad=None`,
    so that the optimizer applies no weight decay to it. A backward pass sums the gradients if its forward pass was
    outside `no_gradient_sync`; every rank must then make this forward and backward pass.

    A module with sharded parameters is returned unchanged, because FSDP sums gradients itself. With a single process,
    every module is returned unchanged.
    """
    if world_size() == 1 or is_sharded(list(module.parameters())):
        return module
    from torch.nn.parallel import DistributedDataParallel

    replica = DistributedDataParallel(module, find_unused_parameters=True, gradient_as_bucket_view=True)
    replica.broadcast_buffers = False  # `broadcast_buffers` below does it; DDP's argument is deprecated (torch 2.15)
    replica.register_comm_hook(None, lambda _, bucket: _sum_async(bucket.buffer()))  # the default is the mean
    return replica


def _sum_async(gradients: Tensor) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(gradients, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def no_gradient_sync(module: nn.Module) -> AbstractContextManager[None]:
    """A context inside which a `data_parallel` module accumulates gradients on each rank without summing over ranks.

    The first backward pass whose forward pass is outside the context sums the accumulated gradients over ranks. For a
    module that is not wrapped in DDP, the context has no effect.
    """
    context: AbstractContextManager[None] = getattr(module, "no_sync", nullcontext)()
    return context


@torch.no_grad()
def broadcast_buffers(model: nn.Module) -> None:
    """Copy the buffers of rank 0 to all ranks, because buffers such as BatchNorm's statistics may differ between ranks.

    Only persistent buffers are copied, because other buffers may differ even in shape between ranks. Buffers of all
    types are sent together, as bytes.
    """
    persistent = model.state_dict().keys()
    buffers = [buffer for name, buffer in model.named_buffers() if name in persistent]
    if world_size() == 1 or not buffers:
        return
    pieces = [buffer.to(buffers[0].device).flatten().contiguous().view(torch.uint8) for buffer in buffers]
    flat = torch.cat(pieces)
    dist.broadcast(flat, src=0)
    for buffer, piece in zip(buffers, torch.split(flat, [p.numel() for p in pieces]), strict=True):
        buffer.copy_(piece.clone().view(buffer.dtype).view_as(buffer))  # the clone's memory is aligned for any type


def barrier() -> None:
    """Wait until every rank has called this."""
    if world_size() > 1:
        dist.barrier()


# Sharding by FSDP2. Its modules are imported where they are used, because importing them takes a third of a second.


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard every parameter over the ranks; a layer's parameters are gathered only while the layer computes.

    The method is FSDP (Zhao et al. 2023, "PyTorch FSDP", arXiv:2304.11277) in PyTorch's second version, `fully_shard`.
    Each element of an outermost ModuleList (such as a block of a stack) is gathered separately, with all modules inside
    the element. The rest of the model is gathered together. Gradients are summed over ranks, not averaged.
    """
    if world_size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # required by FSDP2 (torch 2.15)
    mesh = init_device_mesh(device.type, (world_size(),))
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for unit in _units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo supports only sums


def is_sharded(tensors: list[nn.Parameter]) -> bool:
    """Whether any of these parameters is sharded."""
    return any(_is_part(tensor) for tensor in tensors)


def local_part(tensor: Any) -> Tensor:
    """This rank's part of a sharded tensor, without a copy; an unsharded tensor is returned unchanged."""
    part: Tensor = tensor.to_local() if _is_part(tensor) else tensor
    return part


def full_tensors(value: Any) -> Any:
    """Gather a sharded tensor, or all sharded tensors in a dict; other values are returned unchanged.

    This is a collective: all ranks must call it. The gathered tensors of a dict are moved to the CPU one by one,
    because the memory of a GPU may be too small for the whole model.
    """
    if isinstance(value, dict):
        return {name: full_tensors(item).cpu() if _is_part(item) else item for name, item in value.items()}
    return value.full_tensor() if _is_part(value) else value


@torch.no_grad()
def copy_full(target: Any, value: Tensor) -> None:
    """Copy the full tensor `value`, which every rank holds, into `target`, which may be sharded."""
    if _is_part(target):
        from torch.distributed.tensor import distribute_tensor

        on_device = value.to(target.device)
        value = distribute_tensor(on_device, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


def load_state_dict(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load full tensors into `model` as `model.load_state_dict` does, even if the model is sharded."""
    if not is_sharded(list(model.parameters())):
        model.load_state_dict(tensors)
        return
    current = model.state_dict()
    assert current.keys() == tensors.keys(), "the file was checked when the run started"
    for name, tensor in current.items():
        copy_full(tensor, tensors[name])


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """A context in which every rank holds the full model, so that each rank can call the model without the others."""
    units = _units(model) if is_sharded(list(model.parameters())) else []
    if units:
        units[0]._get_fsdp_state()._lazy_init()  # otherwise, FSDP would take the first layer that is called as its root
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not model, recurse=False)


def _is_part(tensor: Any) -> bool:
    return hasattr(tensor, "placements")  # only DTensors have it


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    for child in model.children():
        yield from child if isinstance(child, nn.ModuleList) else _layers(child)


def _units(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "unshard")]
