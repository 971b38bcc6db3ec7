"""COCO files: splits, classes, targets, unmodified ground truth, unusual images, and an error for each mistake."""

import copy
import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from common.data import batching
from common.data.images import read_image
from common.data.loading import Loader
from common.errors import UserError
from common.types import SPLITS
from detr.data import notes as notes_file
from detr.data.coco import Coco, Files
from detr.data.transforms import Augmentation
from detr.evaluation.coco_numbers import evaluate_results

UNCHANGED = Augmentation(kind="none", sizes=[1], eval_size=40, max_size=1333, middle_sizes=[1], crop=(1, 1))
NONE = Files(images=None, annotations=None)

# Two images of 60 x 40 with objects and one without; category ids are neither contiguous nor sorted.
COCO_JSON: dict[str, Any] = {
    "images": [
        {"id": 7, "file_name": "b.png", "width": 60, "height": 40},
        {"id": 3, "file_name": "a.png", "width": 60, "height": 40},
        {"id": 9, "file_name": "c.png", "width": 60, "height": 40},
    ],
    "categories": [{"id": 90, "name": "brush"}, {"id": 4, "name": "aeroplane"}, {"id": 17, "name": "cat"}],
    "annotations": [
        {"id": 1, "image_id": 3, "category_id": 90, "bbox": [10, 5, 20, 10], "area": 150, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 4, "bbox": [0.5, 1.5, 3, 4]},
        {"id": 3, "image_id": 3, "category_id": 17, "bbox": [0, 0, 60, 40], "area": 2400, "iscrowd": 0},
    ],
}


def coco_json(**changes: list[Any]) -> dict[str, Any]:
    """A copy of COCO_JSON with some of its lists replaced."""
    return {**copy.deepcopy(COCO_JSON), **changes}


def annotation(**changes: Any) -> dict[str, Any]:
    """A valid annotation with changes."""
    return {"id": 50, "image_id": 3, "category_id": 4, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0, **changes}


def write_images(folder: Path, names: list[str]) -> None:
    """Grey images of 60 x 40."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.new("RGB", (60, 40), (40 * i, 40 * i, 40 * i)).save(folder / name)


def coco(**keys: Any) -> Coco:
    """A data set that does not resize its images."""
    plain: dict[str, Any] = {"root": None, "train": NONE, "val": NONE, "test": NONE, "val_count": 0, "batch_size": 2}
    return Coco(**{**plain, "augmentation": UNCHANGED, "pad_to": 1, "cache": False, **keys})


@pytest.fixture
def make_data(tmp_path: Path) -> Callable[..., Coco]:
    """A function that makes a data set with one JSON as train and test."""
    write_images(tmp_path / "images", ["a.png", "b.png", "c.png"])

    def make(content: Any, **keys: Any) -> Coco:
        path = tmp_path / "instances.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        files = Files(images=str(tmp_path / "images"), annotations=str(path))
        return coco(train=files, test=files, **keys)

    return make


def evaluate(data: Coco) -> dict[str, float]:
    """COCO's numbers of detections that equal the annotations of `test`."""
    truth = data.ground_truth("test")
    keys = ("image_id", "category_id", "bbox")
    results = [{"score": 0.9, **{key: a[key] for key in keys}} for a in truth["annotations"]]
    return evaluate_results(truth, results, "bbox").numbers


def test_any_category_ids_become_classes_by_ascending_id(make_data: Callable[..., Coco]):
    data = make_data(COCO_JSON)
    assert data.categories() == [
        {"id": 4, "name": "aeroplane"},
        {"id": 17, "name": "cat"},
        {"id": 90, "name": "brush"},
    ]
    first, second, third = (data.sample("train", i, None) for i in range(3))
    assert [s["id"] for s in (first, second, third)] == [7, 3, 9]  # the file's order
    assert [s["labels"].tolist() for s in (first, second, third)] == [[0], [2, 1], []]
    assert second["boxes"].tolist() == [[10, 5, 30, 15], [0, 0, 60, 40]]
    assert first["boxes"].tolist() == [[0.5, 1.5, 3.5, 5.5]]
    assert third["boxes"].shape == (0, 4)
    assert second["original_size"] == (40, 60) and second["file"].endswith("a.png")
    assert type(first["boxes"]) is torch.Tensor


def test_a_batch_pads_at_the_bottom_and_right_with_zeros(make_data: Callable[..., Coco]):
    data = make_data(COCO_JSON)
    samples = [data.sample("train", i, None) for i in range(3)]
    samples[1]["image"] = torch.full((3, 30, 70), 200, dtype=torch.uint8)
    batch = data.collate(samples)
    assert batch["images"].shape == (3, 3, 40, 70) and batch["images"].dtype == torch.uint8
    assert batch["sizes"].tolist() == [[40, 60], [30, 70], [40, 60]]
    assert batch["images"][1, :, :30].min() == 200 and batch["images"][1, :, 30:].max() == 0
    assert batch["images"][2, :, :, 60:].max() == 0 and batch["padded"]
    assert batch["counts"] == [1, 2, 0] and batch["ids"] == [7, 3, 9]
    assert batch["boxes"].shape == (3, 4) and batch["labels"].tolist() == [0, 2, 1]
    assert batch["original_sizes"].tolist() == [[40, 60]] * 3
    empty = data.collate(samples[2:])
    assert empty["boxes"].shape == (0, 4) and empty["counts"] == [0] and not empty["padded"]


@pytest.mark.parametrize(("pad_to", "shape"), [(1, (40, 60)), (20, (40, 60)), (32, (64, 64)), (128, (128, 128))])
def test_a_batch_is_padded_to_a_multiple_of_pad_to_and_says_so(
    pad_to: int, shape: tuple[int, int], make_data: Callable[..., Coco]
):
    data = make_data(COCO_JSON, pad_to=pad_to)
    batch = data.collate([data.sample("train", 0, None)])
    assert batch["images"].shape[2:] == shape and batch["padded"] == (shape != (40, 60))
    assert batch["sizes"].tolist() == [[40, 60]]
    assert not batch["images"][:, :, 40:].any() and not batch["images"][:, :, :, 60:].any()


def test_boxes_are_resized_with_the_image(make_data: Callable[..., Coco]):
    larger = Augmentation(kind="none", sizes=[1], eval_size=80, max_size=1333, middle_sizes=[1], crop=(1, 1))
    sample = make_data(COCO_JSON, augmentation=larger).sample("test", 1, None)
    assert sample["image"].shape == (3, 80, 120) and sample["original_size"] == (40, 60)
    assert sample["boxes"].tolist() == [[20, 10, 60, 30], [0, 0, 120, 80]]


def test_targets_are_cleaned_and_counted_and_ground_truth_is_not(make_data: Callable[..., Coco]):
    odd = [
        annotation(id=11, iscrowd=1),
        annotation(id=12, bbox=[5, 5, 0, 9]),
        annotation(id=13, bbox=[5, 5, 9, -2]),
        annotation(id=14, bbox=[70, 5, 9, 9]),
        annotation(id=15, bbox=[-10, 30, 30, 30]),
        annotation(id=16, bbox=[50, 30, 10.004, 10]),  # outside the image by rounding
    ]
    data = make_data(coco_json(annotations=odd))
    for split in ("train", "test"):
        boxes = data.sample(split, 1, None)["boxes"].tolist()
        assert boxes == [[0, 30, 20, 40], [50, 30, 60, 40]]
    notes = "\n".join(data.summary())
    assert "train: left out of the targets: 1 x crowd (annotation 11)" in notes
    assert "3 x box without area inside its image (annotation 12, 13, 14)" in notes
    assert "clipped to the image: 1 x box (annotation 15)" in notes
    assert data.ground_truth("test")["annotations"] == odd
    assert [image["id"] for image in data.ground_truth("test")["images"]] == [7, 3, 9]


def test_ground_truth_has_area_and_iscrowd_where_the_file_has_none(make_data: Callable[..., Coco]):
    annotations = make_data(COCO_JSON).ground_truth("test")["annotations"]
    assert [(a["area"], a["iscrowd"]) for a in annotations] == [(150, 0), (12, 0), (2400, 0)]


def test_images_are_decoded_once_with_cache(make_data: Callable[..., Coco]):
    for cache in (True, False):
        data = make_data(COCO_JSON, cache=cache)
        first = data.sample("train", 0, None)["image"]
        assert (data.sample("train", 0, None)["image"].data_ptr() == first.data_ptr()) is cache


def turn_by_exif(path: Path, orientation: int = 3) -> None:
    """Give an image an EXIF orientation, by default a turn by 180 degrees, and a bright top as stored."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("RGB", (60, 40))
    image.paste((255, 255, 255), (0, 0, 60, 20))
    image.save(path, exif=exif)


def test_images_turned_by_exif_in_a_way_that_their_size_does_not_tell_are_counted(
    make_data: Callable[..., Coco], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert "EXIF" not in "\n".join(make_data(COCO_JSON).summary())
    turn_by_exif(tmp_path / "images/a.png")
    turn_by_exif(tmp_path / "images/c.png", 6)  # its size tells
    notes = [line for line in make_data(COCO_JSON).summary() if "EXIF" in line]
    assert [note.split(":")[0] for note in notes] == ["train", "test"]
    assert "1 of 3 images are turned by EXIF" in notes[0] and "a.png" in notes[0] and "data.exif=apply" in notes[0]
    turn_by_exif(tmp_path / "images/b.png")
    monkeypatch.setattr(notes_file, "MAX_ORIENTATION_FILES", 2)  # every second image is looked at: b and c
    assert "1 of 2 sampled images are turned" in "\n".join(make_data(COCO_JSON).summary())
    for exif in ("apply", "ignore"):
        assert not [line for line in make_data(COCO_JSON, exif=exif).summary() if "EXIF" in line]


def test_exif_is_treated_alike_in_training_and_evaluation(make_data: Callable[..., Coco], tmp_path: Path):
    turn_by_exif(tmp_path / "images/a.png")
    for exif, bright_top in (("auto", True), ("ignore", True), ("apply", False)):
        data = make_data(COCO_JSON, exif=exif)
        for split in ("train", "test"):
            assert bool((data.sample(split, 1, None)["image"][:, :20] == 255).all()) is bright_top


def test_a_subclass_that_was_written_before_the_key_reads_images_as_auto_does():
    assert coco().exif == "auto"


def official(root: Path, train: int = 12) -> Path:
    """The official layout with `train` images in train2017 and three in val2017."""
    for name, count, start in (("train2017", train, 100), ("val2017", 3, 500)):
        files = [f"{start + i:012d}.jpg" for i in range(count)]
        write_images(root / name, files)
        images = [{"id": start + i, "file_name": f, "width": 60, "height": 40} for i, f in enumerate(files)]
        boxes = [annotation(id=start + i, image_id=start + i) for i in range(count)]
        (root / "annotations").mkdir(exist_ok=True)
        content = coco_json(images=images, annotations=boxes)
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    return root


def ids(data: Coco, split: Any) -> list[int]:
    """Image ids of a split."""
    return [data.sample(split, i, None)["id"] for i in range(data.count(split))]


def test_the_official_layout_splits_val_from_train_and_tests_on_val2017(tmp_path: Path):
    data = coco(root=str(official(tmp_path)), val_count=4)
    assert (data.count("train"), data.count("val"), data.count("test")) == (8, 4, 3)
    assert sorted(ids(data, "train") + ids(data, "val")) == list(range(100, 112))
    assert ids(data, "test") == [500, 501, 502]
    assert [i["id"] for i in data.ground_truth("val")["images"]] == ids(data, "val")
    assert {a["image_id"] for a in data.ground_truth("val")["annotations"]} == set(ids(data, "val"))


def test_the_split_does_not_depend_on_the_order_in_the_file(tmp_path: Path):
    before = ids(coco(root=str(official(tmp_path)), val_count=4), "val")
    path = tmp_path / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "images": content["images"][::-1]}))
    after = ids(coco(root=str(tmp_path), val_count=4), "val")
    assert after == before[::-1] and before != list(range(100, 104))


def test_without_val_count_there_is_no_val(tmp_path: Path):
    data = coco(root=str(official(tmp_path)))
    assert data.count("val") == 0 and data.count("train") == 12
    assert not any(line.startswith("val") for line in data.summary())


def test_a_split_given_by_path_overrides_root(tmp_path: Path):
    official(tmp_path)
    val = Files(images=str(tmp_path / "val2017"), annotations=str(tmp_path / "annotations/instances_val2017.json"))
    data = coco(root=str(tmp_path), val=val, val_count=4)
    assert ids(data, "val") == [500, 501, 502] and data.count("train") == 12


def test_evaluation_needs_val2017_alone(tmp_path: Path):
    official(tmp_path)
    (tmp_path / "annotations/instances_train2017.json").unlink()
    data = coco(root=str(tmp_path))
    assert data.count("test") == 3 and len(data.categories()) == 3
    with pytest.raises(UserError, match=r"instances_train2017.json cannot be read"):
        data.count("train")


def test_the_constructor_opens_no_file():
    data = coco(root="nowhere", cache=True)
    with pytest.raises(UserError, match="nowhere"):
        data.count("train")


BAD_FILES = {
    "not JSON": ("{", ["not JSON"]),
    "not text": ("[1, 2]", ["images"]),
    "other JSON": ({"images": [], "labels": []}, ["annotations"]),
    "no annotations": ({"images": [], "categories": []}, ["annotations"]),
    "no images": (coco_json(images=[], annotations=[]), ["lists no images"]),
    "no categories": (coco_json(categories=[], annotations=[]), ["lists no categories"]),
    "unknown image": (coco_json(annotations=[annotation(image_id=123)]), ["Annotation 50", "image 123"]),
    "unknown category": (coco_json(annotations=[annotation(category_id=5)]), ["Annotation 50", "category 5"]),
    "no box": (coco_json(annotations=[annotation(bbox=None)]), ["Annotation 50", "bbox"]),
    "short box": (coco_json(annotations=[annotation(bbox=[1, 2, 3])]), ["Annotation 50", "[1, 2, 3]"]),
    "word in box": (coco_json(annotations=[annotation(bbox=[1, 2, 3, "4"])]), ["Annotation 50", '"4"']),
    "NaN in box": (coco_json(annotations=[annotation(bbox=[1, 2, 3, float("nan")])]), ["Annotation 50", "NaN"]),
    "image twice": (coco_json(images=COCO_JSON["images"] + COCO_JSON["images"][:1]), ["id 7", "twice"]),
    "image id as text": (coco_json(images=[{**COCO_JSON["images"][0], "id": "7"}]), ["Entry 0", '"7", which is text']),
    "category id as text": (coco_json(categories=[{"id": "4", "name": "a"}]), ['"4", which is text', "without quotes"]),
    "image id too large": (coco_json(images=[{**COCO_JSON["images"][0], "id": 2**63}]), ["does not fit 64 bits"]),
    "image id with a fraction": (coco_json(images=[{**COCO_JSON["images"][0], "id": 7.5}]), ['the "id" 7.5']),
    "image_id as text": (coco_json(annotations=[annotation(image_id="3")]), ["Annotation 50", '"3", which is text']),
    "image_id as a list": (coco_json(annotations=[annotation(image_id=[3])]), ["Annotation 50", "which is a list"]),
    "image_id true": (coco_json(annotations=[annotation(image_id=True)]), ["Annotation 50", "true"]),
    "category_id as text": (coco_json(annotations=[annotation(category_id="4")]), ["Annotation 50", "which is text"]),
    "no image_id": (coco_json(annotations=[{"id": 50, "category_id": 4}]), ["Annotation 50", 'no "image_id"']),
    "an annotation without id": (coco_json(annotations=[{"category_id": 4}]), ["Annotation at position 0"]),
    "an annotation of another type": (coco_json(annotations=["a"]), ['Entry 0 of "annotations"', '"a"']),
    "crowd in words": (coco_json(annotations=[annotation(iscrowd="many")]), ["Annotation 50", '"iscrowd" "many"']),
    "crowd as a list": (coco_json(annotations=[annotation(iscrowd=[0])]), ["Annotation 50", '"iscrowd" [0]']),
    "size as text": (coco_json(images=[{**COCO_JSON["images"][0], "width": "60"}]), ["Image 7", 'width is "60"']),
    "size with a fraction": (coco_json(images=[{**COCO_JSON["images"][0], "width": 60.5}]), ["width is 60.5"]),
    "size of 31 digits": (
        coco_json(images=[{**COCO_JSON["images"][0], "height": 10**30}]),
        ["Image 7", "height is 1000"],
    ),
    "infinite size": (coco_json(images=[{**COCO_JSON["images"][0], "height": float("inf")}]), ["height is Infinity"]),
    "number of 5,000 digits": (json.dumps(COCO_JSON).replace("40", "4" * 5000), ["not JSON", "too many digits"]),
    "deep lists": ("[" * 200_000, ["nested too deeply"]),
    "deep objects": (json.dumps(COCO_JSON)[:-1] + ', "info": ' + '{"a":' * 200_000, ["nested too deeply"]),
    "category_id as an object": (coco_json(annotations=[annotation(category_id={})]), ["Annotation 50", "category_id"]),
    "half a character in a class": (coco_json(categories=[{"id": 4, "name": "\ud800"}]), [r"Category 4", r'"\ud800"']),
    "half a character in a file": (coco_json(images=[{**COCO_JSON["images"][0], "file_name": "\ud800"}]), ["Image 7"]),
    "a null character": (coco_json(images=[{**COCO_JSON["images"][0], "file_name": "a\0.png"}]), [r"a\u0000.png"]),
    "an empty file name": (coco_json(images=[{**COCO_JSON["images"][0], "file_name": ""}]), ['"", which is no name']),
    "the folder as a file name": (coco_json(images=[{**COCO_JSON["images"][0], "file_name": "./"}]), ["no name"]),
    **{
        name: (
            coco_json(images=[{**COCO_JSON["images"][1], "file_name": file}], annotations=[]),
            ["1 of 1 images are missing", "aaa...; add them"],
        )
        for name, file in {
            "a long file name": "a" * 5000,
            "a long folder": "a" * 5000 + "/z.png",
            "a long name with backslashes": "a" * 5000 + r"\b" * 2000,
        }.items()
    },
    "other capital letters": (
        coco_json(images=[{**COCO_JSON["images"][1], "file_name": "A.PNG"}], annotations=[]),
        ["a.png exists: write its capital letters as they are"],
    ),
    "a URL": (
        coco_json(images=[{**COCO_JSON["images"][1], "file_name": "http://x.org/a.png"}], annotations=[]),
        ["is a URL: download the images"],
    ),
    "a folder too many": (
        coco_json(images=[{**COCO_JSON["images"][1], "file_name": "images/a.png"}], annotations=[]),
        ["images/a.png exists", "remove the folders"],
    ),
    "a Windows path": (
        coco_json(images=[{**COCO_JSON["images"][1], "file_name": r"C:\photos\a.png"}], annotations=[]),
        ["images/a.png exists", "remove the folders"],
    ),
    "nameless category": (coco_json(categories=[{"id": 4}, {"id": 17, "name": "a"}, {"id": 90, "name": "b"}]), ["4"]),
    "nameless image": (
        coco_json(images=[{"id": 3, "width": 1, "height": 1}], annotations=[]),
        ["Image 3", "file_name"],
    ),
    "image without size": (
        coco_json(images=[{"id": 3, "file_name": "gone.png"}], annotations=[]),
        ["lacks the size of", "gone.png", "add the width and height"],
    ),
    "missing image": (
        coco_json(images=[*COCO_JSON["images"], {"id": 1, "file_name": "x.png", "width": 1, "height": 1}]),
        ["1 of 4 images are missing", "x.png"],
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_an_invalid_file_is_named_in_one_sentence(name: str, make_data: Callable[..., Coco]):
    content, words = BAD_FILES[name]
    with pytest.raises(UserError) as error:
        make_data(content).count("train")
    about_images = "missing" in str(error.value)  # and so it names the folder of images
    for word in [*words, "images" if about_images else "instances.json"]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "ids", [[1, 1, 1], ["a-1", "a-2", "a-3"], [2**63, 2**70, -1], [None, 1.5, [2]], ["1", 1, True]]
)
def test_ids_of_annotations_may_be_anything(ids: list[Any], make_data: Callable[..., Coco]):
    changed = [{**a, "id": id} for a, id in zip(COCO_JSON["annotations"], ids, strict=True)]
    without = [{key: value for key, value in a.items() if key != "id"} for a in COCO_JSON["annotations"]]
    expected = evaluate(make_data(COCO_JSON))
    assert expected["AP"] == pytest.approx(1)
    assert evaluate(make_data(coco_json(annotations=changed))) == expected
    assert evaluate(make_data(coco_json(annotations=without))) == expected


def test_whole_numbers_may_be_written_with_a_point(make_data: Callable[..., Coco]):
    def with_points(content: Any) -> Any:
        keys = ("id", "image_id", "category_id", "width", "height", "iscrowd")
        return [{key: float(value) if key in keys else value for key, value in entry.items()} for entry in content]

    data, same = make_data(COCO_JSON), {key: with_points(entries) for key, entries in COCO_JSON.items()}
    truth, expected = make_data(same).ground_truth("test"), data.ground_truth("test")
    assert json.dumps(truth["images"]) == json.dumps(expected["images"])  # 64 and not 64.0, as results are written
    assert json.dumps(make_data(same).categories()) == json.dumps(data.categories())
    for written, plain in zip(truth["annotations"], expected["annotations"], strict=True):
        assert json.dumps([written["image_id"], written["category_id"], written["iscrowd"]]) == json.dumps(
            [plain["image_id"], plain["category_id"], plain["iscrowd"]]
        )


def test_a_category_that_has_its_name_under_another_id_is_told_so(make_data: Callable[..., Coco], tmp_path: Path):
    shifted = [{"id": c["id"] - 1, "name": c["name"]} for c in COCO_JSON["categories"]]
    boxes = [{**a, "category_id": a["category_id"] - 1} for a in COCO_JSON["annotations"]]
    train = make_data(COCO_JSON).train
    (tmp_path / "test.json").write_text(json.dumps(coco_json(categories=shifted, annotations=boxes)))
    test = Files(images=str(tmp_path / "images"), annotations=str(tmp_path / "test.json"))
    with pytest.raises(UserError, match=r"89 is 'brush' .* not listed in .*, where 'brush' has id 90; give"):
        coco(train=train, test=test).count("test")


def test_backslashes_in_file_names_are_folders_unless_a_file_has_that_name(
    make_data: Callable[..., Coco], tmp_path: Path
):
    (tmp_path / "images/b").mkdir()
    (tmp_path / "images/c.png").rename(tmp_path / "images/b/c.png")
    images = [{**image} for image in COCO_JSON["images"]]
    images[2]["file_name"] = r"b\c.png"
    data = make_data(coco_json(images=images))
    assert data.where("train", 2) == str(tmp_path / "images/b/c.png") and data.sample("train", 2, None)["id"] == 9
    (tmp_path / r"images/b\c.png").write_bytes((tmp_path / "images/b/c.png").read_bytes())
    assert make_data(coco_json(images=images)).where("train", 2) == str(tmp_path / r"images/b\c.png")


@pytest.mark.parametrize(("listed", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_file_names_and_classes_are_compared_in_either_form_of_unicode(
    listed: str, stored: str, make_data: Callable[..., Coco], tmp_path: Path
):
    """An e with an accent is one character in NFC (Linux, Windows) and two in NFD (macOS)."""
    name, file = (unicodedata.normalize(form, "caf\u00e9") for form in (listed, stored))
    (tmp_path / "images/c.png").rename(tmp_path / f"images/{file}.png")
    images = [
        {**image, "file_name": image["file_name"].replace("c.png", f"{name}.png")} for image in COCO_JSON["images"]
    ]
    classes, same = (
        [{**c, "name": c["name"].replace("cat", n)} for c in COCO_JSON["categories"]] for n in (name, file)
    )
    data = make_data(coco_json(images=images, categories=classes))
    assert data.where("train", 2) == str(tmp_path / f"images/{file}.png") and data.sample("train", 2, None)["id"] == 9
    (tmp_path / "test.json").write_text(json.dumps(coco_json(images=images, categories=same)))
    test = Files(images=str(tmp_path / "images"), annotations=str(tmp_path / "test.json"))
    assert coco(train=data.train, test=test).count("test") == 3


def test_the_summary_names_the_classes_by_index(make_data: Callable[..., Coco]):
    assert make_data(COCO_JSON).summary()[:2] == ["3 classes", "classes: aeroplane, cat, brush"]


POLYGON = [[0, 0, 10, 0, 10, 10, 0, 10]]  # 100 square pixels


@pytest.mark.parametrize("area", ["575", float("nan"), float("inf"), [575], {}, True, -3, 0, "", 10**400], ids=str)
def test_an_area_that_is_no_positive_number_is_that_of_the_mask_or_else_of_the_box(
    area: Any, make_data: Callable[..., Coco]
):
    code = {"size": [40, 60], "counts": [0, 50, 2350]}
    shapes: list[Any] = [POLYGON, code, [], None, [[1, 2]], [["a"] * 6], "x", {"size": [40, 60], "counts": "??"}]
    odd = [annotation(id=i, area=area, segmentation=shape) for i, shape in enumerate(shapes)]
    content = coco_json(annotations=[*odd, annotation(id=99, area=7), annotation(id=100, area=None)])
    data = make_data(content)
    areas = [a["area"] for a in data.ground_truth("test")["annotations"]]
    assert areas[:7] == [100, 50, 25, 25, 25, 25, 25] and areas[8:] == [7, 25]
    note = (
        "area computed from the segmentation or the box: 8 x area that is no positive number (annotation 0, 1, 2, ...)"
    )
    assert f"test: {note}" in data.summary() and f"train: {note}" in data.summary()


@pytest.mark.parametrize(
    "shape",
    [
        [[0, 0, 5e8, 0, 5e8, 5e8, 0, 5e8]],
        [[0, 0, 9e5, 9e5] * 1000],
        {"size": [40, 60], "counts": "o" * 2000},
        {"size": [40, 60], "counts": "\u00ff"},
        {"size": [40, 60], "counts": [10**30]},
    ],
    ids=["far", "long", "incomplete", "no code", "large"],
)
def test_a_mask_that_would_crash_pycocotools_is_not_read(shape: Any, make_data: Callable[..., Coco]):
    data = make_data(coco_json(annotations=[annotation(area="?", segmentation=shape)]))
    assert data.ground_truth("test")["annotations"][0]["area"] == 25
    assert evaluate(data)["AP"] == pytest.approx(1)  # COCO's numbers of boxes do not read it either


@pytest.mark.timeout(60)
def test_a_named_pipe_among_the_images_is_named_and_nothing_waits_for_it(
    make_data: Callable[..., Coco], tmp_path: Path
):
    data = make_data(COCO_JSON)
    (tmp_path / "images/a.png").unlink()
    os.mkfifo(tmp_path / "images/a.png")
    assert data.summary() and data.fingerprint("train")
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"images/a.png cannot be read \(it is a named pipe"):
            list(Loader(data, "train", seed=0, workers=workers, pin=False)([(0, (0, 1, 2))]))


@pytest.mark.timeout(60)
def test_annotations_in_a_named_pipe_are_refused(make_data: Callable[..., Coco], tmp_path: Path):
    data = make_data(COCO_JSON)
    (tmp_path / "instances.json").unlink()
    os.mkfifo(tmp_path / "instances.json")
    with pytest.raises(UserError, match="it is a named pipe and no regular file"):
        data.count("train")


def test_an_area_of_a_box_without_extent_is_zero_and_not_reported(make_data: Callable[..., Coco]):
    data = make_data(
        coco_json(annotations=[annotation(area=0, bbox=[1, 1, 0, 5]), annotation(bbox=[9, 9, -1, -1], area=-1)])
    )
    assert [a["area"] for a in data.ground_truth("test")["annotations"]] == [0, 0]
    assert "1 x area that is no positive number" in "\n".join(data.summary())


@pytest.mark.parametrize(("text", "crowd"), [("0", 0), ("1", 1), ("false", 0), ("True", 1), (" 0 ", 0), ("", 0)])
def test_iscrowd_as_text_is_read_as_it_is_meant_in_training_and_evaluation(
    text: str, crowd: int, make_data: Callable[..., Coco]
):
    data = make_data(coco_json(annotations=[annotation(iscrowd=text), annotation(iscrowd=None)]))
    assert len(data.sample("train", 1, None)["boxes"]) == 2 - crowd
    assert [a["iscrowd"] for a in data.ground_truth("test")["annotations"]] == [crowd, 0]
    assert "train: read as a number: 1 x iscrowd that is text (annotation 50)" in data.summary()


def doubts(data: Coco, queries: int = 100) -> list[str]:
    """The warnings of `train`."""
    return [line.removeprefix("train: ") for line in (*data.advice("train"), *data.query_advice("train", queries))]


def test_good_annotations_raise_no_doubt(make_data: Callable[..., Coco]):
    data = make_data(COCO_JSON)
    assert [warning for split in SPLITS for warning in data.query_advice(split, 2)] == []
    assert data.advice("train") == data.advice("val") == []


def test_images_of_test_that_are_also_in_train_are_reported_once_train_has_been_read(
    make_data: Callable[..., Coco],
):
    data = make_data(COCO_JSON)  # test has the JSON of train
    assert data.advice("train") == []
    (warning,) = data.advice("test")
    assert warning.startswith("test: 3 of 3 images are also in train (the first is b.png), so its metrics are in part")


@pytest.mark.parametrize("annotations", [[], [annotation(iscrowd=1)], [annotation(bbox=[1, 1, 0, 4])]])
def test_a_split_without_an_object_is_named(annotations: list[Any], make_data: Callable[..., Coco]):
    data = make_data(coco_json(annotations=annotations))
    assert "no box to learn from" in doubts(data)[0] and "data.train.annotations" in doubts(data)[0]
    assert any(line.startswith("test: there is no object to find") for line in data.advice("test"))
    val = coco(train=data.train, val=data.train)
    assert any(line.startswith("val:") and "cannot select a checkpoint" in line for line in val.advice("val"))


def test_images_with_more_objects_than_queries_are_counted_and_the_worst_is_named(make_data: Callable[..., Coco]):
    data = make_data(coco_json(annotations=[annotation(image_id=image) for image in (3, 3, 3, 9, 9)]))
    assert doubts(data, 3) == []
    assert "1 of 3 images" in doubts(data, 2)[0] and "2 of 3 images" in doubts(data, 1)[0]
    assert (
        "at most 3 in" in doubts(data, 1)[0] and "a.png" in doubts(data, 1)[0] and "model.queries" in doubts(data, 1)[0]
    )


def test_classes_without_a_box_are_listed(make_data: Callable[..., Coco]):
    root = {"id": 0, "name": "cells"}
    data = make_data(coco_json(categories=[root, *COCO_JSON["categories"]]))
    assert "train: 1 of 4 classes have no box and will not be learnt: cells (id 0)" in data.summary()
    assert "will not be learnt" not in "\n".join(make_data(COCO_JSON).summary())


def test_boxes_that_look_normalised_or_like_corners_are_doubted(make_data: Callable[..., Coco]):
    normalised = [annotation(bbox=[0.1, 0.2, 0.5, 0.6]), annotation(bbox=[0, 0, 1.0, 1])]
    assert "look relative to the image size" in doubts(make_data(coco_json(annotations=normalised)))[0]
    corners = [annotation(bbox=[30, 20, 50, 35]), annotation(bbox=[1, 1, 5, 5])]
    assert "1 of 2 boxes leave their image" in doubts(make_data(coco_json(annotations=corners)))[0]
    for harmless in ([annotation(bbox=[0, 0, 60, 40])], [*corners, annotation(bbox=[30, 20, 10, 10])]):
        assert doubts(make_data(coco_json(annotations=harmless))) == []


def test_only_test_may_be_without_annotations(make_data: Callable[..., Coco], tmp_path: Path):
    data = make_data(COCO_JSON)
    (tmp_path / "info.json").write_text(json.dumps({key: COCO_JSON[key] for key in ("images", "categories")}))
    unlabelled = Files(images=str(tmp_path / "images"), annotations=str(tmp_path / "info.json"))
    data = coco(train=data.train, test=unlabelled)
    assert data.count("test") == 3 and "annotations" not in data.ground_truth("test")
    assert f"test: 3 images, no annotations (there will be no numbers) of {tmp_path / 'info.json'}" in data.summary()
    assert data.advice("test") == [] and coco(test=unlabelled).categories() == data.categories()
    for keys in ({"train": unlabelled}, {"train": data.train, "val": unlabelled}):
        with pytest.raises(UserError, match='has no list of "annotations"'):
            coco(**keys).summary()


def test_panoptic_json_is_recognised(make_data: Callable[..., Coco]):
    segments = {"image_id": 3, "file_name": "3.png", "segments_info": []}
    with pytest.raises(UserError, match=r"instances.json is panoptic JSON, .*; give data=coco_panoptic\.$"):
        make_data({**COCO_JSON, "annotations": [segments]}).count("train")


def test_missing_folders_and_splits_with_one_key_are_refused(tmp_path: Path, make_data: Callable[..., Coco]):
    with pytest.raises(UserError, match=r"data.train.images and data.train.annotations go together"):
        coco(train=Files(images="x", annotations=None))
    with pytest.raises(UserError, match=r"data.root"):
        coco().count("train")
    with pytest.raises(UserError, match="no val images"):
        coco().ground_truth("val")
    path = tmp_path / "instances.json"
    make_data(COCO_JSON)
    with pytest.raises(UserError, match=r"folder of images .*gone does not exist"):
        coco(train=Files(images=str(tmp_path / "gone"), annotations=str(path))).count("train")
    with pytest.raises(UserError, match=r"data.val_count=3 leaves nothing of the 3 images"):
        make_data(COCO_JSON, val_count=3).count("train")


def test_splits_that_disagree_about_a_category_are_refused(tmp_path: Path, make_data: Callable[..., Coco]):
    data = make_data(COCO_JSON)
    for categories, word in (
        ([{"id": 90, "name": "comb"}, *COCO_JSON["categories"][1:]], "'comb'"),
        ([*COCO_JSON["categories"], {"id": 91, "name": "new"}], "not listed"),
    ):
        path = tmp_path / "other.json"
        extra = annotation(category_id=categories[-1]["id"])
        path.write_text(json.dumps(coco_json(categories=categories, annotations=[*COCO_JSON["annotations"], extra])))
        test = Files(images=str(tmp_path / "images"), annotations=str(path))
        with pytest.raises(UserError, match=word):
            coco(train=data.train, test=test).count("test")


def test_an_image_is_named_if_its_size_differs_from_the_annotations(make_data: Callable[..., Coco]):
    images = [{**image, "width": 61} for image in COCO_JSON["images"]]
    with pytest.raises(UserError, match=r"b.png has 60 x 40 pixels, but its annotations say 61 x 40"):
        make_data(coco_json(images=images)).sample("train", 0, None)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named_in_one_sentence(workers: int, make_data: Callable[..., Coco], tmp_path: Path):
    data = make_data(COCO_JSON)
    broken = tmp_path / "images/a.png"
    broken.write_bytes(broken.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"a.png is broken or no image") as caught:
        [*batching.evaluation(data, "train", batch_size=2, rank=0, world=1, workers=workers)]
    assert "\n" not in str(caught.value)


def test_where_names_the_file_of_a_sample(make_data: Callable[..., Coco], tmp_path: Path):
    files = [f"{tmp_path}/images/{name}.png" for name in "bac"]
    assert [make_data(COCO_JSON).where("train", i) for i in range(3)] == files


def test_a_users_image_needs_no_annotations(make_data: Callable[..., Coco], tmp_path: Path):
    data = coco()
    write_images(tmp_path / "photos", ["b.png", "a.JPG"])
    files = [tmp_path / "photos/a.JPG", tmp_path / "photos/b.png"]
    batch = data.collate([data.view(read_image(file), file) for file in files])
    assert batch["images"].shape == (2, 3, 40, 60) and batch["counts"] == [0, 0]
    assert batch["files"] == [str(file) for file in files]


def test_coco_and_another_data_set_are_read_without_code_of_their_own(real_data: Callable[[str], Path]):
    mini, cells = real_data("coco_mini"), real_data("bccd")

    def files_of(folder: Path, split: str) -> Files:
        return Files(images=str(folder / "images"), annotations=str(folder / f"{split}.json"))

    paper = Augmentation(
        kind="detr", sizes=[480, 640], eval_size=800, max_size=1333, middle_sizes=[400, 500], crop=(384, 600)
    )
    data = coco(train=files_of(mini, "train"), test=files_of(mini, "val"), augmentation=paper)
    assert (data.count("train"), data.count("test"), len(data.categories())) == (59, 42, 80)
    assert data.categories()[-1] == {"id": 90, "name": "toothbrush"}
    assert len(data.ground_truth("test")["annotations"]) == 366
    assert "test: left out of the targets: 6 x crowd" in "\n".join(data.summary())
    samples = [data.sample("train", i, torch.Generator().manual_seed(i)) for i in range(4)]
    batch = data.collate(samples)
    assert batch["images"].shape[0] == 4 and len(batch["boxes"]) == sum(batch["counts"])
    assert (batch["boxes"][:, 2:] > batch["boxes"][:, :2]).all()

    data = coco(
        train=files_of(cells, "train"), val=files_of(cells, "val"), test=files_of(cells, "test"), augmentation=paper
    )
    assert [data.count(split) for split in ("train", "val", "test")] == [205, 87, 72]
    assert [category["name"] for category in data.categories()] == ["RBC", "WBC", "Platelets"]
    assert data.sample("val", 0, None)["image"].shape == (3, 800, 1066)
