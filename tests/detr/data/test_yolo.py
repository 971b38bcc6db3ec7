"""YOLO's layouts, data.yaml and label files: the splits, the boxes, what is left out, and an error for each mistake."""

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from common.errors import UserError
from common.types import SPLITS
from detr.data.coco import Files
from detr.data.transforms import Augmentation
from detr.data.yolo import Yolo

UNCHANGED = Augmentation(kind="none", sizes=[1], eval_size=10, max_size=1333, middle_sizes=[1], crop=(1, 1))
NONE = Files(images=None, annotations=None)
BOX = "1 0.5 0.5 0.2 0.4\n"  # of a picture of 20 x 10 pixels: left 8, top 3, width 4, height 4


def yolo(root: Path | None, **keys: Any) -> Yolo:
    """A data set with the defaults of configs/data/yolo.yaml, but for the cuts: nothing is cut from train."""
    plain: dict[str, Any] = {"train": NONE, "val": NONE, "test": NONE, "val_count": 0, "classes": None}
    keys = {"root": None if root is None else str(root), **plain, "exif": "apply", **keys}
    return Yolo(batch_size=2, augmentation=UNCHANGED, pad_to=1, cache=False, **keys)


def write(root: Path, **texts: str) -> Path:
    """Write texts, by path with __ for / and without .txt, and for each a picture of 20 x 10 beside or in images/."""
    for path, text in texts.items():
        file = root / f"{path.replace('__', '/')}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        image = Path(str(file.with_suffix(".png")).replace("/labels/", "/images/"))
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10)).save(image)
    return root


def write_yaml(root: Path, text: str, name: str = "data.yaml") -> Path:
    """Write data.yaml with two classes and further lines."""
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(f"names: [cat, dog]\n{text}\n")
    return root


def names(data: Yolo) -> dict[str, list[str]]:
    """The files' names of each split that has images."""
    return {s: [Path(data.where(s, i)).name for i in range(data.count(s))] for s in SPLITS if data.count(s)}


def first_boxes(data: Yolo) -> list[list[float]]:
    """The boxes of the first image of train, as left, top, width, height."""
    return [[round(x, 9) for x in box["bbox"]] for box in data.ground_truth("train")["annotations"]]


@pytest.mark.parametrize(
    ("folders", "layout"),
    [
        (("labels/train", "labels/val", "labels/test"), "labels/ beside images/, by splits"),
        (("train/labels", "valid/labels", "test/labels"), "images/ and labels/ in the folder of each split"),
        (("train", "valid", "test"), "label files beside the images, by splits"),
        (("labels",), "labels/ beside images/"),
        ((".",), "label files beside the images"),
    ],
)
@pytest.mark.parametrize("place", ["classes.txt", "labels"])
def test_folders_beside_classes_txt_are_recognised(tmp_path: Path, folders: tuple[str, ...], layout: str, place: str):
    for folder in folders:
        write(tmp_path, **{f"{folder}/{folder.replace('/', '-')}-image": BOX})
    path = tmp_path / folders[0] / "classes.txt" if place == "labels" else tmp_path / place
    path.write_text("cat\ndog\n\n")
    for folder in folders[1:] if place == "labels" else ():
        (tmp_path / folder / "classes.txt").write_text("cat\ndog\n")
    data = yolo(tmp_path)
    images = [[f"{folder.replace('/', '-')}-image.png"] for folder in folders]
    assert names(data) == dict(zip(SPLITS, images, strict=False))
    assert data.summary()[:3] == [
        f"data.root={tmp_path}: the layout of YOLO with {layout}",
        "2 classes",
        "classes: cat, dog",
    ]
    assert not [line for line in data.summary() if "left out" in line]
    assert first_boxes(data) == [[8, 3, 4, 4]] and data.sample("train", 0, None)["labels"].tolist() == [1]


@pytest.mark.parametrize(
    "text",
    [
        "train: images/train\nval: images/val",
        "path: .\ntrain: images/train\nval: images/val",
        "path: ROOT\ntrain: ./images/train\nvalidation: ROOT/images/val",
        "path: ../elsewhere/set\ntrain: images/train\nval: images/val",
        "train: ../images/train\nval: ../images/val",
        "train: [images/train, images/more]\nval: val.txt",
        "train: train.txt\nval: lists/val.txt\ntest: ~",
    ],
)
def test_data_yaml_names_the_splits(tmp_path: Path, text: str):
    """By a folder, a list of folders, or a list of files; under path:, beside the file, or as Roboflow writes it."""
    root = write(tmp_path / "set", labels__train__a=BOX, labels__val__b=BOX, labels__more__c=BOX)
    (root / "train.txt").write_text(f"images/train/a.png\n\n{root}/images/more/c.png\nimages/train/a.png\n")
    (root / "val.txt").write_text("./images\\val\\b.png\r\n")
    (root / "lists").mkdir()
    (root / "lists/val.txt").write_text("../images/val/b.png")
    data = yolo(write_yaml(root, text.replace("ROOT", str(root))))
    expected = ["a.png", "c.png"] if "more" in text or "train.txt" in text else ["a.png"]
    assert names(data) == {"train": expected, "val": ["b.png"]}
    assert data.summary()[0].endswith("the layout of YOLO with data.yaml")
    assert {len(data.ground_truth(split)["annotations"]) for split in ("train", "val")} <= {1, 2}
    assert any("path: ../elsewhere/set of data.yaml holds no split" in line for line in data.summary()) is (
        "elsewhere" in text
    )


def test_an_entry_that_can_mean_two_folders_is_refused(tmp_path: Path):
    write(tmp_path, train__labels__x=BOX)
    root = write_yaml(write(tmp_path / "set", train__labels__a=BOX), "train: ../train/images")
    with pytest.raises(UserError, match=r"train: of .*data.yaml is ../train/images, which may be .*/images or, as"):
        yolo(root).count("train")


def test_a_split_that_does_not_exist_is_left_out_and_said(tmp_path: Path):
    root = write_yaml(write(tmp_path, train__labels__a=BOX), "train: ../train/images\ntest: ../test/images")
    data = yolo(root)
    assert names(data) == {"train": ["a.png"]}
    assert "train: data.yaml has test: ../test/images, which does not exist; left out" in data.summary()
    write_yaml(root, "train: nowhere")
    with pytest.raises(UserError, match=r"has train: nowhere, of which nothing exists in "):
        yolo(root).count("train")


def test_a_val_with_the_images_of_train_is_said(tmp_path: Path):
    """As in coco128.yaml."""
    data = yolo(write_yaml(write(tmp_path, labels__a=BOX), "train: images\nval: images"))
    assert any("has the same images for val as for train" in line for line in data.split_summary("val"))


def test_another_yaml_is_taken_if_it_is_the_only_one_or_is_given(tmp_path: Path):
    root = write_yaml(write(tmp_path, labels__a=BOX), "train: images", "cells.yaml")
    (root / "hyperparameters.yaml").write_text("lr: 0.1")
    assert names(yolo(root)) == {"train": ["a.png"]}
    write_yaml(root, "train: images", "other.yml")
    with pytest.raises(UserError, match=r"holds cells.yaml, other.yml; give one: .*cells.yaml"):
        yolo(root).count("train")
    assert names(yolo(root / "other.yml")) == {"train": ["a.png"]}


def test_a_split_may_be_given_by_paths(tmp_path: Path):
    write(tmp_path, images__a=BOX)
    (tmp_path / "texts/deep").mkdir(parents=True)
    (tmp_path / "images/deep").mkdir()
    os.rename(tmp_path / "images/a.png", tmp_path / "images/deep/a.png")
    (tmp_path / "texts/deep/a.txt").write_text(BOX)
    files = Files(images=str(tmp_path / "images"), annotations=str(tmp_path / "texts"))
    data = yolo(None, train=files, classes=["cat", "dog"])
    assert names(data) == {"train": ["a.png"]} and first_boxes(data) == [[8, 3, 4, 4]]
    with pytest.raises(UserError, match=r"have no names: there is no data.yaml and no classes.txt; give data.classes="):
        yolo(None, train=files).count("train")


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("names: [cat, 'no']", ["cat", "no"]),
        ("names: {1: dog, 0: cat}", ["cat", "dog"]),
        ("names: {'0': cat, '1': 7}\nnc: 2", ["cat", "7"]),
        ("nc: 2", ["class_0", "class_1"]),
        ("names: ['cafe\u0301', b]", ["caf\u00e9", "b"]),
    ],
)
def test_names_of_classes_are_a_list_or_a_mapping(tmp_path: Path, text: str, classes: list[str]):
    write(tmp_path, labels__a=BOX)
    (tmp_path / "data.yaml").write_text(f"{text}\ntrain: images\n", encoding="utf-8")
    assert [category["name"] for category in yolo(tmp_path).categories()] == classes
    assert [c["name"] for c in yolo(tmp_path, classes=["x", "y"]).categories()] == ["x", "y"]


BAD_YAML = {
    "no names": ("train: images", "has no names: of the classes"),
    "no class": ("names: []\ntrain: images", "has no names: of the classes"),
    "boolean": ("names: [yes, no]\ntrain: images", "the name of class 0 is read as True; put it in quotes"),
    "nothing": ("names: [cat, ~]\ntrain: images", "the name of class 1 is read as None; put it in quotes"),
    "gap": ("names: {0: cat, 2: dog}\ntrain: images", "the numbers of names: are not 0 to 1"),
    "twice": ("names: [cat, cat]\ntrain: images", "names the class 'cat' twice"),
    "nc": ("names: [cat]\nnc: 2\ntrain: images", "has nc: 2, but 1 names:"),
    "no split": ("names: [cat]", "has no split, of which nothing exists"),
    "split": ("names: [cat]\ntrain: {a: b}", "train: of .*data.yaml is .*; expected a folder"),
    "two vals": ("names: [cat]\nval: images\nvalid: images", "has valid: and val: for the split val"),
    "half": ("names: [cat]\ntrain: [images, nowhere]", "only 1 of its 2 paths exist"),
    "poses": ("names: [cat]\ntrain: images\nkpt_shape: [a, 3]", "has kpt_shape: "),
    "a list": ("- a", "is not the data.yaml of a data set"),
    "not YAML": ("names: [", "is not YAML"),
    "an object": ("names: !!python/object/apply:os.getcwd []", "is not YAML"),
    "deep": ("[" * 2_000, "is not YAML"),
    "laughs": ("a: &a [x, x]\nb: &b [*a, *a]\nnames: [*b, *b]\ntrain: images", "the name of class 0 is read as"),
}


@pytest.mark.parametrize("fault", BAD_YAML)
def test_a_wrong_data_yaml_is_named_in_one_sentence(tmp_path: Path, fault: str):
    text, message = BAD_YAML[fault]
    write(tmp_path, labels__a=BOX)
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        yolo(tmp_path).count("train")
    assert "\n" not in str(caught.value)


def test_images_without_objects_are_kept_and_label_files_without_images_are_counted(tmp_path: Path):
    write(tmp_path, labels__a=BOX, labels__b="", labels__c=" \n\n", labels__d=BOX, labels__e=BOX)
    (tmp_path / "labels/d.txt").unlink()
    (tmp_path / "images/e.png").unlink()
    (tmp_path / "classes.txt").write_text("cat\ndog")
    data = yolo(tmp_path)
    assert names(data) == {"train": ["a.png", "b.png", "c.png", "d.png"]}
    notes = "\n".join(data.summary())
    assert "without objects: 1 x image without a label file (the first is d.png)" in notes
    assert "without objects: 2 x image with an empty label file (the first is b.png)" in notes
    assert f"left out: 1 x label file without an image (the first is {tmp_path / 'labels/e.txt'})" in notes


def test_polygons_and_rotated_boxes_are_read_as_the_box_around_them(tmp_path: Path):
    """A triangle, and Ultralytics' four corners of a rotated box, on 20 x 10 pixels."""
    write(tmp_path, a="0 0.1 0.2 0.5 0.4 0.3 0.9\n1 0.5 0.1 0.9 0.5 0.5 0.9 0.1 0.5\n1.0 0.5 0.5 0.2 0.4\n")
    (tmp_path / "classes.txt").write_text("cat\ndog")
    data = yolo(tmp_path)
    assert first_boxes(data) == [[2, 2, 8, 7], [2, 1, 16, 8], [8, 3, 4, 4]]
    assert "train: read as the box around it: 2 x polygon or rotated box" in data.summary()


def test_the_keypoints_of_poses_are_left_out(tmp_path: Path):
    """With kpt_shape [2, 2], a line of 1 + 4 + 4 numbers is a pose, not a polygon of four points."""
    root = write_yaml(write(tmp_path, labels__a="0 0.5 0.5 0.2 0.4 0 0 1 1\n"), "train: images\nkpt_shape: [2, 2]")
    data = yolo(root)
    assert first_boxes(data) == [[8, 3, 4, 4]] and "train: left out: the keypoints of 1 boxes" in data.summary()


BAD_LINES = {
    "words": ("cat 0.5 0.5 0.2 0.4", r"line 2: 'cat 0.5 0.5 0.2 0.4' is not a line of numbers"),
    "too few": ("0 0.5 0.5 0.2", r"line 2: .* has 3 numbers after the class; expected 4, or the points of a polygon"),
    "score": ("0 0.5 0.5 0.2 0.4 0.9", r"line 2: .* has 5 numbers .* \(a fifth is written with predictions"),
    "odd": ("0 0.1 0.2 0.3 0.4 0.5 0.6 0.7", r"line 2: .* has 7 numbers after the class"),
    "class": ("2 0.5 0.5 0.2 0.4", r"line 2: .* has the class 2, but .*classes.txt names the classes 0 to 1"),
    "negative": ("-1 0.5 0.5 0.2 0.4", r"has the class -1, but"),
    "fraction": ("0.5 0.5 0.5 0.2 0.4", r"has the class 0.5, but"),
    "NaN class": ("nan 0.5 0.5 0.2 0.4", r"has the class nan, but"),
    "NaN": ("0 0.5 nan 0.2 0.4", r"has a coordinate that is not relative"),
    "infinite": ("0 0.5 0.5 inf 0.4", r"has a coordinate that is not relative"),
    "pixels": ("0 10 5 4 4", r"line 2: '0 10 5 4 4' has a coordinate that is not relative to the image's size"),
    "commas": ("0,0.5,0.5,0.2,0.4", r"is not a line of numbers"),
}


@pytest.mark.parametrize("fault", BAD_LINES)
def test_a_wrong_line_is_named_in_one_sentence(tmp_path: Path, fault: str):
    line, message = BAD_LINES[fault]
    write(tmp_path, a=f"{BOX}{line}\n")
    (tmp_path / "classes.txt").write_text("cat\ndog")
    with pytest.raises(UserError, match=rf"a.txt, {message}" if message.startswith("line") else message):
        yolo(tmp_path).count("train")


def test_files_that_are_no_text_and_pipes_are_named_and_nothing_waits_for_them(tmp_path: Path):
    write(tmp_path, a=BOX)
    (tmp_path / "classes.txt").write_text("cat\ndog")
    for content, message in (
        (b"\xff\xfe0", r"a.txt is not text in UTF-8"),
        (None, r"a.txt cannot be read \(it is a"),
    ):
        (tmp_path / "a.txt").unlink()
        if content is None:
            os.mkfifo(tmp_path / "a.txt")
            write(tmp_path, b=BOX)
        else:
            (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(UserError, match=message):
            yolo(tmp_path).count("train")


def test_missing_and_broken_images_are_named(tmp_path: Path):
    root = write_yaml(write(tmp_path, labels__a=BOX), "train: train.txt")
    (root / "train.txt").write_text("images/a.png\ndata/obj/b.png\n")
    with pytest.raises(UserError, match=r"1 of the 2 images in .*train.txt are missing, the first is data/obj/b.png"):
        yolo(root).count("train")
    (root / "train.txt").write_text("images/a.png\n")
    (root / "images/a.png").write_text("no image")
    with pytest.raises(UserError, match=r"size of .*a.png, and it cannot be read .*; correct the image, or remove it"):
        yolo(root).count("train")
    (tmp_path / "classes.txt").write_text("cat\n\ndog")
    files = Files(images=str(root / "images"), annotations=str(root / "labels"))
    with pytest.raises(UserError, match=r"classes.txt, line 2 is empty"):
        yolo(root, train=files).count("train")


def test_names_that_are_not_utf8_are_read(tmp_path: Path):
    name = os.fsdecode(b"\xff\xfe")
    root = write_yaml(write(tmp_path, labels__a=BOX), "train: train.txt")
    for folder, suffix in (("images", "png"), ("labels", "txt")):
        os.rename(root / folder / f"a.{suffix}", root / folder / f"{name}.{suffix}")
    (root / "train.txt").write_bytes(b"images/\xff\xfe.png\n")
    data = yolo(root)
    assert names(data) == {"train": [f"{name}.png"]} and data.sample("train", 0, None)["labels"].tolist() == [1]


@pytest.mark.parametrize(("exif", "box"), [("apply", [4, 6, 2, 8]), ("ignore", [8, 3, 4, 4]), ("auto", [8, 3, 4, 4])])
def test_boxes_are_relative_to_the_upright_image_unless_exif_is_ignored(tmp_path: Path, exif: str, box: list[float]):
    """Ultralytics turns images by their tag, so a picture stored as 20 x 10 has 10 x 20 pixels."""
    write(tmp_path, a=BOX)
    (tmp_path / "classes.txt").write_text("cat\ndog")
    tags = Image.Exif()
    tags[274] = 6  # a quarter turn
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png", exif=tags)
    data = yolo(tmp_path, exif=exif)
    assert first_boxes(data) == [box]
    assert data.sample("train", 0, None)["original_size"] == ((20, 10) if exif == "apply" else (10, 20))
    assert any("are turned by EXIF" in line for line in data.summary()) is (exif != "apply")


def test_no_image_is_decoded_to_read_the_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With pixels cut off, only the headers are left."""
    write(tmp_path, a=BOX)
    (tmp_path / "classes.txt").write_text("cat\ndog")
    image = tmp_path / "a.png"
    Image.effect_noise((200, 100), 90).save(image)
    image.write_bytes(image.read_bytes()[:200])
    assert first_boxes(yolo(tmp_path)) == [[80, 30, 40, 40]]
