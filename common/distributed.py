"""Several processes under torchrun: the only file that says torch.distributed.

One process is the same code with world size 1; every function here then returns at once.
"""

import os
from collections import Counter
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

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


def start(device: torch.device) -> None:
    """Join the group that torchrun describes in the environment; alone, do nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def stop() -> None:
    """Leave the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


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


def any_(flag: bool) -> bool:
    """Whether it is true on some rank (a collective)."""
    return any(gather(flag)) if world_size() > 1 else flag


def sum_(tensor: Tensor) -> Tensor:
    """`tensor` summed over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def join_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Sum the gradients over ranks with one flat all-reduce after the last backward pass.

    By hand instead of the DDP wrapper: no renamed keys, and a rank without samples or a parameter that only some
    ranks used needs no special case. A parameter that no rank used keeps `grad=None`, so no decay touches it.
    """
    if world_size() == 1:
        return
    used = sum_(torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device))
    chosen = [p for p, n in zip(parameters, used.tolist(), strict=True) if n > 0]
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in chosen])
    dist.all_reduce(flat)
    for parameter, piece in zip(chosen, flat.split([p.numel() for p in chosen]), strict=True):
        parameter.grad = piece.view_as(parameter)


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()
