"""Paths, permissions and limits that the system refuses are one sentence, and defects keep their traceback."""

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.machine.system_errors import describe, ensure_open_files

LONG = "n" * 300
RUN = ("model=vit", "trainer.steps=2", "trainer.device=cpu", "model.width=16", "model.layers=1", "model.heads=2")
RUN += ("schedule.warmup=0", "trainer.eval_every=1", "run_dir=run", "resume=auto")


@pytest.mark.parametrize(
    "command",
    [
        ("predict", f"checkpoint={LONG}", "input=x"),
        ("evaluate", f"checkpoint={LONG}/x"),
        ("train", "model=vit", f"checkpoint={LONG}"),
        ("train", "model=vit", f"run_dir={LONG}"),
        ("train", "model=vit", "data=imagefolder", f"data.root={LONG}"),
        ("train", "model=detr", "data=coco", f"data.root={LONG}"),
        ("train", "model=seq2seq", "data=parallel_text", f"data.train.pairs={LONG}"),
        ("train", "--config-dir", LONG, "model=vit"),
    ],
)
def test_a_name_that_is_too_long_is_one_sentence(command: tuple[str, ...], inside: Callable[..., str]) -> None:
    assert "nnnnn" in inside(*command, code=2)


def test_folders_without_permission_are_one_sentence(inside: Callable[..., str], without_privileges: Any) -> None:
    inside("train", *RUN)
    for path in (Path("run"), *Path("run").rglob("*")):
        path.chmod(0o755)
    Path("locked").mkdir(mode=0o000)
    with without_privileges():
        checkpoint = "checkpoint=run/checkpoints/best.pt"
        for command in (
            ("predict", checkpoint, "input=locked/x"),
            ("predict", "checkpoint=locked/x.pt", "input=x"),
            ("evaluate", checkpoint, "output=locked/x"),
            ("train", *RUN[:-2], "run_dir=locked/x"),
            ("train", *RUN[:-2], "run_dir=locked"),
            ("train", *RUN[:-2], "checkpoint=locked/x.pt"),
        ):
            message = inside(*command, code=2)
            assert "locked" in message and "Permission denied" in message


@pytest.mark.parametrize("finished", [True, False])
def test_a_read_only_run_folder_on_resume_is_one_sentence(
    finished: bool, inside: Callable[..., str], without_privileges: Any
) -> None:
    inside("train", *RUN)
    if not finished:
        Path("run/results.json").unlink()
    for path in (Path("run"), *Path("run").iterdir()):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(os.listdir("run"))
    with without_privileges():
        message = inside("train", *RUN, code=2)
    assert (
        message.startswith("run_dir=run: cannot be written (Permission denied)") and sorted(os.listdir("run")) == before
    )


def test_too_few_open_files_are_allowed_more_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = []
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: changed.append(limits))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (32, 32))
    ensure_open_files(workers=0)
    with pytest.raises(
        UserError, match=r"ulimit -n is 32, and 2 workers need 48 open files; raise it \(ulimit -n 48\)"
    ):
        ensure_open_files(workers=2)
    assert not changed
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (32, 1024))
    ensure_open_files(workers=2)
    assert changed == [(48, 1024)]


def test_a_door_refuses_such_a_limit(inside: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (32, 32))
    assert inside("train", *RUN, "trainer.workers=2", code=2).startswith("ulimit -n is 32, and 2 workers need 48")
    assert not Path("run").exists()


def test_an_error_that_may_be_a_defect_is_none() -> None:
    assert describe(FileNotFoundError(errno.ENOENT, "No such file or directory", "x")) is None
    assert describe(OSError(errno.EINVAL, "Invalid argument")) is None
    assert describe(OSError(errno.EMFILE, "Too many open files")).startswith("Too many open files: more than the limit")
