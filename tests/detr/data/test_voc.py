"""Pascal VOC's layouts and XML: the splits, the first pixel, what is left out, and an error for each mistake."""

import os
import re
from pathlib import Path
from typing import Any

import annotating
import pytest
from annotating import Picture
from PIL import Image

from common.errors import UserError
from common.types import SPLITS
from detr.data import voc_xml
from detr.data.coco import Files
from detr.data.transforms import Augmentation
from detr.data.voc import Voc

UNCHANGED = Augmentation(kind="none", sizes=[1], eval_size=6, max_size=1333, middle_sizes=[1], crop=(1, 1))
NONE = Files(images=None, annotations=None)


def voc(root: Path | None, **keys: Any) -> Voc:
    """A data set with the defaults of configs/data/voc.yaml, but for the cuts: nothing is cut from train."""
    plain: dict[str, Any] = {"train": NONE, "val": NONE, "test": NONE, "val_count": 0, "classes": None}
    keys = {"root": None if root is None else str(root), **plain, "first_pixel": "auto", **keys}
    return Voc(batch_size=2, augmentation=UNCHANGED, pad_to=1, cache=False, **keys)


def picture(name: str, *objects: Any) -> Picture:
    """A picture of 8 x 6 pixels, by default with one cat on it, which covers the pixels 2 to 4 and 2 to 3."""
    return Picture(Path(name), 8, 6, list(objects or [("cat", 1, 1, 3, 2)]))


def names(data: Voc, *splits: Any) -> dict[str, list[str]]:
    """The files' names of each split that has images."""
    return {s: [Path(data.where(s, i)).name for i in range(data.count(s))] for s in splits or SPLITS if data.count(s)}


def devkit(root: Path, **lists: list[str]) -> Path:
    """Write VOCdevkit's folders with pictures a to f and the given lists."""
    pictures = [picture(f"{name}.jpg") for name in "abcdef"]
    annotating.write_xml(pictures, root / "Annotations")
    annotating.draw(pictures, root / "JPEGImages")
    for name, lines in lists.items():
        annotating.write_list(lines, root / f"ImageSets/Main/{name}.txt")
    return root


def test_the_lists_of_vocdevkit_are_the_splits(tmp_path: Path):
    data = voc(devkit(tmp_path, train=["b", "a"], val=["c"], test=["d.jpg", ""], trainval=["a", "b", "c"], x=["f"]))
    assert names(data) == {"train": ["b.jpg", "a.jpg"], "val": ["c.jpg"], "test": ["d.jpg"]}
    assert data.summary()[0] == f"data.root={tmp_path}: the layout of VOCdevkit"


def test_trainval_takes_the_place_of_train_and_val(tmp_path: Path):
    data = voc(devkit(tmp_path, val=["c"], trainval=["a", "b", "c"], test=["d"]))
    assert names(data) == {"train": ["a.jpg", "b.jpg", "c.jpg"], "test": ["d.jpg"]}


def test_a_list_may_be_given_by_its_path(tmp_path: Path):
    devkit(tmp_path, train=["a"], trainval=["a", "b", "c"])
    files = {"images": str(tmp_path / "JPEGImages"), "annotations": str(tmp_path / "ImageSets/Main/trainval.txt")}
    assert names(voc(tmp_path, train=Files(**files))) == {"train": ["a.jpg", "b.jpg", "c.jpg"]}


def test_the_only_year_in_vocdevkit_is_taken_and_several_are_refused(tmp_path: Path):
    devkit(tmp_path / "VOCdevkit/VOC2007", train=["a"])
    for root in (tmp_path, tmp_path / "VOCdevkit"):
        assert names(voc(root)) == {"train": ["a.jpg"]}
    devkit(tmp_path / "VOCdevkit/VOC2012", train=["a"])
    with pytest.raises(UserError, match=r"VOCdevkit holds .*VOC2007, .*VOC2012; give one of them"):
        voc(tmp_path / "VOCdevkit").count("train")


def test_a_test_list_without_any_xml_file_has_no_annotations(tmp_path: Path):
    data = voc(devkit(tmp_path, train=["a"], test=["x"]))
    Image.new("RGB", (9, 7)).save(tmp_path / "JPEGImages/x.jpg")
    assert names(data)["test"] == ["x.jpg"] and "annotations" not in data.ground_truth("test")
    assert data.ground_truth("test")["images"][0]["width"] == 9
    for split, lines in (("test", ["x", "b"]), ("train", ["x"])):
        annotating.write_list(lines, tmp_path / f"ImageSets/Main/{split}.txt")
        with pytest.raises(UserError, match=r"1 of the .* names in .*\.txt have no XML file, the first .*x.xml"):
            voc(tmp_path).count(split)


def test_xml_files_beside_images_or_in_folders_are_recognised(tmp_path: Path):
    pictures = [picture("b.png"), picture("a.png")]
    annotating.write_small(tmp_path / "beside", pictures)
    annotating.draw(pictures, tmp_path / "folders/images")
    annotating.write_xml(pictures, tmp_path / "folders/annotations")
    for split in ("train", "valid", "test"):
        annotating.write_small(tmp_path / "roboflow" / split, [picture(f"{split}.png")])
    layouts = {"beside": "beside the images", "folders": "in a folder beside that", "roboflow": "in a folder for each"}
    for name, layout in layouts.items():
        data = voc(tmp_path / name)
        assert layout in data.summary()[0]
        expected = {"train": ["train.png"], "val": ["valid.png"], "test": ["test.png"]}
        assert names(data) == (expected if name == "roboflow" else {"train": ["a.png", "b.png"]})
    with pytest.raises(UserError, match=r"has none of the layouts VOCdevkit .*; give .*, or data.train.images"):
        voc(tmp_path).count("train")


@pytest.mark.parametrize(
    ("first_pixel", "left", "box", "reason"),
    [
        ("auto", 1, (1, 1, 3, 2), "first and last pixels, counted from 1 (data.first_pixel=auto: no xmin or ymin"),
        ("auto", 0, (0, 2, 5, 2), "positions between pixels, counted from 0 (data.first_pixel=auto: 1 boxes have an"),
        (0, 1, (2, 2, 2, 1), "positions between pixels, counted from 0 (data.first_pixel=0)"),
        (1, 1, (1, 1, 3, 2), "first and last pixels, counted from 1 (data.first_pixel=1)"),
    ],
)
def test_the_first_pixel_is_chosen_and_said(tmp_path: Path, first_pixel: Any, left: int, box: Any, reason: str):
    """A corner at 0 in any split shows that the corners of all splits are counted from 0."""
    annotating.write_xml([picture("a.png", ("cat", 1, 1, 3, 2))], tmp_path / "train", first_pixel=1)
    annotating.write_xml([picture("b.png", ("cat", left, 2, 5, 2))], tmp_path / "test", first_pixel=int(left > 0))
    for split, name in (("train", "a.png"), ("test", "b.png")):
        annotating.draw([picture(name)], tmp_path / split)
    data = voc(tmp_path, first_pixel=first_pixel)
    split = "test" if left == 0 else "train"
    assert tuple(data.ground_truth(split)["annotations"][0]["bbox"]) == box
    assert any(f"{split}: corners of boxes are read as {reason}" in line for line in data.summary())


def test_difficult_objects_are_crowds(tmp_path: Path):
    """They are no targets, and pycocotools ignores detections of crowds."""
    annotating.write_xml([picture("a.png", ("cat", 1, 1, 3, 2), ("dog", 2, 2, 3, 3))], tmp_path, difficult=[1])
    annotating.draw([picture("a.png")], tmp_path)
    data = voc(tmp_path)
    assert data.sample("train", 0, None)["labels"].tolist() == [0]
    assert [box["iscrowd"] for box in data.ground_truth("train")["annotations"]] == [0, 1]
    note = "train: treated as crowd: 1 x object marked as difficult (the first is a.xml, object 2)"
    assert note in data.summary()


def test_what_has_no_partner_is_left_out_and_counted(tmp_path: Path):
    annotating.write_small(tmp_path, [picture("a.png")])
    annotating.write_xml([picture("b.png"), picture("c.png")], tmp_path)
    annotating.draw([picture("d.png")], tmp_path)
    data = voc(tmp_path)
    assert names(data) == {"train": ["a.png"]}
    summary = "\n".join(data.summary())
    assert f"left out: 2 x XML file without an image (the first is {tmp_path / 'b.xml'})" in summary
    assert f"left out: 1 x image without an XML file (the first is {tmp_path / 'd.png'})" in summary


def test_an_image_is_found_by_the_name_of_the_xml_file_and_else_by_filename(tmp_path: Path):
    """A renamed pair keeps the old <filename>; the accent is one character in one name and two in the other."""
    annotating.write_xml([picture("old.png")], tmp_path)
    os.rename(tmp_path / "old.xml", tmp_path / "caf\u00e9.xml")
    annotating.draw([picture("cafe\u0301.png")], tmp_path)
    assert names(voc(tmp_path)) == {"train": ["cafe\u0301.png"]}
    os.rename(tmp_path / "cafe\u0301.png", tmp_path / "old.png")
    assert names(voc(tmp_path)) == {"train": ["old.png"]}
    annotating.draw([picture("caf\u00e9.jpg"), picture("caf\u00e9.png")], tmp_path)
    with pytest.raises(UserError, match=r"caf\u00e9.xml may belong to caf\u00e9.jpg or caf\u00e9.png; .*<filename>"):
        names(voc(tmp_path))


def test_names_that_are_not_utf8_are_read(tmp_path: Path):
    name = os.fsdecode(b"\xff\xfe")
    devkit(tmp_path)
    annotating.draw([picture(f"{name}.png")], tmp_path / "JPEGImages")
    (tmp_path / "Annotations" / f"{name}.xml").write_text(annotating.xml_text(picture("x.png")))
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_bytes(b"\xff\xfe\n")
    data = voc(tmp_path)
    assert names(data) == {"train": [f"{name}.png"]} and data.sample("train", 0, None)["labels"].tolist() == [0]


VALID = annotating.xml_text(picture("a.png"))
LAUGHS = '<!DOCTYPE a [<!ENTITY l "ha">' + "".join(f'<!ENTITY l{i} "{"&l;" * 10}">' for i in range(9)) + "]>"
BROKEN = {
    "not XML": ("<annotation><object>", r"a.xml is not XML \(no element found"),
    "empty": ("", r"a.xml is not XML \(no element found"),
    "bytes": ("\0", r"a.xml is not XML"),
    "another encoding": (
        '<?xml version="1.0" encoding="klingon"?><a/>',
        r"a.xml is not XML \(unknown encoding",
    ),
    "laughs": (f"{LAUGHS}<annotation>&l8;</annotation>", r"a.xml declares XML entities"),
    "another root": ("<html/>", r"a.xml is no annotation of Pascal VOC: its first element is <html>"),
    "no name": (VALID.replace(">cat<", "> <"), r"a.xml, object 1, has no <name>"),
    "no box": (VALID.replace("bndbox", "robndbox"), r"a.xml, object 1, has no <bndbox>"),
    "no corner": (VALID.replace("xmin", "x"), r"a.xml, object 1, has '' as <xmin>; expected a number"),
    "NaN": (VALID.replace("<xmax>4<", "<xmax>nan<"), r"a.xml, object 1, has 'nan' as <xmax>; expected a number"),
    "infinite": (VALID.replace("<xmax>4<", "<xmax>1e999<"), r"has '1e999' as <xmax>; expected a number"),
    "huge": (VALID.replace("<xmax>4<", "<xmax>1e99<"), r'Annotation "a.xml, object 1" of .* has the "bbox"'),
    "text": (VALID.replace("<xmax>4<", "<xmax>four<"), r"has 'four' as <xmax>; expected a number"),
    "size": (VALID.replace("<width>8<", "<width>wide<"), r"a.xml, has 'wide' as <width>; expected a number"),
    "negative size": (VALID.replace("<width>8<", "<width>-8<"), r'no positive "height" and "width" \(width is -8\)'),
    "difficult": (VALID.replace("<difficult>0", "<difficult>perhaps"), r"has perhaps as <difficult>; expected 0 or 1"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_is_named_in_one_sentence(tmp_path: Path, fault: str):
    text, message = BROKEN[fault]
    annotating.write_small(tmp_path, [picture("a.png")])
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(UserError, match=message):
        voc(tmp_path).count("train")


def test_a_named_pipe_is_named_and_nothing_waits_for_it(tmp_path: Path):
    annotating.draw([picture("a.png")], tmp_path)
    os.mkfifo(tmp_path / "a.xml")
    with pytest.raises(UserError, match=r"a.xml cannot be read \(it is a named pipe"):
        voc(tmp_path).count("train")


def test_a_deeply_nested_file_is_read(tmp_path: Path):
    text = f"<annotation>{'<part>' * 100_000}{'</part>' * 100_000}</annotation>"
    (tmp_path / "a.xml").write_text(text)
    assert voc_xml.read(tmp_path / "a.xml").objects == []


@pytest.mark.parametrize("missing", ["<size>.*</size>", "<width>8</width>", "<height>6</height>"])
def test_a_size_that_the_file_lacks_is_read_from_the_image(tmp_path: Path, missing: str):
    annotating.write_small(tmp_path, [picture("a.png")])
    path = tmp_path / "a.xml"
    path.write_text(re.sub(missing, "", path.read_text()))
    data = voc(tmp_path)
    assert data.ground_truth("train")["images"][0] == {"id": 1, "file_name": "a.png", "height": 6, "width": 8}
    assert f"train: {tmp_path.name} lacks the sizes of 1 images, which were read from their files" in data.summary()


def test_an_image_of_another_size_than_stated_is_refused(tmp_path: Path):
    annotating.write_small(tmp_path, [picture("a.png")])
    Image.new("RGB", (9, 6)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a.png has 9 x 6 pixels, but its annotations say 8 x 6"):
        voc(tmp_path).sample("train", 0, None)


def test_a_set_without_files_or_without_a_root_is_refused_in_one_sentence(tmp_path: Path):
    with pytest.raises(UserError, match=r"There are no train images: give data.root \(a folder with VOCdevkit"):
        voc(None).count("train")
    with pytest.raises(UserError, match=r"data.root=.*none is no folder with one of the layouts VOCdevkit"):
        voc(tmp_path / "none").count("train")
    annotating.write_xml([picture("a.png")], tmp_path)
    with pytest.raises(UserError, match=r"has no XML file of an image in "):
        voc(tmp_path).count("train")
    devkit(tmp_path / "kit", train=[])
    with pytest.raises(UserError, match=r"train.txt names no image"):
        voc(tmp_path / "kit").count("train")
    (tmp_path / "train.txt").write_text("a\n")
    files = Files(images=str(tmp_path), annotations=str(tmp_path / "train.txt"))
    with pytest.raises(UserError, match=r"train.txt is a list, but there is no folder Annotations/"):
        voc(None, train=files).count("train")
