"""What ranks tell each other, in real processes; and what a process that is alone answers at once."""

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


def told() -> dict[str, Any]:
    """What this rank hears when each says its own number."""
    rank, world = distributed.rank(), distributed.world_size()
    rows = [(sample, f"of {rank}") for sample in range(rank, 7, world)]
    return {
        "flags": [distributed.any_rank(rank == one) for one in range(world)],
        "no flag": distributed.any_rank(False),
        "gathered": distributed.gather({"rank": rank}),
        "broadcast": distributed.broadcast(f"from {rank}"),
        "sum": float(distributed.sum_over_ranks(torch.tensor(float(rank)))),
        "samples": distributed.gather_samples(rows, 7),
        "main": distributed.is_main(),
    }


@pytest.mark.slow
def test_every_rank_hears_what_each_says(tmp_path: Path) -> None:
    for rank, heard in enumerate(run_ranks(tmp_path, 3, told)):
        assert heard["flags"] == [True] * 3 and heard["no flag"] is False
        assert heard["gathered"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert heard["broadcast"] == "from 0" and heard["sum"] == 3
        assert heard["samples"] == [(sample, f"of {sample % 3}") for sample in range(7)]
        assert heard["main"] == (rank == 0)


def test_a_process_that_is_alone_answers_itself() -> None:
    assert distributed.any_rank(True) and not distributed.any_rank(False)
    assert distributed.gather("x") == ["x"] and distributed.broadcast("x") == "x"
    assert float(distributed.sum_over_ranks(torch.tensor(2.0))) == 2
    assert distributed.gather_samples([(1, "b"), (0, "a")], 2) == [(0, "a"), (1, "b")]


@pytest.mark.parametrize(
    ("rows", "expected", "words"),
    [([(0,), (1,), (0,)], 2, "more than once: [0]"), ([(0,), (2,)], 3, "2 of 3 samples were evaluated")],
)
def test_a_sample_that_is_counted_twice_or_never_stops_the_evaluation(rows, expected, words) -> None:
    with pytest.raises(AssertionError) as error:
        distributed.gather_samples(rows, expected)
    assert words in str(error.value)


class Shares(nn.Module):
    """A parameter that all ranks use, one that only the last rank uses, and only at first, and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.everybody, self.last, self.nobody = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3))

    def forward(self, factor: float, first: bool) -> torch.Tensor:
        """The loss of a micro-batch."""
        loss = (self.everybody * torch.tensor([1.0, 10.0]) * factor).sum()
        if first and distributed.rank() == distributed.world_size() - 1:
            loss = loss + (self.last * torch.tensor([5.0, 7.0])).sum()
        return loss


def joined() -> list[list[list[float] | None]]:
    """The gradients of two steps; in each a rank has one micro-batch more than the rank before it."""
    module, gradients = Shares(), []
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
    assert run_ranks(tmp_path, 3, joined) == [[[[306.0, 3060.0], [5.0, 7.0], None]] * 2] * 3


def test_a_process_that_is_alone_joins_nothing() -> None:
    module = Shares()
    assert distributed.data_parallel(module) is module
    assert joined()[1] == [[1.0, 10.0], None, None]


class Counts(nn.Module):
    """Buffers of several types and shapes, one that no file holds, and no memory in common."""

    def __init__(self, rank: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), float(rank)))
        self.register_buffer("flag", torch.tensor(rank == 0))
        self.register_buffer("mean", torch.full((3, 2), rank + 0.5, dtype=torch.float64).T)
        self.register_buffer("seen", torch.tensor(7 + rank))
        self.register_buffer("spread", torch.full((1,), rank + 0.25, dtype=torch.bfloat16))
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("cache", torch.zeros(rank), persistent=False)


def shared() -> dict[str, torch.Tensor]:
    """All that the module of this rank holds once buffers are shared."""
    module = Counts(distributed.rank())
    distributed.broadcast_buffers(module)
    distributed.broadcast_buffers(nn.Linear(1, 1))
    return {**module.state_dict(), "cache": module.cache}


@pytest.mark.slow
def test_buffers_are_those_of_rank_0_and_parameters_are_not(tmp_path: Path) -> None:
    expected = Counts(0)
    for rank, tensors in enumerate(run_ranks(tmp_path, 3, shared)):
        assert tensors["weight"].tolist() == [rank, rank] and len(tensors["cache"]) == rank
        for name in ("flag", "mean", "seen", "spread", "empty"):
            buffer = getattr(expected, name)
            assert torch.equal(tensors[name], buffer) and tensors[name].dtype == buffer.dtype


def waited() -> float:
    """Seconds until a rank gives up waiting for the last one, which is busy."""
    start = time.monotonic()
    if distributed.rank() == distributed.world_size() - 1:
        time.sleep(8)
    else:
        with pytest.raises(RuntimeError):
            distributed.any_rank(False)
    return time.monotonic() - start


@pytest.mark.slow
def test_waiting_for_a_rank_ends_with_an_error_after_the_timeout(tmp_path: Path) -> None:
    seconds = run_ranks(tmp_path, 2, waited, timeout=2)
    assert 1.5 < seconds[0] < 6 < seconds[1]


def failed(folder: Path, error: Exception) -> str:
    """What torchrun finds to show of it."""
    file = folder / f"{distributed.rank()}-{type(error).__name__}.json"
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(file)
    with pytest.raises(type(error)), distributed.process_group(torch.device("cpu"), 30):
        distributed.barrier()  # or one may leave before the others have met it
        raise error
    assert distributed.world_size() == 1, "the group is left"
    return json.loads(file.read_text())["message"]["extraInfo"]["py_callstack"] if file.exists() else ""


@pytest.mark.slow
def test_torchrun_gets_the_traceback_of_a_defect_and_of_no_mistake(tmp_path: Path) -> None:
    for said in run_ranks(tmp_path, 2, failed, tmp_path, ZeroDivisionError("a defect")):
        assert "ZeroDivisionError: a defect" in said and "raise error" in said
    assert run_ranks(tmp_path, 2, failed, tmp_path, UserError("a mistake")) == ["", ""]


def test_alone_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert failed(tmp_path, ZeroDivisionError("a defect")) == ""
