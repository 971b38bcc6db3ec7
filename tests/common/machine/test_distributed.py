"""Collectives, in real processes and in a single one, where they return at once."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

from common.errors import UserError
from common.machine import distributed


def collectives() -> dict[str, Any]:
    """The result of each collective on this rank, when every rank gives its number."""
    rank, world = distributed.rank(), distributed.world_size()
    rows = [(sample, f"of {rank}") for sample in range(rank, 7, world)]
    return {
        "flags": [distributed.any_rank(rank == number) for number in range(world)],
        "no flag": distributed.any_rank(False),
        "gathered": distributed.gather({"rank": rank}),
        "broadcast": distributed.broadcast(f"from {rank}"),
        "sum": float(distributed.sum_over_ranks(torch.tensor(float(rank)))),
        "samples": distributed.gather_samples(rows, 7),
        "main": distributed.is_main(),
    }


@pytest.mark.slow
def test_collectives_give_all_ranks_the_same_results(tmp_path: Path) -> None:
    for rank, results in enumerate(run_ranks(tmp_path, 3, collectives)):
        assert results["flags"] == [True] * 3 and results["no flag"] is False
        assert results["gathered"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert results["broadcast"] == "from 0" and results["sum"] == 3
        assert results["samples"] == [(sample, f"of {sample % 3}") for sample in range(7)]
        assert results["main"] == (rank == 0)


def test_collectives_of_a_single_process_return_its_own_values() -> None:
    assert distributed.any_rank(True) and not distributed.any_rank(False)
    assert distributed.gather("x") == ["x"] and distributed.broadcast("x") == "x"
    assert float(distributed.sum_over_ranks(torch.tensor(2.0))) == 2
    assert distributed.gather_samples([(1, "b"), (0, "a")], 2) == [(0, "a"), (1, "b")]


@pytest.mark.parametrize(
    ("rows", "expected", "message"),
    [([(0,), (1,), (0,)], 2, "more than once: [0]"), ([(0,), (2,)], 3, "2 of 3 samples were evaluated")],
)
def test_a_sample_that_is_counted_twice_or_never_stops_the_evaluation(rows, expected, message) -> None:
    with pytest.raises(AssertionError) as error:
        distributed.gather_samples(rows, expected)
    assert message in str(error.value)


class PartlyUsed(nn.Module):
    """Three parameters: used by all ranks, used by the last rank in its first micro-batch, and unused."""

    def __init__(self) -> None:
        super().__init__()
        self.used_by_all, self.used_by_last, self.unused = (
            nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3)
        )

    def forward(self, factor: float, first: bool) -> torch.Tensor:
        """The loss of a micro-batch."""
        loss = (self.used_by_all * torch.tensor([1.0, 10.0]) * factor).sum()
        if first and distributed.rank() == distributed.world_size() - 1:
            loss = loss + (self.used_by_last * torch.tensor([5.0, 7.0])).sum()
        return loss


def summed_gradients() -> list[list[list[float] | None]]:
    """The gradients of two steps; in each a rank has one more micro-batch than the previous rank."""
    module, gradients = PartlyUsed(), []
    replica = distributed.data_parallel(module)
    for _ in range(2):
        module.zero_grad()
        for number in range(distributed.rank()):
            with distributed.no_gradient_sync(replica):
                replica(100.0, number == 0).backward()
        replica(distributed.rank() + 1.0, False).backward()
        gradients.append([None if p.grad is None else p.grad.tolist() for p in module.parameters()])
    return gradients


@pytest.mark.slow
def test_gradients_are_sums_and_a_parameter_that_no_rank_used_has_none(tmp_path: Path) -> None:
    """Of three ranks, by hand: 0, 1 and 2 times 100, and 1 + 2 + 3."""
    assert run_ranks(tmp_path, 3, summed_gradients) == [[[[306.0, 3060.0], [5.0, 7.0], None]] * 2] * 3


def test_a_single_process_wraps_no_module() -> None:
    module = PartlyUsed()
    assert distributed.data_parallel(module) is module
    assert summed_gradients()[1] == [[1.0, 10.0], None, None]


class Buffers(nn.Module):
    """Buffers of several types and shapes, one of them not persistent."""

    def __init__(self, rank: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), float(rank)))
        self.register_buffer("flag", torch.tensor(rank == 0))
        self.register_buffer("mean", torch.full((3, 2), rank + 0.5, dtype=torch.float64).T)
        self.register_buffer("seen", torch.tensor(7 + rank))
        self.register_buffer("spread", torch.full((1,), rank + 0.25, dtype=torch.bfloat16))
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("cache", torch.zeros(rank), persistent=False)


def broadcast_buffers() -> dict[str, torch.Tensor]:
    """The tensors of this rank's module after its buffers are broadcast."""
    module = Buffers(distributed.rank())
    distributed.broadcast_buffers(module)
    distributed.broadcast_buffers(nn.Linear(1, 1))
    return {**module.state_dict(), "cache": module.cache}


@pytest.mark.slow
def test_buffers_are_those_of_rank_0_and_parameters_are_not(tmp_path: Path) -> None:
    expected = Buffers(0)
    for rank, tensors in enumerate(run_ranks(tmp_path, 3, broadcast_buffers)):
        assert tensors["weight"].tolist() == [rank, rank] and len(tensors["cache"]) == rank
        for name in ("flag", "mean", "seen", "spread", "empty"):
            buffer = getattr(expected, name)
            assert torch.equal(tensors[name], buffer) and tensors[name].dtype == buffer.dtype


def seconds_until_timeout() -> float:
    """Seconds for which a rank waits for the last one, which is busy."""
    start = time.monotonic()
    if distributed.rank() == distributed.world_size() - 1:
        time.sleep(8)
    else:
        with pytest.raises(RuntimeError):
            distributed.any_rank(False)
    return time.monotonic() - start


@pytest.mark.slow
def test_waiting_for_a_rank_ends_with_an_error_after_the_timeout(tmp_path: Path) -> None:
    seconds = run_ranks(tmp_path, 2, seconds_until_timeout, timeout=2)
    assert 1.5 < seconds[0] < 6 < seconds[1]


def recorded_traceback(folder: Path, error: Exception) -> str:
    """The traceback in torchrun's error file after `error` is raised in the group; empty if there is none."""
    file = folder / f"{distributed.rank()}-{type(error).__name__}.json"
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(file)
    with pytest.raises(type(error)), distributed.process_group(torch.device("cpu"), 30):
        distributed.barrier()  # else a rank may leave before the others have connected to it
        raise error
    assert distributed.world_size() == 1, "the process has left the group"
    return json.loads(file.read_text())["message"]["extraInfo"]["py_callstack"] if file.exists() else ""


@pytest.mark.slow
def test_torchrun_gets_the_traceback_of_a_defect_but_not_of_a_user_error(tmp_path: Path) -> None:
    for traceback in run_ranks(tmp_path, 2, recorded_traceback, tmp_path, ZeroDivisionError("a defect")):
        assert "ZeroDivisionError: a defect" in traceback and "raise error" in traceback
    assert run_ranks(tmp_path, 2, recorded_traceback, tmp_path, UserError("a mistake")) == ["", ""]


def test_a_single_process_writes_no_error_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert recorded_traceback(tmp_path, ZeroDivisionError("a defect")) == ""
