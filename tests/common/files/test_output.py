"""A folder that cannot take the answers is one sentence, and no file of the user's is replaced without a word."""

import errno
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from common.errors import UserError
from common.files.output import create_output, refuse_input_folder, refuse_run_folder, write_answer, writing_to


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file", "File exists"),
        ("file/inside", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("x" * 300 + "/inside", "File name too long"),
        ("locked", "Permission denied"),
        ("locked/inside", "Permission denied"),
    ],
)
def test_a_folder_that_cannot_be_written_is_named_before_anything_is_computed(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_privileges: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("locked").mkdir(mode=0o555)
    with (
        without_privileges() if name.startswith("locked") else nullcontext(),
        pytest.raises(UserError, match=rf"output=.* cannot be written \({reason}\); name anoth"),
    ):
        create_output(Path(name))
    assert sorted(os.listdir()) == ["file", "locked"] and not os.listdir("locked")


def test_a_full_disk_asks_for_room(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No space left on device"), writing_to(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError), writing_to(tmp_path):  # not about the output
        open(tmp_path.parent / "none")


def test_the_folder_of_a_run_is_refused_and_a_new_one_is_created_empty(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    with pytest.raises(UserError, match="is the folder of a run"):
        create_output(run)
    create_output(tmp_path / "a/b")
    assert not os.listdir(tmp_path / "a/b")


def test_the_folder_of_the_input_is_refused_by_any_of_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    os.symlink("photos", "link")
    for folder in ("photos", "photos/../photos", "link", str(tmp_path / "photos")):
        with pytest.raises(UserError, match="is the folder of the input"):
            refuse_input_folder(Path(folder), "photos")
    Path("photos/p.png").write_text("")
    with pytest.raises(UserError, match="is the folder of the input"):
        refuse_input_folder(Path("photos"), "photos/p.png")
    Path("photos/v.mp4").write_text("")
    for pattern in ("photos/*.png", "*/p.png", "photo?", "photos/v.mp4"):
        with pytest.raises(UserError, match="is the folder of the input"):
            refuse_input_folder(Path("photos"), pattern)
    others = (("photos/answers", "photos"), ("photos/new", "photos/p.png"), (".", "-"), ("photos", "photos/lines.txt"))
    others += (("photos/answers", "photos/*.png"), (".", "photos/*.png"))
    for folder, input in others:
        refuse_input_folder(Path(folder), input)


def test_the_folder_of_a_run_is_refused_and_so_is_one_inside_it(tmp_path: Path) -> None:
    (tmp_path / "runs/a/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/a/config.yaml").write_text("")
    for folder in ("runs/a", "runs/a/predictions", "runs/a/new/folder"):
        with pytest.raises(UserError, match=r"the folder of a run.*, whose results would be replaced; name another\.$"):
            refuse_run_folder(tmp_path / folder)
    for folder in ("runs", "runs/b", "predictions"):
        refuse_run_folder(tmp_path / folder)


def test_an_answer_that_replaces_that_for_another_file_of_the_same_name_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, answer = tmp_path / "a/x.png", tmp_path / "b/x.png", tmp_path / "answers/x.png.boxes.json"
    for source in (first, second):
        source.parent.mkdir()
        source.write_text("")
    for _ in range(2):
        write_answer(answer, first, {"objects": []})
    assert capsys.readouterr().err == "" and json.loads(answer.read_text()) == {"file": str(first), "objects": []}
    write_answer(answer, second, {"objects": [1]})
    assert f"held the answer for {first}, which {second} of the same name now replaces" in capsys.readouterr().err
    second.rename(tmp_path / "x.png")  # a moved file
    write_answer(answer, tmp_path / "x.png", {"objects": []})
    answer.write_text("[]")  # not ours
    write_answer(answer, first, {"objects": []})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("model", ["vit", "detr"])
def test_both_doors_refuse_such_an_output(model: str, inside: Callable[..., str], tmp_path: Path) -> None:
    arguments = [f"model={model}", "run_dir=run", "trainer.steps=1", "trainer.device=cpu", "schedule.warmup=0"]
    small = ["model.width=16", "model.layers=1", "model.heads=2"]
    if model == "detr":
        small = ["model.width=16", "model.queries=3", "data.train_count=8", "data.val_count=4", "data.test_count=4"]
    inside("train", *arguments, *small)
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (32, 32)).save(photos / "p.png")
    (photos / "p.png.boxes.jpg").write_bytes((photos / "p.png").read_bytes())
    before = {path.name: path.read_bytes() for path in photos.iterdir()}
    checkpoint = "checkpoint=run/checkpoints/best.pt"
    assert "is the folder of the input" in inside("predict", checkpoint, "input=photos", "output=photos", code=2)
    assert before == {path.name: path.read_bytes() for path in photos.iterdir()}
    (tmp_path / "file").write_text("")
    for door, more in (("predict", ["input=photos"]), ("evaluate", [])):
        for folder, reason in (("file", "File exists"), ("file/inside", "Not a directory"), ("n" * 300, "255 bytes")):
            message = inside(door, checkpoint, *more, f"output={folder}", code=2)
            assert message.startswith(f"output={folder[:40]}") and reason in message
        assert "is the folder of a run" in inside(door, checkpoint, *more, "output=run", code=2)
        assert "is inside the folder of a run" in inside(door, checkpoint, *more, "output=run/predictions", code=2)
