"""Conversion to COCO JSON: the files, their names of images, the report, and the refusals."""

import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import annotating
import numpy as np
import pytest
from annotating import CLASSES, FORMATS, Picture

from common.config.check import build
from common.config.compose import configure
from common.types import SPLITS
from scripts.convert import main

Printed = pytest.CaptureFixture[str]


def convert(format: str, root: Path, output: Path, *keys: str) -> int:
    """Run the script on a folder in one of `FORMATS`."""
    _, name, own = FORMATS[format]
    own_keys = [f"data.{key}={value}".replace("'", "") for key, value in own.items()]
    return main([f"data={name}", f"data.root={root}", *own_keys, *keys, "--output", str(output)])


def trained_data(printed: str) -> Any:
    """The data set of the command that the report ends with."""
    words = shlex.split(printed.splitlines()[-1].partition("train.py ")[2])
    return build(configure("train", words)["data"])


def contents(folder: Path) -> dict[str, Any]:
    """The JSON files in a folder, by split."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


@pytest.mark.parametrize("format", [name for name, (_, data, _) in FORMATS.items() if data != "coco"])
def test_sixty_pictures_become_the_same_json(
    format: str, tmp_path: Path, capsys: Printed, real_data: Callable[..., Path]
):
    """As the JSON that the test writes of them, up to 1e-3 pixels, and cut by the names as train.py cuts them."""
    pictures = annotating.blood_cells(real_data("bccd"))
    FORMATS[format][0](pictures, tmp_path / "set")
    annotating.write_coco_json(pictures, tmp_path / "expected.json")
    assert convert(format, tmp_path / "set", tmp_path / "out") == 0
    expected = json.loads((tmp_path / "expected.json").read_text())
    boxes: dict[str, list[Any]] = {image["file_name"]: [] for image in expected["images"]}
    names = {image["id"]: image["file_name"] for image in expected["images"]}
    for box in expected["annotations"]:
        boxes[names[box["image_id"]]].append(box)
    files = contents(tmp_path / "out")
    assert {split: len(content["images"]) for split, content in files.items()} == {"train": 48, "val": 6, "test": 6}
    for content in files.values():
        assert content["categories"] == [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
        assert [box["id"] for box in content["annotations"]] == [*range(1, len(content["annotations"]) + 1)]
        for image in content["images"]:
            ours = [box for box in content["annotations"] if box["image_id"] == image["id"]]
            theirs = boxes.pop(image["file_name"])
            assert (image["width"], image["height"]) == (640, 480)
            assert [box["category_id"] for box in ours] == [box["category_id"] for box in theirs]
            np.testing.assert_allclose([box["bbox"] for box in ours], [box["bbox"] for box in theirs], atol=1e-3)
            np.testing.assert_allclose([box["area"] for box in ours], [box["area"] for box in theirs], rtol=1e-4)
            assert {box["iscrowd"] for box in ours} <= {0}
    assert not boxes, "each picture is in one split"
    data = trained_data(capsys.readouterr().out)
    assert [data.count(split) for split in SPLITS] == [48, 6, 6]
    assert data.sample("test", 0, None)["original_size"] == (480, 640)


def picture(name: str, *objects: Any) -> Picture:
    """A picture of 8 x 6 pixels with one cat on it, or with the given objects."""
    return Picture(Path(name), 8, 6, list(objects or [("cat", 1, 1, 3, 2)]))


def write_set(root: Path) -> None:
    """Four pictures in VOC's format, with what is left out or counted."""
    annotating.draw([picture(f"{name}.png") for name in "abcde"], root)
    crowded = picture("a.png", ("cat", 1, 1, 3, 2), ("dog", 2, 2, 3, 3), ("cat", 5, 5, 9, 9), ("dog", 4, 4, 0, 1))
    annotating.write_xml([crowded], root, difficult=[1])
    annotating.write_xml([picture(f"{name}.png") for name in "bcdx"], root, with_size=False)


def test_the_report_says_how_files_were_read_and_what_was_left_out(tmp_path: Path, capsys: Printed):
    root, output = tmp_path / "set", tmp_path / "a new/folder"
    write_set(root)
    keys = ["data=voc", f"data.root={root}", "data.val_count=0", "data.test_share=0", "--output", str(output)]
    assert main(keys) == 0
    printed = capsys.readouterr().out.replace('"', "")
    for line in (
        f"read      data.root={root}: the layout of XML files beside the images",
        "read      classes: cat, dog",
        f"read      train: 4 images, 5 boxes of {root}",
        "left out of the targets: 1 x crowd (annotation a.xml, object 2)",
        "left out of the targets: 1 x box without area inside its image (annotation a.xml, object 4)",
        "clipped to the image: 1 x box (annotation a.xml, object 3)",
        f"left out: 1 x XML file without an image (the first is {root / 'x.xml'})",
        f"left out: 1 x image without an XML file (the first is {root / 'e.png'})",
        "treated as crowd: 1 x object marked as difficult (the first is a.xml, object 2)",
        "corners of boxes are read as first and last pixels, counted from 1 (data.first_pixel=auto",
        "set lacks the sizes of 3 images, which were read from their files",
        f"wrote     {output / 'train.json'}: 4 images",
    ):
        assert line in printed
    data = trained_data(printed)
    assert data.count("train") == 4 and not data.count("val") and not data.count("test")
    truth = data.ground_truth("train")
    assert [box["iscrowd"] for box in truth["annotations"]] == [0, 1, 0, 0, 0, 0, 0]


def test_names_are_relative_to_images_beside_the_files(tmp_path: Path, capsys: Printed):
    """So that data.root= reads the result; elsewhere, the folder of each split's images is named."""
    for split in ("train", "val"):
        annotating.draw([picture(f"{split}-1.png")], tmp_path / "images" / split)
        annotating.write_label_files([picture(f"{split}-1.png")], tmp_path / "labels" / split, ["cat"])
    (tmp_path / "classes.txt").write_text("cat")
    assert convert("yolo_classes", tmp_path, tmp_path, "data.test_share=0") == 0
    printed = capsys.readouterr().out
    command = f"python train.py model=detr_r50 data=coco data.root={tmp_path} data.exif=apply data.test_share=0"
    assert printed.splitlines()[-1] == f"train     {command}"
    assert [c["images"][0]["file_name"] for c in contents(tmp_path).values()] == ["train/train-1.png", "val/val-1.png"]
    assert trained_data(printed).sample("val", 0, None)["file"] == str(tmp_path / "images/val/val-1.png")
    output = tmp_path / "out"
    assert convert("yolo_classes", tmp_path, output, "data.test_share=0") == 0
    printed = capsys.readouterr().out
    assert f"data.val.images={tmp_path / 'images/val'} " in printed
    assert f"data.val.annotations={output / 'val.json'} " in printed
    assert trained_data(printed).sample("val", 0, None)["file"] == str(tmp_path / "images/val/val-1.png")


def test_files_are_overwritten_only_when_it_is_said(tmp_path: Path, capsys: Printed):
    write_set(tmp_path / "set")
    output = tmp_path / "out"
    keys = ["data=voc", f"data.root={tmp_path / 'set'}", "--output", str(output)]
    assert main(keys) == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    assert sorted(before) == ["test.json", "train.json", "val.json"]
    capsys.readouterr()
    assert main([*keys, "data.first_pixel=0"]) == 2
    assert re.search(r"^--output .* holds train.json, val.json, test.json; .* --overwrite", capsys.readouterr().err)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert main([*keys, "data.first_pixel=0", "--overwrite"]) == 0
    assert (output / "train.json").read_bytes() != before["train.json"]
    assert main([*keys, "data.test_share=0", "--overwrite"]) == 2
    assert "test.json, but the data have no test; remove that file" in capsys.readouterr().err


def test_names_that_are_not_utf8_come_back(tmp_path: Path, capsys: Printed):
    name = os.fsdecode(b"\xff.png")
    annotating.draw([picture(name)], tmp_path / "images")
    (tmp_path / "images").joinpath(f"{name[:-4]}.xml").write_text(annotating.xml_text(picture("x.png")))
    keys = ["data=voc", f"data.root={tmp_path / 'images'}", "data.val_count=0", "data.test_share=0"]
    assert main([*keys, "--output", str(tmp_path)]) == 0
    assert Path(trained_data(capsys.readouterr().out).sample("train", 0, None)["file"]).name == name


REFUSED = {
    "no format": (["data.root={root}"], r"^The format is missing; give data=voc, data=yolo or data=csv"),
    "COCO": (["data=coco", "data.root={root}"], r"^data=coco needs no conversion"),
    "another wing": (["data=digits"], r"do not fit together"),
    "unknown": (["data=vok"], r"there is no configs/data/vok.yaml; did you mean voc\?"),
    "no root": (["data=voc"], r"There are no train images: give data.root"),
    "key": (["data=voc", "data.rot={root}"], r"data.rot"),
    "another key": (["data=voc", "trainer.steps=3"], r"^trainer.steps=3 is no key of the data"),
    "layout": (["data=yolo", "data.root={root}"], r"has none of the layouts data.yaml"),
    "file": (["data=voc", "data.root={root}", "--output={root}/a.xml"], r"a.xml"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_one_sentence_and_exit_code_2(tmp_path: Path, capsys: Printed, name: str):
    words, message = REFUSED[name]
    write_set(tmp_path / "set")
    arguments = [word.format(root=tmp_path / "set") for word in words]
    if not any(word.startswith("--output") for word in arguments):
        arguments += ["--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert not printed.out and len(printed.err.splitlines()) == 1 and re.search(message, printed.err), printed.err
    assert not (tmp_path / "out").exists()
