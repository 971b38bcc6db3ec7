"""Runs one function in several ranks, forked from a process that has imported everything (see nursery.py)."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nursery import CONTEXT, free_port


def run_ranks(
    folder: Path, world: int, job: Callable[..., Any], *arguments: Any, timeout: float = 60, code: int = 0
) -> list[Any]:
    """The results of `job(*arguments)` in `world` ranks, in order of rank; plain types and tensors.

    `code` is the exit code that all of them must have; a job that fails ends with 1 and returns its traceback.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{world}-{rank}.pt" for rank in range(world)]
    port = free_port()
    processes = [
        CONTEXT.Process(target=_run_rank, args=(rank, world, port, timeout, file, job, arguments))
        for rank, file in enumerate(files)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.exitcode is None:
            process.kill()
    values = [torch.load(file, weights_only=True) if file.exists() else None for file in files]
    assert [process.exitcode for process in processes] == [code] * world, values
    return values


def _run_rank(
    rank: int, world: int, port: int, timeout: float, file: Path, job: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in settings.items()})
    from common.machine import distributed

    code = 0
    try:
        distributed.init_process_group(torch.device("cpu"), timeout)
        value = job(*arguments)
    except Exception:
        code, value = 1, traceback.format_exc()
    torch.save(value, file)
    os._exit(code)  # a regular exit sometimes aborts in one of gloo's threads
