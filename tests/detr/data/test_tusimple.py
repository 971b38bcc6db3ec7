import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from common.errors import UserError
from detr.data.lane_transforms import LaneAugmentation
from detr.data.tusimple import LaneFiles, TuSimple

CONFIG = yaml.safe_load((Path(__file__).parents[3] / "configs/data/tusimple.yaml").read_text())


def tusimple(root: Path | None, **changes: Any) -> TuSimple:
    keys = {name: value for name, value in CONFIG.items() if name != "_target_"}
    keys |= {split: LaneFiles(**keys[split]) for split in ("train", "val", "test")}
    keys |= {"augmentation": LaneAugmentation(**keys["augmentation"]), "image_size": (36, 64)}
    return TuSimple(**{**keys, "root": None if root is None else str(root), **changes})


def write(folder: Path, name: str, *images: tuple[str, list[int], Any]) -> None:
    """A file of labels, and images 128 pixels wide and 72 high."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for raw_file, rows, lanes in images:
        (folder / raw_file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (128, 72), (10, 20, 30)).save(folder / raw_file)
        record = {"raw_file": raw_file, "h_samples": rows}
        lines.append(json.dumps(record if lanes is None else {**record, "lanes": lanes}))
    (folder / name).write_text("\n".join(lines) + "\n")


def official(root: Path, train: str = "train_set", test: str = "test_set") -> None:
    write(root / train, "label_data_0313.json", ("clips/a/20.jpg", [30, 40, 50], [[10, 20, 30], [-2, 60, 61]]))
    write(root / train, "label_data_0601.json", ("clips/b/20.jpg", [20, 30, 40, 50], []))
    write(root / train, "label_data_0531.json", ("clips/c/20.jpg", [30, 40, 50], [[1, 2, 3]]))
    write(root / test, "test_label.json", ("clips/d/20.jpg", [30, 40, 50], [[1, 2, 3]]))


@pytest.mark.parametrize(("train", "test"), [("train_set", "test_set"), (".", ".")])
def test_the_official_folders_are_found(tmp_path, train, test):
    official(tmp_path, train, test)
    data = tusimple(tmp_path)
    assert [data.count(split) for split in ("train", "val", "test")] == [2, 1, 1]
    assert Path(data.where("test", 0)) == tmp_path / test / "clips/d/20.jpg"
    assert data.sample("test", 0, None)["image"].shape == (3, 36, 64)


def test_a_file_of_labels_beside_test_set_finds_its_images(tmp_path):
    official(tmp_path)
    (tmp_path / "test_set/test_label.json").rename(tmp_path / "test_label.json")
    assert Path(tusimple(tmp_path).where("test", 0)) == tmp_path / "test_set/clips/d/20.jpg"


def test_files_can_be_given_by_paths_with_a_folder_of_images(tmp_path):
    official(tmp_path)
    (tmp_path / "train_set/label_data_0313.json").rename(tmp_path / "mine.json")
    files = LaneFiles(images=str(tmp_path / "train_set"), labels=[str(tmp_path / "mine.json")])
    nothing = LaneFiles(images=None, labels=[])
    data = tusimple(None, train=files, val=nothing, test=nothing)
    assert [data.count(split) for split in ("train", "val", "test")] == [1, 0, 0]
    assert data.sample("train", 0, None)["points"].shape == (2, 3, 2)


def test_a_sample_has_points_in_pixels_of_the_resized_image(tmp_path):
    official(tmp_path)
    sample = tusimple(tmp_path).sample("train", 0, None)
    assert sample["original_size"] == (72, 128) and sample["rows"].tolist() == [30, 40, 50]
    assert sample["points"][0].tolist() == [[5, 15], [10, 20], [15, 25]]
    assert sample["valid"].tolist() == [[True, True, True], [False, True, True]]


def test_images_with_different_rows_are_collated(tmp_path):
    official(tmp_path)
    data = tusimple(tmp_path)
    batch = data.collate([data.sample("train", i, None) for i in (1, 0)])
    assert batch["counts"] == [0, 2] and batch["points"].shape == (2, 4, 2)
    assert batch["valid"].tolist() == [[True, True, True, False], [False, True, True, False]]
    assert [len(rows) for rows in batch["rows"]] == [4, 3] and not batch["padded"]
    assert batch["sizes"].tolist() == [[36, 64]] * 2 and batch["original_sizes"].tolist() == [[72, 128]] * 2


def test_augmentation_depends_on_the_generator_alone(tmp_path):
    official(tmp_path)
    data = tusimple(tmp_path)
    first, second, other = (data.sample("train", 0, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first["image"], second["image"]) and torch.equal(first["points"], second["points"])
    assert not torch.equal(first["points"], other["points"])


def test_a_users_image_has_72_rows_and_no_lanes(tmp_path):
    sample = tusimple(tmp_path).view(torch.zeros(3, 144, 100, dtype=torch.uint8), Path("photo.jpg"))
    assert sample["rows"][:2].tolist() == [2, 4] and len(sample["rows"]) == 72
    assert sample["points"].shape == (0, 72, 2) and sample["original_size"] == (144, 100)


def test_the_summary_counts_images_and_lanes(tmp_path):
    official(tmp_path)
    write(tmp_path / "train_set", "label_data_0601.json", ("clips/b/20.jpg", [20, 30], [[-2, -2], [1, 2]]))
    data = tusimple(tmp_path)
    lines = data.summary()
    assert data.sample("train", 1, None)["points"].shape == (1, 2, 2)
    assert lines[0].startswith("train: 2 images (2 with 2 lanes) of ")
    assert lines[1].startswith("train: 1 lanes without a point are no targets") and len(lines) == 4


def test_more_lanes_than_queries_give_a_warning(tmp_path):
    official(tmp_path)
    data = tusimple(tmp_path)
    assert data.query_advice("train", 2) == [] and data.query_advice("test", 1) == []
    (warning,) = data.query_advice("train", 1)
    assert warning.startswith("train: 1 images have more lanes than the model has queries (1;")


def test_a_test_without_lanes_is_accepted_but_no_train_without(tmp_path):
    official(tmp_path)
    write(tmp_path / "test_set", "test_label.json", ("clips/d/20.jpg", [30, 40], None))
    data = tusimple(tmp_path)
    assert data.ground_truth("test")[0].lanes is None and "no numbers" in data.split_summary("test")[0]
    assert data.sample("test", 0, None)["points"].shape == (0, 2, 2)
    write(tmp_path / "train_set", "label_data_0601.json", ("clips/b/20.jpg", [20, 30], None))
    with pytest.raises(UserError, match=r"label_data_0601.json, line 1 has no lanes"):
        tusimple(tmp_path).count("train")


def test_a_fingerprint_depends_on_the_labels_alone(tmp_path):
    official(tmp_path / "a")
    official(tmp_path / "b", ".", ".")
    first, second = tusimple(tmp_path / "a"), tusimple(tmp_path / "b")
    assert first.fingerprint("train") == second.fingerprint("train") != first.fingerprint("val")


def test_missing_files_are_named_with_the_keys_to_give(tmp_path):
    with pytest.raises(UserError, match=r"no file label_data_0313.json in data.root=.*data.train.labels"):
        tusimple(tmp_path).count("train")
    with pytest.raises(UserError, match=r"no file label_data_0313.json; give data.root"):
        tusimple(None).count("train")
    with pytest.raises(UserError, match=r"no labels of train: give data.train.labels"):
        tusimple(tmp_path, train=LaneFiles(images=None, labels=[])).count("train")


def test_a_missing_image_and_one_that_is_smaller_than_its_labels_are_refused(tmp_path):
    official(tmp_path)
    image = tmp_path / "test_set/clips/d/20.jpg"
    data = tusimple(tmp_path)
    Image.new("RGB", (64, 36)).save(image)
    with pytest.raises(UserError, match=r"line 1: h_samples has row 50, but .* has 36 rows"):
        data.sample("test", 0, None)
    write(tmp_path / "test_set", "test_label.json", ("clips/d/20.jpg", [30, 40, 50], [[-2, 140, 150], [1, 2, 3]]))
    with pytest.raises(UserError, match=r"line 1: a lane has no x below 140, but .* has 128 columns; give the labels"):
        tusimple(tmp_path).sample("test", 0, None)
    image.unlink()
    with pytest.raises(
        UserError, match=r"^1 of 1 images of test are missing, the first is .*20.jpg; .*data.test.images"
    ):
        tusimple(tmp_path).count("test")
