"""Several processes under torchrun: the only file that says torch.distributed.

One process is the same code with world size 1; every function here then returns at once. Either each rank holds the
whole model and `data_parallel` sums the gradients, or each holds a part of every tensor (`shard`), which then is
a DTensor. Files always hold whole tensors, so that a run goes on in any number of processes, either way.
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

# Seconds that a process which lost another one waits to be ended: torchrun tells times in whole seconds, and would take
# its error for the first.
PEER_ERROR_DELAY = 3.0

Row = TypeVar("Row", bound=tuple[Any, ...])


def world_size() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """This process's number on its machine, which is also its GPU's."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this process writes the run's folder."""
    return rank() == 0


def init_process_group(device: torch.device, timeout: float) -> None:
    """Join the group that torchrun describes in the environment; alone, do nothing.

    `timeout`: seconds after which a process that waits in vain for another ends with an error. What is not on a GPU
    (flags, objects) travels by gloo there, too, so that asking for a flag does not wait for the GPU.
    """
    if _is_under_torchrun() and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))


@contextmanager
def process_group(device: torch.device, timeout: float) -> Iterator[None]:
    """Inside, this process is in the group, see `init_process_group`.

    What fails inside is written where torchrun looks for it, to show its traceback, before the group breaks and the
    other processes fail of that. A user's mistake has no traceback, and the process itself prints it.
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
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def gather(value: Any) -> list[Any]:
    """`value` of every rank, in order of rank, on all ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_samples(rows: list[Row], expected: int | None) -> list[Row]:
    """The ranks' rows, each one sample's with its id first, by rising id on all ranks; every sample just once.

    `expected` is their number over all ranks; None when it is not known.
    """
    joined = [row for share in gather(rows) for row in share]
    times = Counter(row[0] for row in joined)
    doubled = sorted(sample for sample, count in times.items() if count > 1)
    assert not doubled, f"every sample must be evaluated once; more than once: {doubled[:5]}"
    assert expected in (None, len(times)), f"{len(times)} of {expected} samples were evaluated"
    return sorted(joined, key=lambda row: row[0])


def broadcast(value: Any) -> Any:
    """Rank 0's value on all ranks."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def any_rank(flag: bool) -> bool:
    """Whether it is true on some rank."""
    return bool(sum_over_ranks(torch.tensor(int(flag)))) if world_size() > 1 else flag


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """`tensor` summed over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def data_parallel(module: nn.Module) -> nn.Module:
    """A module that computes the same, and whose backward pass sums gradients over ranks as they come (PyTorch's DDP).

    Ranks may use different parameters; one that no rank used keeps `grad=None`, so that no decay touches it. Gradients
    are summed in the backward pass of each forward pass outside `no_gradient_sync`, which every rank must run.
    A module whose parameters are sharded is returned as it is: FSDP sums by itself.
    """
    if world_size() == 1 or is_sharded(list(module.parameters())):
        return module
    from torch.nn.parallel import DistributedDataParallel

    replica = DistributedDataParallel(module, find_unused_parameters=True, gradient_as_bucket_view=True)
    replica.broadcast_buffers = False  # by `broadcast_buffers` below; the argument is deprecated in torch 2.15
    replica.register_comm_hook(None, lambda _, bucket: _summed(bucket.buffer()))  # gradients would be means
    return replica


def _summed(gradients: Tensor) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(gradients, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def no_gradient_sync(module: nn.Module) -> AbstractContextManager[None]:
    """Inside, gradients of a `data_parallel` module add up on each rank alone, until the next backward pass outside."""
    context: AbstractContextManager[None] = getattr(module, "no_sync", nullcontext)()
    return context


@torch.no_grad()
def broadcast_buffers(model: nn.Module) -> None:
    """Give all ranks the buffers of rank 0: the running statistics of BatchNorm, say, which differ by rank.

    Only those that a checkpoint holds; others may differ in shape, too. They travel as bytes, whatever their types.
    """
    saved = model.state_dict().keys()
    buffers = [buffer for name, buffer in model.named_buffers() if name in saved]
    if world_size() == 1 or not buffers:
        return
    pieces = [buffer.to(buffers[0].device).flatten().contiguous().view(torch.uint8) for buffer in buffers]
    flat = torch.cat(pieces)
    dist.broadcast(flat, src=0)
    for buffer, piece in zip(buffers, torch.split(flat, [p.numel() for p in pieces]), strict=True):
        buffer.copy_(piece.clone().view(buffer.dtype).view_as(buffer))  # a copy is aligned for every type


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


# Parts of a model on each rank: FSDP2. Its modules are imported where they are used, for they cost a third of a second.


def shard(model: nn.Module, device: torch.device) -> None:
    """Give each rank a part of every parameter, which is gathered for as long as its layer computes.

    Zhao et al. 2023, "PyTorch FSDP" (arXiv:2304.11277), in its second form, `fully_shard`. The elements of a ModuleList
    (blocks, layers) are gathered each on its own, the rest of the model together. Gradients are sums over ranks.
    """
    if world_size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # all that FSDP2 takes (torch 2.15)
    mesh = init_device_mesh(device.type, (world_size(),))
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for unit in _units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def is_sharded(tensors: list[nn.Parameter]) -> bool:
    """Whether ranks hold parts of these tensors."""
    return any(_is_part(tensor) for tensor in tensors)


def local_part(tensor: Any) -> Tensor:
    """What this rank holds of a tensor, in the same memory."""
    part: Tensor = tensor.to_local() if _is_part(tensor) else tensor
    return part


def full_tensors(value: Any) -> Any:
    """A tensor, or all those in a dict, put together from the ranks' parts (all ranks call it); the rest as it is.

    What is in a dict goes to the CPU, one after the other: a GPU may have no room for the whole model.
    """
    if isinstance(value, dict):
        return {name: full_tensors(item).cpu() if _is_part(item) else item for name, item in value.items()}
    return value.full_tensor() if _is_part(value) else value


@torch.no_grad()
def copy_full(target: Any, value: Tensor) -> None:
    """Copy a whole tensor into one that may be a part of a whole."""
    if _is_part(target):
        from torch.distributed.tensor import distribute_tensor

        on_device = value.to(target.device)
        value = distribute_tensor(on_device, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


def load_state_dict(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """`model.load_state_dict` with whole tensors, also where ranks hold parts."""
    if not is_sharded(list(model.parameters())):
        model.load_state_dict(tensors)
        return
    own = model.state_dict()
    assert own.keys() == tensors.keys(), "the file was checked when the run began"
    for name, tensor in own.items():
        copy_full(tensor, tensors[name])


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Inside, every rank holds all of the model: it computes alone, by any method, on any number of batches."""
    units = _units(model) if is_sharded(list(model.parameters())) else []
    if units:
        units[0]._get_fsdp_state()._lazy_init()  # the first forward pass may be a layer's, which then would be the root
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
    return hasattr(tensor, "placements")  # of DTensors alone


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    for child in model.children():
        yield from child if isinstance(child, nn.ModuleList) else _layers(child)


def _units(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "unshard")]
