"""The checkpoints of a run: which are kept, which is the best, and what happens to damaged ones."""

import os
from pathlib import Path

import pytest
from nursery import flip_bit

from common.errors import UserError
from common.files import checkpoint
from common.files.retention import CheckpointFolder

DAMAGE = {  # how a file is damaged, and a part of the reason in the message
    "truncated": (lambda data: data[: len(data) // 2], "damaged"),
    "zeroed": (lambda data: data[:200] + bytes(len(data) - 400) + data[-200:], "damaged"),
    "flipped": (flip_bit, "damaged"),
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


@pytest.mark.parametrize(("keep", "steps"), [(0, [4, 5]), (1, [4, 5]), (3, [3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_a_folder_keeps_as_many_as_configured_and_at_least_two(keep, steps, tmp_path):
    folder = CheckpointFolder(tmp_path, keep=keep)
    for step in (1, 2, 3, 4, 5):
        folder.save(step, {"step": step})
    assert folder.steps() == steps
    assert [checkpoint.load(path)["step"] for path in folder.last(2)] == [4, 5]
    assert [path.name for path in folder.last(3)] == [f"step_{step:08d}.pt" for step in steps[-3:]]


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(tmp_path, monkeypatch):
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
def test_the_best_can_be_replaced_and_marked_twice(links, tmp_path, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError(1, "no links")))
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        folder.save(step, {"step": step})
        folder.mark_best(step)
        folder.mark_best(step)
        assert folder.best()[1]["step"] == step
    assert names(folder) == ["best.pt", "step_00000001.pt", "step_00000002.pt"]
    assert os.path.samefile(tmp_path / "best.pt", tmp_path / "step_00000002.pt") == links
    folder.save(2, {"step": 99})  # writing the same step again does not write through the link
    assert folder.best()[1]["step"] == 2


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_the_previous_one_is_used(name, tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        folder.save(step, {"step": step})
    write(tmp_path / "step_00000002.pt", DAMAGE[name][0]((tmp_path / "step_00000002.pt").read_bytes()))
    warnings = []
    path, content = folder.latest(warnings.append)
    assert content["step"] == 1 and path.name == "step_00000001.pt"
    (warning,) = warnings
    assert "step_00000002.pt" in warning and DAMAGE[name][1] in warning
    assert warning.endswith("Resuming from step_00000001.pt instead.")


def test_the_next_save_keeps_the_undamaged_checkpoint_and_removes_a_damaged_later_one(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (10, 20):
        folder.save(step, {"step": step})
    write(tmp_path / "step_00000020.pt", b"")
    folder.save(15, {"step": 15})  # resumed from 10
    assert names(folder) == ["step_00000010.pt", "step_00000015.pt"]


def test_if_all_checkpoints_are_damaged_it_is_an_error_and_not_a_fresh_start(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        folder.save(step, {"step": step})
        write(tmp_path / f"step_{step:08d}.pt", b"text")
    with pytest.raises(UserError, match=r"no checkpoint in .*step_00000002.pt is .*step_00000001.pt is .*run_dir"):
        folder.latest()


def test_the_draft_of_a_killed_save_is_removed_at_the_start_and_only_by_the_writer(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(1, {"step": 1})
    write(tmp_path / ".step_00000002.pt.tmp", b"half")
    reader = CheckpointFolder(tmp_path, writes=False)
    reader.save(2, {"step": 2})
    reader.mark_best(1)
    assert names(reader) == [".step_00000002.pt.tmp", "step_00000001.pt"] and reader.latest()[1]["step"] == 1
    assert names(CheckpointFolder(tmp_path)) == ["step_00000001.pt"]


def test_steps_to_keep_are_kept_besides_the_last(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2, 3, 4, 5):
        folder.save(step, {"step": step}, keep_steps=[1, 3])
    assert folder.steps() == [1, 3, 4, 5]
    folder.save(6, {"step": 6}, keep_steps=[3])
    assert folder.steps() == [3, 5, 6]


def test_a_stop_has_its_own_file_which_the_next_save_removes(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (4, 8):
        folder.save(step, {"step": step})
    for step in (9, 10):  # stopped, resumed, and stopped again
        folder.save_stop(step, {"step": step})
        assert folder.latest()[1]["step"] == step
        assert names(folder) == ["step_00000004.pt", "step_00000008.pt", f"stop_{step:08d}.pt"]
    assert [path.name for path in folder.last(2)] == ["step_00000004.pt", "step_00000008.pt"]
    write(tmp_path / "stop_00000010.pt", b"")
    warnings = []
    assert folder.latest(warnings.append)[1]["step"] == 8 and "stop_00000010.pt is empty" in warnings[0]
    folder.save(12, {"step": 12})
    assert names(folder) == ["step_00000008.pt", "step_00000012.pt"]


def test_a_damaged_best_is_named_and_the_next_in_the_ranking_is_used(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        folder.save(step, {"step": step})
    folder.mark_best(2)
    (tmp_path / "step_00000002.pt").write_bytes(b"")  # best.pt is the same file
    warnings = []
    path, content = folder.best([2, 1], warnings.append)
    assert (path.name, content["step"]) == ("step_00000001.pt", 1)
    assert len(warnings) == 2 and "best.pt is empty" in warnings[0]
    assert warnings[0].endswith("Using step_00000001.pt instead.")
    warnings.clear()
    assert folder.best([2], warnings.append) is None and warnings[0].endswith("Using the last checkpoint instead.")


def test_if_the_best_cannot_be_written_the_previous_best_is_removed(tmp_path, monkeypatch):
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


def test_a_checkpoint_of_a_newer_version_is_not_skipped(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path)
    folder.save(1, {"step": 1})
    monkeypatch.setattr(checkpoint, "FORMAT", "triptych-2")
    folder.save(2, {"step": 2})
    monkeypatch.undo()
    with pytest.raises(UserError, match="use a newer Triptych"):
        folder.latest()


def refuse_odd_steps(path, content):
    if content["step"] % 2:
        raise UserError(f"{path} is odd.")


def test_a_checkpoint_of_another_run_is_skipped_with_its_reason_and_set_aside(tmp_path):
    folder, warnings = CheckpointFolder(tmp_path, keep=4), []
    for step in (2, 4, 5, 7):
        folder.save(step, {"step": step})
    path, _ = folder.latest(warnings.append, refuse_odd_steps)
    reasons = [f"{tmp_path}/step_0000000{step}.pt is odd. Resuming from {path.name} instead." for step in (7, 5)]
    assert path.name == "step_00000004.pt" and warnings == reasons
    assert [file.name for file in folder.set_aside()] == ["other_run_step_00000007.pt", "other_run_step_00000005.pt"]
    assert folder.steps() == [2, 4] and checkpoint.load(tmp_path / "other_run_step_00000007.pt")["step"] == 7
    folder.save(8, {"step": 8})
    assert (tmp_path / "other_run_step_00000007.pt").exists() and not folder.set_aside()


def test_a_reader_sets_nothing_aside(tmp_path):
    CheckpointFolder(tmp_path).save(2, {"step": 2})
    CheckpointFolder(tmp_path).save(3, {"step": 3})
    reader = CheckpointFolder(tmp_path, writes=False)
    assert reader.latest(lambda text: None, refuse_odd_steps)[1]["step"] == 2
    assert reader.set_aside() == [] and reader.steps() == [2, 3]


def test_if_no_checkpoint_is_of_the_run_the_reason_of_the_newest_is_raised(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (3, 5):
        folder.save(step, {"step": step})
    (tmp_path / "step_00000006.pt").write_text("damaged")
    with pytest.raises(UserError, match=r"step_00000005.pt is odd\.$"):
        folder.latest(check=refuse_odd_steps)


def test_a_best_of_another_run_is_named_and_the_next_in_the_ranking_is_used(tmp_path):
    folder, warnings = CheckpointFolder(tmp_path), []
    for step in (2, 3):
        folder.save(step, {"step": step})
    folder.mark_best(3)
    assert folder.best([2], warnings.append, refuse_odd_steps)[1]["step"] == 2
    assert warnings == [f"{tmp_path}/best.pt is odd. Using step_00000002.pt instead."]
