"""CSV tables: the columns by their names, the images and splits, and an error for each mistake."""

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from common.errors import UserError
from common.types import SPLITS
from detr.data.coco import Files
from detr.data.csv_table import CsvTable
from detr.data.transforms import Augmentation

UNCHANGED = Augmentation(kind="none", sizes=[1], eval_size=10, max_size=1333, middle_sizes=[1], crop=(1, 1))
NONE = Files(images=None, annotations=None)
PLAIN = "image,class,xmin,ymin,xmax,ymax\n"


def table(root: Path | None, **keys: Any) -> CsvTable:
    """A data set with the defaults of configs/data/csv.yaml, but for the cuts: nothing is cut from train."""
    plain: dict[str, Any] = {"train": NONE, "val": NONE, "test": NONE, "val_count": 0, "classes": None, "box": None}
    keys = {"root": None if root is None else str(root), **plain, "first_pixel": 0, **keys}
    return CsvTable(batch_size=2, augmentation=UNCHANGED, pad_to=1, cache=False, **keys)


def write(path: Path, text: str, *images: str) -> Path:
    """Write a table, and pictures of 20 x 10 pixels in its folder; returns the folder."""
    for name in images or ("a.png",):
        (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10)).save(path.parent / name)
    path.write_text(text)
    return path.parent


def objects(data: CsvTable) -> list[tuple[str, list[float]]]:
    """The class and the box, as left, top, width, height, of each object of train."""
    truth = data.ground_truth("train")
    names = {category["id"]: category["name"] for category in truth["categories"]}
    return [(names[box["category_id"]], box["bbox"]) for box in truth["annotations"]]


@pytest.mark.parametrize(
    "text",
    [
        "image,class,xmin,ymin,xmax,ymax\na.png,cat,2,3,6,8",
        "\ufefffilename;width;height;label;x_min;y_min;x_max;y_max\r\na.png;20;10;cat;2;3;6;8\r\n",
        "Path\tX1\tY1\tX2\tY2\tClass Name\tother\na.png\t2.0\t3\t6e0\t8\tcat\t\n\n",
        'file_name,left,top,right,bottom,category\n"a.png",2,3,6,8,"cat"\n',
        "image_id,name,x,y,width,height\na.png,cat,2,3,4,5",
        "img,label_name,x,y,w,h,image_width,image_height\na.png,cat,2,3,4,5,20,10",
    ],
)
def test_the_names_of_the_columns_say_what_they_hold(tmp_path: Path, text: str):
    data = table(write(tmp_path / "t.csv", text))
    assert objects(data) == [("cat", [2, 3, 4, 5])]
    stated = "width" in text.lower() and "x,y,width" not in text
    assert any("lacks the sizes of 1 images" in line for line in data.summary()) is not stated


@pytest.mark.parametrize(("box", "expected"), [("corners", [2, 3, 4, 5]), ("extent", [2, 3, 6, 8])])
def test_four_numbers_in_one_column_need_a_key(tmp_path: Path, box: Any, expected: list[float]):
    text = 'image,width,height,bbox,class\na.png,20,10,"[2.0, 3.0, 6.0, 8.0]",cat'
    root = write(tmp_path / "t.csv", text)
    data = table(root, box=box)
    assert objects(data) == [("cat", expected)]
    with pytest.raises(UserError, match=r"The column bbox of .*t.csv may hold .*; give data.box=corners or data"):
        table(root).count("train")


def test_corners_may_be_vocs(tmp_path: Path):
    root = write(tmp_path / "t.csv", f"{PLAIN}a.png,cat,3,4,6,8")
    data = table(root, first_pixel=1)
    assert objects(data) == [("cat", [2, 3, 4, 5])]
    assert any("corners, first and last pixels, counted from 1 (data.first_pixel=1)" in line for line in data.summary())
    assert objects(table(root)) == [("cat", [3, 4, 3, 4])]
    assert any("positions between pixels, counted from 0 (data.first_pixel=0)" in x for x in table(root).summary())


@pytest.mark.parametrize("layout", ["folder", "file", "images", "prefix", "splits", "roboflow", "paths"])
def test_the_images_and_splits_of_each_layout(tmp_path: Path, layout: str):
    rows = {split: f"{PLAIN}{split}.png,cat,2,3,6,8" for split in SPLITS}
    root, keys, expected = tmp_path, {}, {"train": "train.png"}
    if layout in ("folder", "file"):
        path = tmp_path / "my cells.csv"
        write(path, rows["train"], "train.png")
        root = path if layout == "file" else tmp_path
    elif layout == "images":
        write(tmp_path / "t.csv", rows["train"], "images/train.png")
    elif layout == "prefix":
        write(tmp_path / "t.csv", rows["train"].replace("train.png", "images/train.png"), "images/train.png")
    elif layout == "paths":
        write(tmp_path / "tables.csv", rows["train"], "photos/train.png")
        keys["train"] = Files(images=str(tmp_path / "photos"), annotations=str(tmp_path / "tables.csv"))
    else:
        for split, folder in zip(SPLITS, ("train", "valid", "test"), strict=True):
            path = tmp_path / (f"{split}.csv" if layout == "splits" else f"{folder}/_annotations.csv")
            path.parent.mkdir(exist_ok=True)
            write(path, rows[split], f"{split}.png")
        expected = {split: f"{split}.png" for split in SPLITS}
    data = table(root, **keys)
    assert {s: Path(data.where(s, 0)).name for s in SPLITS if data.count(s)} == expected
    assert all(data.sample(split, 0, None)["labels"].tolist() == [0] for split in expected)


def test_several_tables_or_none_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"has none of the layouts train.csv, val.csv"):
        table(tmp_path).count("train")
    for name in ("a.csv", "b.csv"):
        write(tmp_path / name, PLAIN)
    with pytest.raises(UserError, match=r"holds a.csv, b.csv; give one: .*a.csv"):
        table(tmp_path).count("train")


def test_backslashes_separate_folders_in_a_table_beside_images(tmp_path: Path):
    text = f"{PLAIN}images\\a.png,cat,2,3,6,8"
    root = write(tmp_path / "t.csv", text, "images/a.png")
    assert objects(table(root)) == [("cat", [2, 3, 4, 5])]


def test_rows_without_a_box_are_images_without_objects(tmp_path: Path):
    text = f"{PLAIN}a.png,cat,2,3,6,8\nb.png,,,,,\na.png,dog,1,1,2,2\n"
    data = table(write(tmp_path / "t.csv", text, "a.png", "b.png"))
    assert data.count("train") == 2 and [name for name, _ in objects(data)] == ["cat", "dog"]
    assert "train: without objects: 1 x row without a box (the first is b.png)" in data.summary()


BROKEN = {
    "no image": ("photo,class,xmin,ymin,xmax,ymax", r"has no column for the file of the image among photo, class"),
    "two images": (
        "image,path,class,xmin,ymin,xmax,ymax",
        r"several columns for the file .*\(image, path\)",
    ),
    "two classes": ("image,class,label,xmin,ymin,xmax,ymax", r"several columns for the class \(class, label\)"),
    "no box": ("image,class,a,b,c,d", r"has no box in its columns image, class, a, b, c, d; expected one of xmin"),
    "two boxes": (
        "image,class,xmin,ymin,xmax,ymax,x,y,w,h",
        r"several boxes \(xmin, ymin, xmax, ymax and x, y",
    ),
    "twice": ("image,class,xmin,ymin,xmax,ymax,xmin", r"has two columns xmin"),
    "no header": ("a.png,1,2,3,4,cat", r"has no box in its columns a.png, 1, 2"),
    "empty": ("", r"has no box in its columns ;"),
    "long row": (f"{PLAIN}a.png,cat,1,2,3,4,5", r"line 2 has 7 columns, but the first line has 6"),
    "short row": (f"{PLAIN}\na.png,cat,1,2,3", r"line 3 has 5 columns, but the first line has 6"),
    "no name": (f"{PLAIN},cat,1,2,3,4", r"line 2 names no image in the column image"),
    "no class": (f"{PLAIN}a.png,,1,2,3,4", r"line 2 has a box without a class; add it in the column class"),
    "half a box": (f"{PLAIN}a.png,cat,1,2,,4", r"line 2 has '1, 2, , 4'; expected 4 numbers of a box"),
    "NaN": (f"{PLAIN}a.png,cat,1,nan,3,4", r"line 2 has '1, nan, 3, 4'; expected 4 numbers"),
    "infinite": (f"{PLAIN}a.png,cat,1,2,inf,4", r"expected 4 numbers of a box"),
    "text": (f"{PLAIN}a.png,cat,1,2,three,4", r"expected 4 numbers of a box"),
    "size": ("image,height,width,class,x1,y1,x2,y2\na.png,tall,20,cat,1,2,3,4", r"has 'tall'; expected a number"),
    "two sizes": (
        "image,height,width,class,x1,y1,x2,y2\na.png,10,20,cat,1,2,3,4\na.png,20,10,cat,1,2,3,4",
        r"line 3 gives a.png another size than a line above",
    ),
    "long field": (f'{PLAIN}a.png,"{"x" * 200_000}",1,2,3,4', r"line 2 is not CSV \(field larger than"),
    "relative": (f"{PLAIN}a.png,cat,0.1,0.2,0.3,0.4", r"no number of a box exceeds 1, so the boxes are relative"),
    "missing image": (f"{PLAIN}b.png,cat,1,2,3,4", r"lacks the size of .*b.png, and it cannot be read"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_wrong_table_is_named_in_one_sentence(tmp_path: Path, fault: str):
    text, message = BROKEN[fault]
    root = write(tmp_path / "t.csv", text)
    with pytest.raises(UserError, match=message) as caught:
        table(root).count("train")
    assert "t.csv" in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_no_text_and_pipes_are_named_and_nothing_waits_for_them(tmp_path: Path):
    write(tmp_path / "t.csv", PLAIN)
    (tmp_path / "t.csv").write_bytes(b"\xff\xfei")
    with pytest.raises(UserError, match=r"t.csv is not text in UTF-8"):
        table(tmp_path).count("train")
    (tmp_path / "t.csv").unlink()
    os.mkfifo(tmp_path / "t.csv")
    with pytest.raises(UserError, match=r"t.csv cannot be read \(it is a named pipe"):
        table(tmp_path).count("train")
