"""Read the environment variables that torchrun sets for each process of a run, without importing torch."""

from collections.abc import Mapping
from typing import NamedTuple

from common.errors import UserError

REMEDY = "start several processes with torchrun, which sets RANK, LOCAL_RANK and WORLD_SIZE, or unset all three"


class Process(NamedTuple):
    """The index of this process in the run and on its machine, both counted from 0, and the numbers of processes.

    `rank` and `world_size` refer to the whole run, `local_rank` and `local_world_size` to this machine.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @property
    def is_local_main(self) -> bool:
        """Whether this process is the first one on its machine."""
        return self.local_rank == 0


def this_process(environment: Mapping[str, str]) -> Process:
    """Read RANK, LOCAL_RANK and WORLD_SIZE; missing variables default to those of a single process: 0, 0 and 1.

    LOCAL_WORLD_SIZE is read as well. If it is missing, all processes are assumed to be on this machine, so it defaults
    to WORLD_SIZE.

    Raises UserError if a variable does not consist of one to nine digits, WORLD_SIZE is 0, RANK is not below
    WORLD_SIZE, or LOCAL_RANK is above RANK.
    """
    world_size = _number(environment, "WORLD_SIZE", 1)
    rank, local_rank = _number(environment, "RANK", 0), _number(environment, "LOCAL_RANK", 0)
    if world_size < 1:
        raise UserError(f"WORLD_SIZE={world_size} in the environment: expected at least 1; {REMEDY}.")
    if rank >= world_size:
        raise UserError(f"RANK={rank} in the environment: expected less than WORLD_SIZE={world_size}; {REMEDY}.")
    if local_rank > rank:
        raise UserError(f"LOCAL_RANK={local_rank} in the environment: expected at most RANK={rank}; {REMEDY}.")
    local_world_size = _number(environment, "LOCAL_WORLD_SIZE", world_size)  # srun does not set it
    return Process(rank, local_rank, world_size, max(1, local_world_size))


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise UserError(f"{name}={text!r} in the environment: expected a whole number; {REMEDY}.")
    return int(text)
