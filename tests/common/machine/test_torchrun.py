"""An environment of several processes that makes no sense is one sentence, before anything is computed."""

import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch

from common.errors import UserError
from common.machine import distributed
from common.machine.torchrun import Process, this_process


def test_a_single_process_and_a_rank_of_torchrun_are_read() -> None:
    assert this_process({}) == Process(0, 0, 1) and Process().is_local_main
    rank = this_process({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"})
    assert rank == Process(5, 1, 8, 8) and not rank.is_local_main
    assert this_process({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}).local_world_size == 4


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' in the environment: expected a whole number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='' in"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE='-2' in"),
        ({"WORLD_SIZE": "1.5"}, "WORLD_SIZE='1.5' in"),
        ({"WORLD_SIZE": "9" * 5000}, "expected a whole number"),
        ({"WORLD_SIZE": "٣"}, "expected a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment: expected at least 1"),
        ({"RANK": "zero"}, "RANK='zero' in"),
        ({"RANK": "1"}, "RANK=1 in the environment: expected less than WORLD_SIZE=1"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 in the environment: expected less than WORLD_SIZE=2"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x' in"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 in the environment: expected at most RANK=0"),
    ],
)
@pytest.mark.parametrize("name", ["train", "evaluate", "predict"])
def test_nonsense_is_one_sentence_in_every_door(
    name: str, variables: dict[str, str], message: str, inside: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError) as error_info:
        this_process(variables)
    assert message in str(error_info.value) and "start several processes with torchrun" in str(error_info.value)
    for variable, text in variables.items():
        monkeypatch.setenv(variable, text)
    assert inside(name, "model=vit", code=2) == str(error_info.value)


@pytest.fixture
def meet(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A function that joins a group of two with these variables, and returns the sentence why it cannot."""

    def join(**variables: Any) -> str:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"RANK": 0, "WORLD_SIZE": 2, **variables}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UserError) as error_info:
            distributed.init_process_group(torch.device("cpu"), timeout=1)
        assert not torch.distributed.is_initialized()
        return str(error_info.value)

    return join


def test_a_port_in_use_is_one_sentence(meet: Callable[..., str]) -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        message = meet(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert message.startswith(
        f"the processes cannot meet at 127.0.0.1:{port} (this port is in use by another process);"
    )


def test_an_address_that_is_missing_wrong_or_silent_is_one_sentence(meet: Callable[..., str]) -> None:
    assert "(MASTER_ADDR is not set)" in meet()
    assert "127.0.0.1:x (" in meet(MASTER_ADDR="127.0.0.1", MASTER_PORT="x")
    assert "127.0.0.1:99999 (" in meet(MASTER_ADDR="127.0.0.1", MASTER_PORT="99999")
    message = meet(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", RANK=1)
    assert "timed out" in message and message.endswith("MASTER_PORT to a free port.")
