"""The same pictures in every format give the same boxes, classes, splits and ground truth."""

from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import annotating
import numpy as np
import pytest
from annotating import CLASSES, FORMATS, Picture

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from common.types import SPLITS, Split
from detr.data.coco import Coco
from detr.data.converted import Box, Converted, Labels, class_names, find_splits, image_names, to_coco, xywh

UNCHANGED = ["data.augmentation.kind=none", "data.augmentation.eval_size=480"]
OTHERS = [name for name in FORMATS if name != "coco"]


def make(format: str, root: Path, **keys: Any) -> Coco:
    """The data set that train.py makes of a folder in one of `FORMATS`."""
    _, name, own = FORMATS[format]
    arguments = [f"data.{key}={value}".replace("'", "") for key, value in {**own, **keys}.items()]
    arguments = ["model=detr", f"data={name}", f"data.root={root}", *UNCHANGED, *arguments]
    data = build(configure("train", arguments)["data"])
    assert isinstance(data, Coco)
    return data


def boxes(data: Coco, split: Split) -> dict[str, list[tuple[str, list[float]]]]:
    """The class and the box (left, top, width, height) of each object of each image of a split, by its file's name."""
    truth = data.ground_truth(split)
    files = {image["id"]: Path(image["file_name"]).name for image in truth["images"]}
    names = {category["id"]: category["name"] for category in truth["categories"]}
    objects: dict[str, list[Any]] = {name: [] for name in files.values()}
    for box in truth["annotations"]:
        objects[files[box["image_id"]]].append((names[box["category_id"]], box["bbox"]))
    return objects


@pytest.mark.parametrize("format", FORMATS)
def test_sixty_pictures_are_the_same_in_each_format(format: str, tmp_path: Path, real_data: Callable[[str], Path]):
    """The tolerance is that of the requirement; eight digits of YOLO leave 1e-5 pixels."""
    pictures = annotating.blood_cells(real_data("bccd"))
    FORMATS[format][0](pictures, tmp_path / format)
    annotating.write_coco_json(pictures, tmp_path / "expected/train.json")
    (tmp_path / "expected/images").symlink_to(pictures[0].path.parent)
    data, expected = make(format, tmp_path / format), make("coco", tmp_path / "expected")
    assert data.categories() == [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
    assert [data.count(split) for split in SPLITS] == [48, 6, 6], "no set of 60 is cut to nothing"
    assert [*boxes(data, "val")] == [*boxes(expected, "val")], "cut by the names alone"
    objects = {name: things for split in SPLITS for name, things in boxes(data, split).items()}
    for path, _, _, things in pictures:
        assert [name for name, _ in objects[path.name]] == [name for name, *_ in things]
        ours, theirs = [box for _, box in objects[path.name]], [box for _, *box in things]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
    sizes = [(image["width"], image["height"]) for split in SPLITS for image in data.ground_truth(split)["images"]]
    assert sizes == [(640, 480)] * 60, "also where VOC's files lack them"
    sample, theirs = data.sample("val", 0, None), expected.sample("val", 0, None)
    np.testing.assert_allclose(sample["boxes"], theirs["boxes"], rtol=0, atol=1e-3)
    assert sample["labels"].tolist() == theirs["labels"].tolist()


def two_splits(root: Path) -> None:
    """A class in each split alone, in VOC's folders by splits."""
    for split, name in (("train", "b"), ("valid", "a")):
        annotating.write_small(root / split, [Picture(Path(f"{split}.png"), 8, 6, [(name, 1, 1, 3, 2)])])


def test_classes_are_those_of_all_splits_sorted_unless_they_are_given(tmp_path: Path):
    two_splits(tmp_path)
    data = make("voc_beside", tmp_path, classes="null", test_share=0)
    assert [category["name"] for category in data.categories()] == ["a", "b"]
    assert data.sample("train", 0, None)["labels"].tolist() == [1]
    data = make("voc_beside", tmp_path, classes=["c", "b", "a"], test_share=0)
    assert data.categories() == [{"id": 1, "name": "c"}, {"id": 2, "name": "b"}, {"id": 3, "name": "a"}]
    with pytest.raises(UserError, match=r"train.xml, object 1 has the class 'b', which is none of 'a', 'c'; .*classes"):
        make("voc_beside", tmp_path, classes=["a", "c"]).count("train")
    for classes, fault in ((["a", "a"], "names the class 'a' twice"), ([], "names no class")):
        with pytest.raises(UserError, match=f"data.classes {fault}"):
            make("voc_beside", tmp_path, classes=classes)


def test_a_folder_without_any_box_has_no_classes():
    with pytest.raises(UserError, match=r"no box in any split, .* give data.classes="):
        class_names([Labels()], None)
    assert class_names([Labels()], ["cafe\u0301"]) == ["caf\u00e9"], "in Unicode's composed form"


def test_crowds_and_the_origins_of_boxes_are_kept():
    labels = Labels(images=[("a.png", 6, 8)], boxes=[Box(0, "b", (1, 2, 3, 4), "a.xml, object 1", True)])
    coco_json = to_coco(labels, ["a", "b"])
    assert coco_json["annotations"] == [
        {"id": "a.xml, object 1", "image_id": 1, "category_id": 2, "bbox": (1, 2, 3, 4), "iscrowd": 1}
    ]
    labels.is_labelled = False
    assert "annotations" not in to_coco(labels, ["a"])


def test_vocs_corners_are_the_first_and_the_last_pixel():
    """A box of the whole image of 8 x 6 pixels, and one of its first pixel (VOC2012 development kit, section 3.3)."""
    assert xywh((1, 1, 8, 6), 1) == (0, 0, 8, 6) == xywh((0, 0, 8, 6), 0)
    assert xywh((1, 1, 1, 1), 1) == (0, 0, 1, 1)


def test_two_folders_for_one_split_are_refused(tmp_path: Path):
    for name in ("train", "val", "test"):
        (tmp_path / name).mkdir()
    assert [*find_splits(tmp_path, "{}")] == ["train", "val", "test"]
    (tmp_path / "valid").mkdir()
    with pytest.raises(UserError, match=r"valid and .*val could both be the split val"):
        find_splits(tmp_path, "{}")


def test_images_are_listed_by_their_suffix(tmp_path: Path):
    for name in ("b.JPG", "a.png", "a.txt", "._a.png", "deeper/c.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [*image_names(tmp_path)] == ["a.png", "b.JPG"]
    assert [*image_names(tmp_path, True)] == ["a.png", "b.JPG", "deeper/c.webp"]


def test_a_moved_set_has_the_same_fingerprint_and_an_edited_one_another(tmp_path: Path):
    for name in ("one", "two"):
        two_splits(tmp_path / name)

    def fingerprint(name: str) -> dict[str, str]:
        return make("voc_beside", tmp_path / name, classes="null", test_share=0).fingerprint("train")

    assert fingerprint("one") == fingerprint("two")
    path = tmp_path / "two/train/train.xml"
    path.write_text(path.read_text().replace("<xmax>4<", "<xmax>5<"))
    assert fingerprint("one")["annotations"] != fingerprint("two")["annotations"]


def test_how_files_were_read_is_said_once_for_the_splits_that_are_cut_from_them(tmp_path: Path):
    pictures = [Picture(Path(f"{i}.png"), 8, 6, [("a", 1, 1, 3, 2)]) for i in range(9)]
    annotating.write_small(tmp_path, pictures)
    data = make("voc_beside", tmp_path, classes="null")
    note = "corners of boxes are read as positions between pixels, counted from 0 (data.first_pixel=0)"
    assert [line for line in data.summary() if note in line] == [f"train: {note}"]
    assert f"test: {note}" in data.split_summary("test"), "evaluate.py prints this split alone"


@pytest.mark.parametrize("format", OTHERS[1:])
def test_boxes_outside_the_image_or_without_area_are_treated_as_in_coco(format: str, tmp_path: Path):
    """Of five boxes, two are targets, one of them clipped; the ground truth keeps them all."""
    things = [("RBC", 1, 1, 3, 2), ("RBC", 6, 4, 5, 5), ("RBC", 12, 1, 3, 2), ("RBC", 2, 2, 0, 2), ("RBC", 3, 3, -1, 2)]
    for name in {"coco", format}:
        annotating.write_small_as(name, [Picture(Path("a.png"), 10, 10, things)], tmp_path / name)
    ours, theirs = (make(name, tmp_path / name, test_share=0, val_count=0) for name in (format, "coco"))
    sample = ours.sample("train", 0, None)
    np.testing.assert_allclose(sample["boxes"] / 48, [[1, 1, 4, 3], [6, 4, 10, 9]], atol=1e-6)
    assert len(ours.ground_truth("train")["annotations"]) == 5
    counts = [[line.split(" (")[0] for line in d.summary() if " x box" in line] for d in (ours, theirs)]
    assert counts[0] == counts[1] and len(counts[0]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("format", ["yolo_classes", "csv_extents", "voc_beside"])
def test_a_million_lines_are_read_within_a_minute(format: str, tmp_path: Path):
    """Of processor time, several times what is needed; time that grows as the square of the lines would be hours."""
    count = 1_000_000
    annotating.draw([Picture(Path("a.png"), 640, 480, [])], tmp_path)
    if format == "yolo_classes":
        (tmp_path / "classes.txt").write_text("cat\n")
        lines = (f"0 0.{i % 9}5 0.5 0.1 0.1" for i in range(count))
        annotating.write_list(lines, tmp_path / "a.txt")
    elif format == "csv_extents":
        annotating.write_list((f"a.png,cat,{i % 600},5,20,10" for i in range(count)), tmp_path / "a.csv")
        (tmp_path / "a.csv").write_text("image,class,x,y,width,height\n" + (tmp_path / "a.csv").read_text())
    else:
        count //= 5  # an object takes five lines
        box = (
            "<object>\n<name>cat</name>\n<bndbox><xmin>5</xmin><ymin>5</ymin>\n<xmax>9</xmax><ymax>9</ymax></bndbox>\n"
        )
        (tmp_path / "a.xml").write_text(f"<annotation>{f'{box}</object>' * count}</annotation>")
    data = make(format, tmp_path, classes="null")
    assert isinstance(data, Converted)
    start = process_time()
    labels, classes = data.convert("train")["train"]
    assert process_time() - start < 60
    assert len(labels.boxes) == count and [*classes] == ["cat"]
