"""Runs one function in several ranks, forked from a process that has imported everything (see nursery.py)."""

import os
import time
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
        CONTEXT.Process(target=_run_rank, args=(rank, files, port, timeout, job, arguments)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.exitcode is None:
            process.kill()
    values = [torch.load(file, weights_only=True) if file.exists() else None for file in files]
    codes = [process.exitcode for process in processes]
    assert codes == [code] * world, (codes, [value if isinstance(value, str) else type(value) for value in values])
    return values


def _run_rank(
    rank: int, files: list[Path], port: int, timeout: float, job: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    settings = {
        **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(files)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
    }
    os.environ.update({name: str(value) for name, value in settings.items()})
    from common.machine import distributed

    code = 0
    try:
        distributed.init_process_group(torch.device("cpu"), timeout)
        value = job(*arguments)
    except Exception:
        code, value = 1, traceback.format_exc()
    torch.save(value, files[rank])
    if code == 0:  # the first rank holds the group's store: wait, because a slower rank may still need it
        end = time.monotonic() + timeout
        while not all(file.exists() for file in files) and time.monotonic() < end:
            time.sleep(0.01)
    os._exit(code)  # a regular exit sometimes aborts in one of gloo's threads
