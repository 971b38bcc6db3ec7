"""Layouts of data.root, and the splits that are cut from train where the folder has none."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from common.errors import UserError
from common.types import SPLITS, Split
from detr.data.coco import Coco, Files
from detr.data.transforms import Augmentation

UNCHANGED = Augmentation(kind="none", sizes=[1], eval_size=480, max_size=1333, middle_sizes=[1], crop=(1, 1))
NONE = Files(images=None, annotations=None)


def coco(root: Path | None, **keys: Any) -> Coco:
    """A data set with the defaults of configs/data/coco.yaml that decide its splits."""
    plain: dict[str, Any] = {"train": NONE, "val": NONE, "test": NONE, "val_count": None, "test_share": 0.1}
    keys = {"root": None if root is None else str(root), **plain, "augmentation": UNCHANGED, **keys}
    return Coco(batch_size=2, pad_to=1, cache=False, **keys)


def small_set(count: int, first: int = 0) -> dict[str, Any]:
    """A COCO JSON of images 0000.png, 0001.png, ... of 8 x 6 pixels, with one box each."""
    numbers = range(first, first + count)
    return {
        "images": [{"id": i, "file_name": f"{i:04}.png", "width": 8, "height": 6} for i in numbers],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 3, 2]} for i in numbers],
    }


def write(path: Path, images: Path, content: dict[str, Any]) -> None:
    """Write a JSON, and the images that it lists."""
    for folder in (path.parent, images):
        folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    for image in content["images"]:
        Image.new("RGB", (8, 6)).save(images / image["file_name"])


def names(data: Coco, split: Split) -> set[str]:
    """The names of the files of a split."""
    return {Path(data.where(split, i)).name for i in range(data.count(split))}


def boxes(data: Coco) -> dict[str, Any]:
    """The boxes and classes of each image of all splits, by split and file name."""
    samples = [(split, data.sample(split, i, None)) for split in SPLITS for i in range(data.count(split))]
    return {f"{split}/{Path(s['file']).name}": (s["boxes"].tolist(), s["labels"].tolist()) for split, s in samples}


@pytest.mark.parametrize("with_test", [True, False])
def test_roboflow_and_json_files_beside_images_are_recognised_and_named(tmp_path: Path, with_test: bool):
    folders = ("train", "valid", "test")[: 2 + with_test]
    for number, (split, folder) in enumerate(zip(SPLITS, folders, strict=False)):
        content = small_set(20, 100 * number)
        write(tmp_path / "roboflow" / folder / "_annotations.coco.json", tmp_path / "roboflow" / folder, content)
        write(tmp_path / "beside" / f"{split}.json", tmp_path / "beside/images", content)
    roboflow, beside = coco(tmp_path / "roboflow"), coco(tmp_path / "beside")
    assert boxes(roboflow) == boxes(beside)
    assert [roboflow.count(split) for split in SPLITS] == ([20, 20, 20] if with_test else [18, 20, 2])
    assert roboflow.summary()[0] == f"data.root={tmp_path / 'roboflow'}: the layout of Roboflow"
    assert beside.summary()[0] == f"data.root={tmp_path / 'beside'}: the layout of JSON files beside images/"
    cut = "test: cut from train by a hash of the file names (data.test_share=0.1)"
    assert (cut in beside.summary()) is not with_test
    assert names(roboflow, "val") == {f"{i:04}.png" for i in range(100, 120)}


def test_a_folder_without_a_known_layout_is_refused_with_the_layouts(tmp_path: Path):
    (tmp_path / "labels.json").write_text("{}")
    with pytest.raises(UserError, match=r"has none of the layouts COCO 2017 .*, Roboflow .*data.train.images"):
        coco(tmp_path).summary()


def test_sixty_images_are_cut_into_all_splits_by_the_names_alone(tmp_path: Path):
    content = small_set(60)
    write(tmp_path / "a/train.json", tmp_path / "a/images", content)
    data = coco(tmp_path / "a")
    assert [data.count(split) for split in SPLITS] == [48, 6, 6]
    assert len(names(data, "train") | names(data, "val") | names(data, "test")) == 60
    # Another order, other ids and another layout.
    turned = small_set(60)
    turned["images"].reverse()
    for entry, key in [(i, "id") for i in turned["images"]] + [(a, "image_id") for a in turned["annotations"]]:
        entry[key] = 1000 - entry[key]
    write(tmp_path / "b/train/_annotations.coco.json", tmp_path / "b/train", turned)
    assert boxes(coco(tmp_path / "b")) == boxes(data)
    assert names(coco(tmp_path / "a", val_share=0.5), "test") == names(data, "test")


def test_val_count_takes_precedence_over_the_share_and_0_cuts_nothing(tmp_path: Path):
    write(tmp_path / "train.json", tmp_path / "images", small_set(60))
    assert coco(tmp_path, val_count=9, val_share=0.5).count("val") == 9
    assert coco(tmp_path, val_count=0).count("val") == 0
    data = coco(tmp_path, val_share=0.0, test_share=0.0)
    assert [data.count(split) for split in SPLITS] == [60, 0, 0]
    assert not any("cut from train" in line for line in data.summary())
    with pytest.raises(UserError, match=r"data.test_share=0.5 and data.val_share=0.6 leave nothing of the 60 images"):
        coco(tmp_path, val_share=0.6, test_share=0.5).count("train")


def test_a_train_given_by_paths_is_cut_for_val_but_not_for_test(tmp_path: Path):
    """Training on files of one's own without a test used every image before there was data.test_share."""
    write(tmp_path / "all.json", tmp_path / "images", small_set(30))
    data = coco(None, train=Files(images=str(tmp_path / "images"), annotations=str(tmp_path / "all.json")))
    assert [data.count(split) for split in SPLITS] == [27, 3, 0]


def test_coco_2017_keeps_its_2000_images(tmp_path: Path):
    for folder, content in (("train2017", small_set(2100)), ("val2017", small_set(3))):
        (tmp_path / folder).mkdir()
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{folder}.json").write_text(json.dumps(content))
        for image in content["images"]:
            (tmp_path / folder / image["file_name"]).touch()
    data = coco(tmp_path)
    assert [data.count(split) for split in SPLITS] == [100, 2000, 3]
    assert names(data, "val") == names(coco(tmp_path, val_count=2000), "val")
    assert coco(tmp_path, val_share=0.01).count("val") == 21


def test_blood_cells_are_the_same_as_roboflow_and_beside_images(tmp_path: Path, real_data: Callable[[str], Path]):
    folder = real_data("bccd")
    content = json.loads((folder / "train.json").read_text())
    content["images"] = content["images"][:60]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    for path in (tmp_path / "beside/train.json", tmp_path / "roboflow/train/_annotations.coco.json"):
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
    os.symlink(folder.resolve() / "images", tmp_path / "beside/images")
    for image in content["images"]:
        shutil.copy(folder / "images" / image["file_name"], tmp_path / "roboflow/train")
    assert boxes(coco(tmp_path / "beside")) == boxes(coco(tmp_path / "roboflow"))
    data = coco(folder)
    assert [data.count(split) for split in SPLITS] == [205, 87, 72]


@pytest.mark.parametrize("missing", [{}, {"width": 0, "height": 0}, {"width": None, "height": 6}])
def test_sizes_that_the_json_lacks_are_read_from_the_images(tmp_path: Path, missing: dict[str, Any]):
    content = small_set(10)
    write(tmp_path / "whole/train.json", tmp_path / "whole/images", content)
    for image in content["images"]:
        for key in ("width", "height"):
            del image[key]
        image.update(missing)
    write(tmp_path / "lacking/train.json", tmp_path / "lacking/images", content)
    whole, lacking = coco(tmp_path / "whole"), coco(tmp_path / "lacking")
    assert boxes(lacking) == boxes(whole) and lacking.ground_truth("test") == whole.ground_truth("test")
    note = "train: train.json lacks the sizes of 10 images, which were read from their files"
    assert note in lacking.summary() and note not in whole.summary()
    (tmp_path / "lacking/images/0003.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"lacks the size of .*0003.png, and it cannot be read from the image"):
        coco(tmp_path / "lacking").count("train")


@pytest.mark.parametrize(("exif", "size"), [("auto", (6, 8)), ("ignore", (6, 8)), ("apply", (8, 6))])
def test_a_size_that_the_json_lacks_is_that_of_the_image_as_it_is_read(
    tmp_path: Path, exif: str, size: tuple[int, int]
):
    content = small_set(4)
    write(tmp_path / "train.json", tmp_path / "images", content)
    tags = Image.Exif()
    tags[274] = 6  # a quarter turn
    for image in content["images"]:
        image["width"] = 0
        Image.new("RGB", (8, 6)).save(tmp_path / "images" / image["file_name"], exif=tags)
    (tmp_path / "train.json").write_text(json.dumps(content))
    data = coco(tmp_path, exif=exif)
    assert data.sample("train", 0, None)["original_size"] == size
    assert any("are turned by EXIF" in line and "read as stored" in line for line in data.summary()) is (
        exif != "apply"
    )
