"""Flat folders and folders of splits: which reading is taken, and what is said about it."""

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from common.errors import UserError
from common.types import SPLITS, Split
from vit.data import cuts
from vit.data.augmentation import Augmentation
from vit.data.folder import ImageFolder

PLAIN = Augmentation(
    crop="none",
    scale=(1.0, 1.0),
    ratio=(1.0, 1.0),
    padding=0,
    flip=0.0,
    policy="none",
    operations=0,
    magnitude=0,
    erase=0.0,
    mixup=0.0,
    cutmix=0.0,
    cutmix_share=0.5,
    mix=0.0,
    repeats=1,
)


def folder(root: Path | None, **keys: Any) -> ImageFolder:
    """A data set with the defaults of configs/data/imagefolder.yaml that decide its splits."""
    plain: dict[str, Any] = {"train": None, "val": None, "test": None, "val_count": None, "test_share": 0.1}
    plain |= {"image_size": 8, "crop_ratio": 1.0, "interpolation": "bilinear", "augmentation": PLAIN, "batch_size": 4}
    keys = {"root": None if root is None else str(root), **plain, **keys}
    return ImageFolder(mean=(0.5,) * 3, std=(0.2,) * 3, **keys)


def write(top: Path, **classes: int | range) -> Path:
    """Write a class folder for each keyword, with that number of images, or with those of the numbers in a range."""
    for name, numbers in classes.items():
        (top / name).mkdir(parents=True, exist_ok=True)
        for i in numbers if isinstance(numbers, range) else range(numbers):
            Image.new("RGB", (8, 8), (i, i, i)).save(top / name / f"{i:04}.png")
    return top


def names(data: ImageFolder, split: Split) -> set[str]:
    """The files of a split, as <class>/<name>."""
    return {"/".join(Path(data.where(split, i)).parts[-2:]) for i in range(data.count(split))}


def counts(data: ImageFolder) -> list[int]:
    """Images of train, val and test."""
    return [data.count(split) for split in SPLITS]


def warnings_of(data: ImageFolder) -> list[str]:
    """The warnings about all splits."""
    return [warning for split in SPLITS for warning in data.advice(split)]


# Flat folders.


def test_sixty_images_of_a_flat_folder_are_cut_by_class_into_all_splits(tmp_path: Path):
    data = folder(write(tmp_path, ant=30, bee=20, cat=10))
    assert counts(data) == [48, 6, 6]
    assert len(set().union(*(names(data, split) for split in SPLITS))) == 60
    assert data.summary() == [
        f"data.root={tmp_path}: a flat folder, whose 3 folders are the classes",
        "3 classes",
        "classes: ant, bee, cat",
        f"train: 48 images of {tmp_path}",
        "train: by class: ant 24, bee 16, cat 8",
        f"val: 6 images of {tmp_path}, cut from train by a hash of the names (data.val_share=0.1)",
        "val: by class: ant 3, bee 2, cat 1",
        f"test: 6 images of {tmp_path}, cut from train by a hash of the names (data.test_share=0.1)",
        "test: by class: ant 3, bee 2, cat 1",
    ]
    assert not warnings_of(data)
    for split in SPLITS:
        for index in range(data.count(split)):
            sample = data.sample(split, index, None)
            assert sample["id"].split("/")[0] == data.classes()[sample["label"]]


def test_a_file_stays_in_its_split_whatever_lies_beside_its_class(tmp_path: Path):
    """Other classes, other files, another path and another share of val change no split of a class."""
    data = folder(write(tmp_path / "a", ant=30, bee=20))
    other = write(tmp_path / "b", ant=30, bee=20, aardvark=7, zebra=90)
    (other / "ant/notes.txt").touch()
    (other / "ant/.hidden.png").touch()
    larger = folder(other)
    for split in SPLITS:
        assert {name for name in names(larger, split) if name[:3] in ("ant", "bee")} == names(data, split)
    assert names(folder(tmp_path / "a", val_share=0.5), "test") == names(data, "test")
    assert names(folder(tmp_path / "a", val_count=9), "test") == names(data, "test")
    assert names(data, "test") != {f"{name}/{i:04}.png" for name in ("ant", "bee") for i in range(3)}


def test_more_images_of_a_class_move_only_those_beside_the_limits_of_its_splits(tmp_path: Path):
    """Without an order by hashes, another number of images would shuffle all of them."""
    data = folder(write(tmp_path / "a", ant=100))
    larger = folder(write(tmp_path / "b", ant=101))
    moved = [name for split in SPLITS for name in names(data, split) - names(larger, split)]
    assert len(moved) <= 2


def test_a_folder_of_splits_with_train_alone_is_cut_as_the_flat_folder(tmp_path: Path):
    flat = folder(write(tmp_path / "flat", ant=20, bee=40))
    data = folder(write(tmp_path / "splits/train", ant=20, bee=40).parent)
    assert all(names(data, split) == names(flat, split) for split in SPLITS)
    assert data.summary()[0] == f"data.root={tmp_path / 'splits'}: train/ is train"


def test_a_small_class_gives_one_image_to_each_split_and_keeps_one(tmp_path: Path):
    data = folder(write(tmp_path, one=1, two=2, three=3, four=4))
    by_class = {
        name: [sum(file.startswith(f"{name}/") for file in names(data, split)) for split in SPLITS]
        for name in data.classes()
    }
    assert by_class == {"one": [1, 0, 0], "two": [1, 0, 1], "three": [1, 1, 1], "four": [2, 1, 1]}
    assert "val: no image of 2 of 4 classes (one, two)" in data.summary()
    assert counts(folder(write(tmp_path / "single", only=1))) == [1, 0, 0]


def test_val_count_takes_precedence_over_the_share_and_0_cuts_nothing(tmp_path: Path):
    write(tmp_path, ant=30, bee=30)
    data = folder(tmp_path, val_count=9, val_share=0.5)
    assert counts(data) == [45, 9, 6]
    assert f"val: 9 images of {tmp_path}, cut from train at random (data.val_count=9)" in data.summary()
    assert counts(folder(tmp_path, val_count=0)) == [54, 0, 6]
    data = folder(tmp_path, val_share=0.0, test_share=0.0)
    assert counts(data) == [60, 0, 0] and "cut from train" not in "".join(data.summary())


def test_shares_that_leave_nothing_are_refused(tmp_path: Path):
    data = folder(write(tmp_path, ant=60), val_share=0.6, test_share=0.4)
    with pytest.raises(
        UserError, match=r"data.test_share=0.4 and data.val_share=0.6 leave nothing of the 60 images of"
    ):
        data.count("train")
    assert counts(folder(tmp_path, val_share=0.9, test_share=0.0)) == [6, 54, 0]


def test_a_large_set_keeps_its_10000_images_of_val(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As with the former default data.val_count=10000, so that runs on ImageNet resume; here 100 images are large."""
    assert (cuts.LARGE_SET, cuts.LARGE_VAL_COUNT) == (100_000, 10_000)
    monkeypatch.setattr(cuts, "LARGE_SET", 100)
    monkeypatch.setattr(cuts, "LARGE_VAL_COUNT", 7)
    write(tmp_path / "train", ant=50, bee=50)
    data, former = folder(tmp_path, test_share=0.0), folder(tmp_path, test_share=0.0, val_count=7)
    assert counts(data) == [93, 7, 0] and names(data, "val") == names(former, "val")
    assert counts(folder(tmp_path, test_share=0.0, val_share=0.1)) == [90, 10, 0]
    (tmp_path / "train/ant/0000.png").unlink()
    assert counts(folder(tmp_path, test_share=0.0)) == [89, 10, 0]


def test_names_that_are_not_valid_unicode_are_cut(tmp_path: Path):
    (tmp_path / "ant").mkdir()
    for i in range(20):
        (Path(os.fsdecode(os.fsencode(tmp_path / "ant") + b"/\xff%d.png" % i))).touch()
    assert counts(folder(tmp_path)) == [16, 2, 2]


def test_a_train_given_by_path_is_cut_for_val_but_not_for_test(tmp_path: Path):
    data = folder(None, train=str(write(tmp_path, ant=30)))
    assert counts(data) == [27, 3, 0]


# Folders of splits.


@pytest.mark.parametrize("name", ["valid", "validation", "dev", "Val"])
def test_a_val_folder_of_another_name_is_val(tmp_path: Path, name: str):
    for split in ("train", name, "test"):
        write(tmp_path / split, ant=5, bee=5)
    data = folder(tmp_path)
    assert counts(data) == [10, 10, 10] and not warnings_of(data)
    assert data.summary()[0] == f"data.root={tmp_path}: train/ is train, {name}/ is val, test/ is test"
    assert Path(data.where("val", 0)).parts[-3] == name


def test_without_a_test_valid_is_test_as_val_is(tmp_path: Path):
    for split in ("Training", "valid"):
        write(tmp_path / split, ant=10, bee=10)
    data = folder(tmp_path)
    assert counts(data) == [18, 2, 20]
    notes = f"data.root={tmp_path}: Training/ is train, valid/ is test, since there is no folder of test"
    assert data.summary()[0] == notes


def test_a_second_folder_of_a_split_is_named_in_a_warning(tmp_path: Path):
    for split in ("train", "val", "valid", "test"):
        write(tmp_path / split, ant=10)
    data = folder(tmp_path, test_share=0.0)
    assert Path(data.where("val", 0)).parts[-3] == "val"
    (warning,) = data.advice("val")
    assert "holds valid/, which is not read, since val/ is the folder of val" in warning
    assert f"give data.val={tmp_path / 'valid'}." in warning
    assert not folder(tmp_path, val=str(tmp_path / "valid"), test_share=0.0).advice("val")


def test_other_folders_beside_those_of_splits_are_listed_as_not_read(tmp_path: Path):
    write(tmp_path / "train", ant=10, bee=10)
    (tmp_path / "papers").mkdir()
    data = folder(tmp_path)
    assert data.summary()[0] == f"data.root={tmp_path}: train/ is train; not read: papers/" and not warnings_of(data)
    (tmp_path / "train").rename(tmp_path / "test")
    with pytest.raises(UserError, match=r"no folder train in data.root=.*papers/ beside .* cannot be read"):
        folder(tmp_path).count("train")


# A name of a split as a name of a class.


def test_a_class_named_as_a_split_is_a_class_if_it_holds_images_beside_others(tmp_path: Path):
    data = folder(write(tmp_path, car=10, train=10, test=10))
    assert data.classes() == ["car", "test", "train"] and counts(data) == [24, 3, 3]
    (warning,) = warnings_of(data)
    assert "train/, test/ is taken as a class" in warning and "move it out of data.root" in warning


def test_a_folder_named_as_a_split_that_holds_folders_is_the_split(tmp_path: Path):
    write(tmp_path / "train", steam=10, diesel=10)
    write(tmp_path, car=10)
    data = folder(tmp_path)
    assert data.classes() == ["diesel", "steam"]
    (warning,) = warnings_of(data)
    assert "holds folders of splits (train/), so that car/, which hold images, are not read" in warning


def test_unlabelled_images_of_a_split_are_no_class(tmp_path: Path):
    """Not even where the folder of another split has class folders."""
    write(tmp_path / "train", ant=10)
    write(tmp_path, test=10)
    with pytest.raises(UserError, match=r"10 images lie directly in .*test and so have no class"):
        folder(tmp_path).count("test")
    write(tmp_path, other=1)
    with pytest.raises(UserError, match=r"10 images lie directly in .*test and so have no class"):
        folder(tmp_path).count("test")


# Mistakes.


def test_a_split_inside_a_flat_root_is_refused(tmp_path: Path):
    write(tmp_path, ant=10, bee=10)
    inside = write(tmp_path / "holdout/deep", ant=2)
    for path in (inside, inside.parent):
        with pytest.raises(UserError, match=r"^data.test=.* lies in data.root=.*, whose folders are classes of train"):
            folder(tmp_path, test=str(path)).count("train")


def test_a_flat_root_is_not_read_beside_data_train(tmp_path: Path):
    write(tmp_path / "root", ant=10, bee=10)
    data = folder(tmp_path / "root", train=str(write(tmp_path / "mine", dog=10)))
    assert data.classes() == ["dog"] and counts(data) == [9, 1, 0]
    assert data.summary()[0] == f"data.root={tmp_path / 'root'} is not read, since data.train is given"


def test_a_folder_above_the_data_set_is_refused_with_its_path(tmp_path: Path):
    write(tmp_path / "archive", ant=10, bee=10)
    with pytest.raises(UserError, match=rf"holds the single folder archive, .* give data.root={tmp_path}/archive.$"):
        folder(tmp_path).count("train")


def test_a_folder_without_classes_is_refused_with_the_expected_layout(tmp_path: Path):
    with pytest.raises(UserError, match=r"holds no class; expected .*/<class>/<image>"):
        folder(tmp_path).count("train")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"1 images lie directly in"):
        folder(tmp_path).count("train")


def test_the_numbers_of_many_classes_are_summarised(tmp_path: Path):
    data = folder(write(tmp_path, **{f"c{i:02}": 10 + i for i in range(30)}))
    assert "train: by class: 8 (c00) to 31 (c29)" in data.summary()
