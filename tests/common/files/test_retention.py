"""The checkpoints of a run: which stay, which is the best, and what damage costs."""

import os
from pathlib import Path

import pytest
from nursery import flipped

from common.errors import UserError
from common.files import checkpoint
from common.files.retention import CheckpointFolder

DAMAGE = {  # how a file is spoilt, and a word of the reason that is given
    "truncated": (lambda data: data[: len(data) // 2], "damaged"),
    "zeroed": (lambda data: data[:200] + bytes(len(data) - 400) + data[-200:], "damaged"),
    "flipped": (flipped, "damaged"),
    "empty": (lambda data: b"", "empty"),
    "text": (lambda data: b"not a checkpoint at all", "no PyTorch checkpoint"),
}  # fmt: skip


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def names(folder: CheckpointFolder) -> list[str]:
    return sorted(os.listdir(folder.path))


def test_a_folder_keeps_the_last_two_and_the_best(tmp_path):
    folder = CheckpointFolder(tmp_path / "checkpoints")
    assert folder.latest() is None and folder.best() is None
    for step in (5, 1000, 2000, 123456789):
        path = folder.save(step, {"step": step})
        if step == 5:
            folder.mark_best(step)
    assert names(folder) == ["best.pt", "step_00002000.pt", "step_123456789.pt"]
    assert path == folder.path / "step_123456789.pt"
    assert folder.latest()[0] == path and folder.latest()[1]["step"] == 123456789
    assert folder.best()[1]["step"] == 5


@pytest.mark.parametrize(("keep", "left"), [(0, [4, 5]), (1, [4, 5]), (3, [3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_a_folder_keeps_as_many_as_it_is_told_and_never_fewer_than_two(keep, left, tmp_path):
    folder = CheckpointFolder(tmp_path, keep=keep)
    for step in (1, 2, 3, 4, 5):
        folder.save(step, {"step": step})
    assert folder.steps() == left
    assert [checkpoint.load(path)["step"] for path in folder.last(2)] == [4, 5]
    assert [path.name for path in folder.last(3)] == [f"step_{step:08d}.pt" for step in left[-3:]]


def test_a_checkpoint_that_cannot_be_written_costs_no_old_one(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        folder.save(step, {"step": step})
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        folder.save(3, {"step": 3})
    assert names(folder) == ["step_00000001.pt", "step_00000002.pt"]
    monkeypatch.undo()
    folder.save(3, {"step": 3})
    assert names(folder) == ["step_00000002.pt", "step_00000003.pt"]


@pytest.mark.parametrize("links", [True, False])
def test_the_best_is_whole_replaced_and_marked_twice(links, tmp_path, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError(1, "no links here")))
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        folder.save(step, {"step": step})
        folder.mark_best(step)
        folder.mark_best(step)
        assert folder.best()[1]["step"] == step
    assert names(folder) == ["best.pt", "step_00000001.pt", "step_00000002.pt"]
    assert os.path.samefile(tmp_path / "best.pt", tmp_path / "step_00000002.pt") == links
    folder.save(2, {"step": 99})  # the same step again does not write through the link
    assert folder.best()[1]["step"] == 2


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_newest_is_named_and_the_one_before_is_used(name, tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        folder.save(step, {"step": step})
    write(tmp_path / "step_00000002.pt", DAMAGE[name][0]((tmp_path / "step_00000002.pt").read_bytes()))
    said = []
    path, content = folder.latest(said.append)
    assert content["step"] == 1 and path.name == "step_00000001.pt"
    (line,) = said
    assert "step_00000002.pt" in line and DAMAGE[name][1] in line and line.endswith("step_00000001.pt instead.")


def test_the_next_save_keeps_the_whole_one_and_drops_the_damaged_one_ahead(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (10, 20):
        folder.save(step, {"step": step})
    write(tmp_path / "step_00000020.pt", b"")
    folder.save(15, {"step": 15})  # resumed from 10
    assert names(folder) == ["step_00000010.pt", "step_00000015.pt"]


def test_all_damaged_is_an_error_and_never_a_fresh_start(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        folder.save(step, {"step": step})
        write(tmp_path / f"step_{step:08d}.pt", b"text")
    with pytest.raises(UserError, match=r"no checkpoint in .*step_00000002.pt is .*step_00000001.pt is .*run_dir"):
        folder.latest()


def test_what_a_killed_save_left_is_removed_at_the_start_by_the_writer_alone(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(1, {"step": 1})
    write(tmp_path / ".step_00000002.pt.tmp", b"half")
    other = CheckpointFolder(tmp_path, writes=False)
    other.save(2, {"step": 2})
    other.mark_best(1)
    assert names(other) == [".step_00000002.pt.tmp", "step_00000001.pt"] and other.latest()[1]["step"] == 1
    assert names(CheckpointFolder(tmp_path)) == ["step_00000001.pt"]


def test_spared_steps_stay_beside_the_last(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2, 3, 4, 5):
        folder.save(step, {"step": step}, keep_steps=[1, 3])
    assert folder.steps() == [1, 3, 4, 5]
    folder.save(6, {"step": 6}, keep_steps=[3])
    assert folder.steps() == [3, 5, 6]


def test_a_stop_has_a_file_of_its_own_that_goes_with_the_next_save(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (4, 8):
        folder.save(step, {"step": step})
    for step in (9, 10):  # stopped, continued, and stopped again
        folder.save_stop(step, {"step": step})
        assert folder.latest()[1]["step"] == step
        assert names(folder) == ["step_00000004.pt", "step_00000008.pt", f"stop_{step:08d}.pt"]
    assert [path.name for path in folder.last(2)] == ["step_00000004.pt", "step_00000008.pt"]
    write(tmp_path / "stop_00000010.pt", b"")
    said = []
    assert folder.latest(said.append)[1]["step"] == 8 and "stop_00000010.pt is empty" in said[0]
    folder.save(12, {"step": 12})
    assert names(folder) == ["step_00000008.pt", "step_00000012.pt"]


def test_a_damaged_best_is_named_and_the_next_in_the_ranking_is_taken(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        folder.save(step, {"step": step})
    folder.mark_best(2)
    (tmp_path / "step_00000002.pt").write_bytes(b"")  # best.pt is the same file
    said = []
    path, content = folder.best([2, 1], said.append)
    assert (path.name, content["step"]) == ("step_00000001.pt", 1)
    assert len(said) == 2 and "best.pt is empty" in said[0] and said[0].endswith("Using step_00000001.pt instead.")
    said.clear()
    assert folder.best([2], said.append) is None and said[0].endswith("Using the last checkpoint instead.")


def test_a_best_that_cannot_be_written_leaves_none_rather_than_the_wrong_one(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        folder.save(step, {"step": step})
    folder.mark_best(1)
    for name in ("link", "fsync"):
        monkeypatch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        folder.mark_best(2)
    assert names(folder) == ["step_00000001.pt", "step_00000002.pt"]
    assert folder.best([2, 1])[1]["step"] == 2


def test_a_checkpoint_of_a_newer_version_is_not_passed_over(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path)
    folder.save(1, {"step": 1})
    monkeypatch.setattr(checkpoint, "FORMAT", "triptych-2")
    folder.save(2, {"step": 2})
    monkeypatch.undo()
    with pytest.raises(UserError, match="use a newer Triptych"):
        folder.latest()
