"""A logger that fails or hangs, at its start, at a write or at its end, costs one warning and no number."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from common.files import dispatch
from common.files.log import Log

PICTURE = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)


class Recorder:
    """A logger that records its calls; `act` is called first, with the name of each call."""

    location = "on paper"

    def __init__(self, act: Callable[[str], None], calls: list[Any], run: Any):
        act("start")
        self.act, self.calls, self.run = act, calls, run

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.act("numbers")
        self.calls.append((step, dict(values)))

    def picture(self, step: int, name: str, images: Tensor) -> None:
        self.act("picture")
        self.calls.append((step, name))

    def close(self, finished: bool) -> None:
        self.act("close")
        self.calls.append(finished)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """A function that lets a Recorder take the place of a logger; returns the list of its calls."""

    def install(name: str, act: Callable[[str], None] = lambda call: None) -> list[Any]:
        calls: list[Any] = []
        monkeypatch.setitem(dispatch.CLASSES, name, lambda run: Recorder(act, calls, run))
        return calls

    return install


def log_steps(folder: Path, loggers: list[Any], first: int = 0, last: int = 6) -> str:
    """Log `last - first` steps with an evaluation of step 4; returns the text of train.log."""
    with Log(folder, True) as log:
        if first:
            log.truncate_after(first)
        log.open_loggers(loggers, {"seed": 0, "run_dir": "x"})
        for step in range(first + 1, last + 1):
            log.numbers(step, {"train/loss": 1 / step, "train/bad": float("nan")}, {"images/s": 9.0})
            if step == 4:
                log.numbers(step, {"val/AP": 0.5})
                log.pictures("val", PICTURE, step)
    return (folder / "train.log").read_text()


EXPECTED = [
    *((step, {"train/loss": 1 / step, "timing/images/s": 9.0}) for step in (1, 2, 3, 4)),
    *((4, {"val/AP": 0.5}), (4, "val")),
    *((step, {"train/loss": 1 / step, "timing/images/s": 9.0}) for step in (5, 6)),
    True,
]


def raising(moment: str, error: BaseException) -> Callable[[str], None]:
    def act(call: str) -> None:
        if call == moment:
            raise error

    return act


def test_a_logger_gets_all_finite_numbers_the_pictures_and_the_end(tmp_path, recorder):
    calls = recorder("wandb")
    assert "wandb     on paper" in log_steps(tmp_path, ["wandb", "wandb"])
    assert calls == EXPECTED and not list(tmp_path.glob("events*"))


def test_without_loggers_only_the_run_files_are_written(tmp_path):
    log_steps(tmp_path, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "timing.jsonl", "train.log"]


def test_the_config_is_shown_without_keys_of_this_machine(tmp_path, monkeypatch):
    runs: list[Any] = []
    monkeypatch.setitem(
        dispatch.CLASSES, "mlflow", lambda run: runs.append(run) or Recorder(lambda call: None, [], run)
    )
    with Log(tmp_path / "a" / "b", True) as log:
        log.open_loggers(["mlflow"], {"seed": 1, "model": {"width": 2}, "cache_dir": "/me", "run_dir": "r"})
    assert runs[0].config == {"seed": 1, "model": {"width": 2}} and runs[0].name == "a/b"
    assert runs[0].parameters == {"seed": 1, "model.width": 2}


@pytest.mark.parametrize("moment", ["start", "numbers", "picture", "close"])
@pytest.mark.parametrize("error", [RuntimeError("no\nserver"), ConnectionError("no"), SystemExit(1), KeyError()])
def test_a_failing_logger_is_warned_of_once_and_others_get_everything(moment, error, tmp_path, recorder):
    recorder("wandb", raising(moment, error))
    others = recorder("mlflow")
    text = log_steps(tmp_path, ["wandb", "mlflow", "tensorboard"])
    warnings = [line for line in text.splitlines() if "Warning" in line]
    assert len(warnings) == 1 and "wandb failed at " in warnings[0]
    assert f"({type(error).__name__}" in warnings[0] and "metrics.jsonl holds all numbers" in warnings[0]
    assert others == EXPECTED
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 7
    assert len(EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")) == 6


@pytest.mark.parametrize("moment", ["start", "numbers", "close"])
def test_a_logger_that_hangs_delays_the_run_by_a_limited_time(moment, tmp_path, recorder, monkeypatch):
    for name, value in (("START_SECONDS", 0.3), ("PUT_SECONDS", 0.3), ("END_SECONDS", 0.3), ("MAX_WAITING", 3)):
        monkeypatch.setattr(dispatch, name, value)
    forever = threading.Event()
    recorder("wandb", lambda call: forever.wait() if call == moment else None)
    others = recorder("mlflow")
    start = time.monotonic()
    text = log_steps(tmp_path, ["wandb", "mlflow"])
    assert time.monotonic() - start < 2
    forever.set()
    assert text.count("Warning") == 1 and "Warning: wandb failed at " in text
    assert others == EXPECTED


def test_numbers_after_the_checkpoint_are_sent_again_only_if_they_differ(tmp_path, recorder):
    calls = recorder("wandb")
    with Log(tmp_path, True) as log:
        log.open_loggers(["wandb"], {})
        for step in (1, 2, 3):
            log.numbers(step, {"train/loss": 1 / step, "train/lr": 0.1}, {"images/s": 8.0})
        log.numbers(3, {"val/AP": 0.5})
        log.pictures("val", PICTURE, 3)
    (tmp_path / "loggers.json").write_text(json.dumps({"wandb": {"run": "x"}}))  # as the true logger writes it
    calls.clear()
    with Log(tmp_path, True) as log:
        log.truncate_after(1)
        log.open_loggers(["wandb"], {})
        log.numbers(2, {"train/loss": 0.5, "train/lr": 0.1}, {"images/s": 9.0})
        log.numbers(3, {"train/loss": 1 / 3, "train/lr": 0.2}, {"images/s": 9.0})
        log.numbers(3, {"val/AP": 0.5})
        log.pictures("val", PICTURE, 3)
        log.numbers(4, {"train/loss": 1 / 4}, {"images/s": 9.0})
    assert calls == [(3, {"train/lr": 0.2}), (4, {"train/loss": 0.25, "timing/images/s": 9.0}), True]


def test_a_logger_that_is_added_on_resuming_gets_every_number_from_then_on(tmp_path, recorder):
    calls = recorder("wandb")
    log_steps(tmp_path, [])
    log_steps(tmp_path, ["wandb"], first=2)
    assert calls == EXPECTED[2:]


def test_a_run_that_ends_by_an_error_is_not_finished_in_the_logger(tmp_path, recorder):
    calls = recorder("wandb")
    with pytest.raises(ZeroDivisionError), Log(tmp_path, True) as log:
        log.open_loggers(["wandb"], {})
        _ = 1 / 0
    assert calls == [False]


def test_other_ranks_open_no_logger(tmp_path, recorder):
    calls = recorder("wandb")
    with Log(tmp_path / "run", False) as log:
        log.open_loggers(["wandb", "tensorboard"], {})
        log.numbers(1, {"a": 1.0})
        log.pictures("val", PICTURE, 1)
    assert not calls and not (tmp_path / "run").exists()
