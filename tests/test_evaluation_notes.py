"""What evaluate.py says about the data of the split that it evaluates."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import evaluate
from common.config.check import build
from common.config.compose import configure
from common.files.log import Log


def data_and_task(*overrides: str) -> tuple[Any, Any]:
    """The data set and the task of a config."""
    config = configure("train", [*overrides])
    data = build(config["data"])
    return data, build(config["task"], data=data)


def lines(data: Any, task: Any, split: str, capsys: Any) -> list[str]:
    """What is printed about `split`."""
    evaluate.describe_data(data, task, split, Log(None, True))
    return capsys.readouterr().out.splitlines()


def write_image(file: Path, exif: Image.Exif | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(file, exif=exif)


def write_coco(folder: Path, **changes: Any) -> list[str]:
    """One image, turned by 180 degrees, with an object; the overrides for it as test, without a train split."""
    turned = Image.Exif()
    turned[0x0112] = 3
    write_image(folder / "images/a.jpg", turned)
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 10, 10], "area": 100, "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 30, "width": 40}],
        "annotations": [{**box, **changes}] * 3,
        "categories": [{"id": 1, "name": "cell"}],
    }
    (folder / "a.json").write_text(json.dumps(content))
    paths = [f"data.test.images={folder / 'images'}", f"data.test.annotations={folder / 'a.json'}"]
    return ["model=detr", "data=coco", f"data.root={folder / 'none'}", *paths]


def test_repairs_and_doubts_of_the_evaluated_annotations_are_printed(tmp_path: Path, capsys: Any) -> None:
    overrides = write_coco(tmp_path, area="100", bbox=[0.5, 0.5, 0.3, 0.3])
    first, *notes = lines(*data_and_task(*overrides, "model.queries=2"), "test", capsys)
    assert first == f"data      test: 1 images, 3 boxes of {tmp_path / 'a.json'}"
    repaired, turned, relative, surplus = notes
    assert repaired.startswith("data      test: area computed from") and "turned by EXIF" in turned
    assert relative.startswith("Warning: test: no coordinate of a box exceeds 1")
    assert surplus.startswith("Warning: test: 1 of 1 images have more objects than the model has queries (2)")


def test_a_split_without_objects_is_named_at_its_evaluation(tmp_path: Path, capsys: Any) -> None:
    *_, warning = lines(*data_and_task(*write_coco(tmp_path, iscrowd=1)), "test", capsys)
    assert warning.startswith("Warning: test: there is no object to find")


def test_absent_classes_and_odd_images_of_an_evaluated_folder_are_printed(tmp_path: Path, capsys: Any) -> None:
    for split, name in (("train", "a"), ("train", "b"), ("val", "a"), ("valid", "a")):
        write_image(tmp_path / split / name / "x.png")
    (tmp_path / "test/a").mkdir(parents=True)
    Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)).save(tmp_path / "test/a/y.tif")
    data, task = data_and_task("model=vit", "data=imagefolder", f"data.root={tmp_path}", "data.val_count=1")
    first, by_class, absent, grey = lines(data, task, "test", capsys)
    assert first == f"data      test: 1 images of {tmp_path / 'test'}" and by_class.endswith("test: by class: a 1, b 0")
    assert absent == "data      test: no image of 1 of 2 classes (b)" and "from 0 to 1" in grey
    assert lines(data, task, "val", capsys)[-1].startswith(f"Warning: data.root={tmp_path} holds valid/")


def test_what_was_left_out_of_the_evaluated_text_is_printed(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "source").write_text("one\ntwo\n\n")
    (tmp_path / "target").write_text("eins\nzwei\n")
    paths = [f"data.{split}.{side}={tmp_path / side}" for split in ("train", "test") for side in ("source", "target")]
    keys = ["data.val_count=0", "data.tokenizer.vocabulary=270"]
    data, task = data_and_task("model=seq2seq", "data=parallel_text", *paths, *keys)
    first, blank = lines(data, task, "test", capsys)
    assert first.startswith("data      test: 2 pairs, ") and "1 blank line at the end of" in blank


def test_sets_without_a_summary_of_one_split_are_silent(capsys: Any) -> None:
    assert lines(*data_and_task("model=vit"), "test", capsys) == []
