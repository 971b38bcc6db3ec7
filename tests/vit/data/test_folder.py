"""Image folders of every layout: splits, classes, views and partners, evaluation views, and mistakes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder as Torchvision
from torchvision.transforms import InterpolationMode, v2

from common.data import batching
from common.data.images import read_image
from common.data.names import names_line
from common.errors import UserError
from common.machine.seeds import generator
from common.types import SPLITS
from vit.data.augmentation import Augmentation
from vit.data.classes import order_notes, sort_classes
from vit.data.folder import ImageFolder

CPU = torch.device("cpu")
CROPS_AND_FLIPS: dict[str, Any] = {
    "crop": "resized",
    "scale": (0.2, 1.0),
    "ratio": (0.75, 4 / 3),
    "padding": 0,
    "flip": 0.5,
    "policy": "none",
    "operations": 2,
    "magnitude": 9,
    "erase": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "cutmix_share": 0.5,
    "mix": 1.0,
    "repeats": 1,
}


def augmentation(**changes: Any) -> Augmentation:
    """Random crops and flips, with changes."""
    return Augmentation(**{**CROPS_AND_FLIPS, **changes})


def folder(**keys: Any) -> ImageFolder:
    """A data set of small square images."""
    plain: dict[str, Any] = {"root": None, "train": None, "val": None, "test": None, "val_count": 0, "batch_size": 4}
    plain |= {"image_size": (8, 8), "crop_ratio": 1.0, "interpolation": "bilinear", "augmentation": augmentation()}
    return ImageFolder(**{**plain, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), **keys})


def warnings_of(data: ImageFolder) -> list[str]:
    """The warnings about all splits."""
    return [warning for split in SPLITS for warning in data.advice(split)]


def write_image(file: Path, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Path:
    """Write an image of (width, height) with pixels that depend on its name."""
    pixels = np.random.default_rng([*str(file.name).encode()]).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(file)
    return file


def write_split(path: Path, **counts: int) -> Path:
    """Write a class folder for each keyword, with that number of images, not in order of names."""
    for name, count in reversed(counts.items()):
        (path / name).mkdir(parents=True, exist_ok=True)
        for i in reversed(range(count)):
            write_image(path / name / f"{path.name}_{name}_{i}.png")
    return path


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """ImageNet's layout: ten images of three classes in train, five of two classes in val, no test."""
    write_split(tmp_path / "train", ant=4, bee=3, cat=3)
    write_split(tmp_path / "val", ant=2, cat=3)
    return tmp_path


def files(data: ImageFolder, split: Any) -> list[str]:
    """Names of a split's images in order."""
    return [Path(data.sample(split, i, None)["file"]).name for i in range(data.count(split))]


def counts(data: ImageFolder) -> list[int]:
    """Images of train, val and test."""
    return [data.count("train"), data.count("val"), data.count("test")]


def training_batch(data: ImageFolder, *indices: int, epoch: int = 0) -> dict[str, Any]:
    """A training batch, each sample with a generator of its own."""
    return data.collate([data.sample("train", i, generator(0, "sample", epoch, i)) for i in indices])


# Splits and classes.


def test_class_folders_in_either_form_of_unicode_are_the_same_class(tmp_path: Path):
    """macOS writes an e with an accent as two characters (NFD), Linux and Windows as one (NFC)."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    write_split(tmp_path / "train", bar=1, **{composed: 2})
    write_split(tmp_path / "test", bar=1, **{decomposed: 1})
    data = folder(root=str(tmp_path))
    assert data.classes() == ["bar", composed]
    assert [data.sample("test", i, None)["label"] for i in range(2)] == [0, 1]
    write_split(tmp_path / "train", **{decomposed: 1})
    assert "two class folders with the name caf" in error_message(folder(root=str(tmp_path)), "train")


def test_class_folders_on_the_wrong_level_are_noticed(imagenet: Path, tmp_path: Path):
    """The folder of the splits is refused as train; a single folder above the classes, and several, give a warning."""
    message = error_message(folder(train=str(imagenet)), "train")
    assert f"are train, val, which are names of splits and not of classes; give data.root={imagenet}" in message
    single = tmp_path / "single"
    single.mkdir()
    (imagenet / "train").rename(single / "photos")
    (warning,) = warnings_of(folder(train=str(single)))
    assert (
        "a single class, photos, so" in warning and f"if ant is a class, give data.train={single / 'photos'}" in warning
    )
    write_split(single / "drawings", dog=1)
    (warning,) = warnings_of(folder(train=str(single)))
    assert "drawings/dog/drawings_dog_0.png is taken as an image of the class drawings; if dog is its class" in warning
    write_image(single / "photos/x.png")
    assert not warnings_of(folder(train=str(single)))


def test_a_split_with_fewer_classes_is_evaluated_and_noted(imagenet: Path):
    """Also where train is missing, by the classes of the model; without these its classes are those of the folders."""
    data = folder(root=str(imagenet))
    assert "test: no image of 1 of 3 classes (bee)" in data.summary()
    (imagenet / "train").rename(imagenet / "away")
    assert folder(root=str(imagenet)).classes() == ["ant", "cat"]
    data = folder(root=str(imagenet))
    data.set_learnt_classes(["ant", "bee", "cat"])
    assert data.classes() == ["ant", "bee", "cat"]
    assert [data.sample("test", i, None)["label"] for i in range(5)] == [0, 0, 2, 2, 2]
    data.set_learnt_classes(["ant", "bee", "dog"])
    assert data.classes() == ["ant", "cat"], "other classes than those of the model stay, and are refused by the task"
    data = folder(root=str(imagenet), train=str(imagenet / "gone"))
    data.set_learnt_classes(["ant", "bee", "cat"])
    assert data.classes() == ["ant", "bee", "cat"], "a data.train that does not exist is a missing train"


NUMBERED = {str(i): 1 for i in (1, 2, 10, 11, 3)}


def test_the_order_of_numbered_classes_is_chosen_and_shown(tmp_path: Path):
    """As text 10 comes before 2, so that a head in the order of numbers would be permuted."""
    write_split(tmp_path / "train", **NUMBERED)
    assert folder(root=str(tmp_path)).classes() == ["1", "10", "11", "2", "3"]
    data = folder(root=str(tmp_path), class_order="natural")
    assert data.classes() == ["1", "2", "3", "10", "11"]
    for i in range(5):
        sample = data.sample("train", i, None)
        assert sample["id"].split("/")[0] == data.classes()[sample["label"]]
    assert data.summary()[2:3] == ["classes: 1, 2, 3, 10, 11"] and "class_order" not in "".join(data.summary())
    assert folder(root=str(tmp_path)).summary()[2] == "classes: 1, 10, 11, 2, 3"
    assert folder(root=str(tmp_path)).class_notes()[0] == "classes: 1, 10, 11, 2, 3"
    (warning,) = warnings_of(folder(root=str(tmp_path)))
    assert warning.startswith("class names are sorted as text, so class 1 is 10 and not 2; data.class_order=natural")


@pytest.mark.parametrize(
    ("names", "natural"),
    [
        (["b10", "b9", "a"], ["a", "b9", "b10"]),
        (["01", "1", "2"], ["01", "1", "2"]),
        (["n2", "10", "x"], ["10", "n2", "x"]),
        (["1.10", "1.9"], ["1.9", "1.10"]),
    ],
)
def test_natural_order_compares_numbers_by_value(names: list[str], natural: list[str]):
    assert sort_classes(names, "natural") == natural and sort_classes(names, "string") == sorted(names)
    assert order_notes(natural) == [] and bool(order_notes(sorted(names))) == (sorted(names) != natural)


def test_many_class_names_are_shortened_with_the_last():
    assert names_line([f"c{i}" for i in range(30)]).endswith("c18, c19, ... (the last is c29)")
    assert names_line(["a", "b"]) == "classes: a, b"


def test_exif_turns_images_unless_it_is_to_be_ignored(tmp_path: Path):
    """Turned by 180 degrees: the bright top as stored is at the bottom, in training and in evaluation alike."""
    levels = np.zeros((8, 8), dtype=np.uint8)
    levels[:4] = 255
    tag = Image.Exif()
    tag[0x0112] = 3
    (tmp_path / "train/a").mkdir(parents=True)
    Image.fromarray(levels).save(tmp_path / "train/a/x.png", exif=tag)
    plain = augmentation(crop="none", flip=0.0)
    for exif, bright_top in {"auto": False, "apply": False, "ignore": True}.items():
        data = folder(root=str(tmp_path), exif=exif, augmentation=plain)
        for random in (None, generator(0)):
            (view,) = data.sample("train", 0, random)["views"]
            assert (view[:, :2].float().mean() > 200) == bright_top
    assert folder().exif == "auto" and folder().class_order == "string"


def test_float_images_are_noted_for_each_split(tmp_path: Path):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "train/a/x.tiff")
    write_image(tmp_path / "test/a/x.png")
    data = folder(root=str(tmp_path))
    assert data.sample("train", 0, None)["views"][0].unique().tolist() == [128]
    notes = [line for line in data.summary() if "more than 8 bits" in line]
    assert len(notes) == 1 and notes[0].startswith("train: of 1 sampled images some are grey") and "0 to 1" in notes[0]


def test_without_a_test_folder_val_is_test_and_val_is_split_from_train(imagenet: Path):
    data = folder(root=str(imagenet), val_count=4)
    assert counts(data) == [6, 4, 5]
    assert all(name.startswith("val_") for name in files(data, "test"))
    assert sorted(files(data, "train") + files(data, "val")) == sorted(f.name for f in imagenet.glob("train/*/*"))
    assert counts(folder(root=str(imagenet))) == [10, 0, 5]


def test_with_a_test_folder_each_folder_is_its_split(imagenet: Path):
    write_split(imagenet / "test", bee=1)
    data = folder(root=str(imagenet), val_count=4)
    assert counts(data) == [10, 5, 1]
    assert files(data, "val")[0] == "val_ant_0.png" and files(data, "test") == ["test_bee_0.png"]


def test_with_train_and_test_alone_val_is_split_from_train(imagenet: Path):
    (imagenet / "val").rename(imagenet / "test")
    assert counts(folder(root=str(imagenet), val_count=3)) == [7, 3, 5]
    assert counts(folder(root=str(imagenet))) == [10, 0, 5]


def test_train_alone_has_no_test(imagenet: Path):
    data = folder(train=str(imagenet / "train"), val_count=2)
    assert counts(data) == [8, 2, 0]
    assert not any(line.startswith("test") for line in data.summary())


def test_the_path_of_a_split_takes_precedence_over_root(imagenet: Path):
    elsewhere = str(write_split(imagenet / "elsewhere", ant=1, bee=2, cat=1))
    data = folder(root=str(imagenet), val=elsewhere, val_count=4)
    assert counts(data) == [10, 4, 5] and files(data, "val")[0] == "elsewhere_ant_0.png"
    data = folder(root=str(imagenet), test=elsewhere, val_count=4)
    assert counts(data) == [10, 5, 4] and files(data, "test")[0] == "elsewhere_ant_0.png"
    assert counts(folder(root=str(imagenet), train=elsewhere, val_count=1)) == [3, 1, 5]


def test_no_folder_is_both_val_and_test(imagenet: Path):
    val = imagenet / "val"
    assert counts(folder(root=str(imagenet), val=f"{val}/", val_count=4)) == [10, 5, 0]
    assert counts(folder(root=str(imagenet), test=str(val), val_count=4)) == [6, 4, 5]


def test_the_split_depends_only_on_the_names_of_the_images(imagenet: Path, monkeypatch: pytest.MonkeyPatch):
    expected = files(folder(root=str(imagenet), val_count=4), "val")
    assert {name.split("_")[1] for name in expected} != {"ant"}  # not the first images
    scan = os.scandir

    class Backwards:
        def __init__(self, path: Any):
            self.path = path

        def __enter__(self) -> list[Any]:
            with scan(self.path) as entries:
                return sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __exit__(self, *error: Any) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    data = folder(root=str(imagenet), val_count=4, batch_size=9, augmentation=augmentation(repeats=3))
    assert files(data, "val") == expected
    assert not {*files(data, "train")} & {*expected}


def test_classes_are_the_folders_of_train_by_name(imagenet: Path):
    data = folder(root=str(imagenet))
    assert data.classes() == ["ant", "bee", "cat"]
    assert [data.sample("train", i, None)["label"] for i in range(10)] == [0] * 4 + [1] * 3 + [2] * 3
    assert [data.sample("test", i, None)["label"] for i in range(5)] == [0, 0, 2, 2, 2]  # test has no bee
    assert [data.sample("test", i, None)["id"].split("/")[0] for i in range(5)] == ["ant", "ant", "cat", "cat", "cat"]


def test_without_train_the_classes_are_those_of_the_other_splits(imagenet: Path):
    (imagenet / "train").rename(imagenet / "gone")
    data = folder(root=str(imagenet))
    assert data.classes() == ["ant", "cat"] and data.count("test") == 5
    assert [data.sample("test", i, None)["label"] for i in range(5)] == [0, 0, 1, 1, 1]
    with pytest.raises(UserError, match=r"There is no folder train in data.root=.*expected train/<class>/<image>"):
        data.count("train")


def test_the_same_images_are_listed_as_by_torchvision(tmp_path: Path):
    """Files in nested folders, with upper-case endings and behind links are listed; hidden and other files are not."""
    root = write_split(tmp_path / "train", b=2, a=1)
    write_image(root / "a/2019/deep/er.JPG")
    write_image(root / "a/not me.png")
    (root / "a/notes.txt").touch()
    (root / "b/linked").symlink_to(root / "a/2019")
    expected = sorted((Path(file), label) for file, label in Torchvision(str(root)).samples)
    write_image(root / ".cache/x.png")
    write_image(root / "a/.hidden/x.png")
    write_image(root / "a/.x.png")
    (root / "classes.txt").touch()
    data = folder(train=str(root))
    samples = [data.sample("train", i, None) for i in range(data.count("train"))]
    assert sorted((Path(sample["file"]), sample["label"]) for sample in samples) == expected and len(samples) == 6
    lines = ["classes: a, b", f"train: 6 images of {root}, 1 other files ignored", "train: by class: a 3, b 3"]
    assert data.summary() == ["2 classes", *lines]


def test_names_may_contain_any_character(tmp_path: Path):
    root = tmp_path / "a b=c,[d]~"
    for name in ("Bär", "b [1], =x", "熊"):
        write_image(root / name / f"{name} ü.png")
    data = folder(train=str(root))
    assert data.classes() == sorted(["Bär", "b [1], =x", "熊"])
    assert [Path(name).stem for name in files(data, "train")] == [f"{name} ü" for name in data.classes()]


def test_the_constructor_opens_no_file():
    data = folder(root="nowhere")
    with pytest.raises(UserError, match=r"data.root=nowhere does not exist"):
        data.count("test")


# Samples: views of one image, and of a partner.


def test_every_view_of_an_image_is_a_row_of_the_batch(imagenet: Path):
    data = folder(root=str(imagenet), augmentation=augmentation(repeats=3))
    assert [*data.cost("train")] == [3] * 10 and [*data.cost("test")] == [1] * 5
    batch = training_batch(data, 8, 1)
    assert batch["images"].shape == (6, 3, 8, 8) and batch["images"].dtype == torch.uint8
    assert batch["ids"] == ["cat/train_cat_1.png"] * 3 + ["ant/train_ant_1.png"] * 3
    assert batch["labels"].tolist() == [2, 2, 2, 0, 0, 0]
    assert [Path(file).name for file in batch["files"]] == ["train_cat_1.png"] * 3 + ["train_ant_1.png"] * 3
    assert len(batch["uniforms"]) == 6
    assert len({image.numpy().tobytes() for image in batch["images"]}) == 6
    assert "shares" not in batch and data.inputs(batch, CPU).shape == (6, 3, 8, 8)


def test_a_sample_does_not_depend_on_the_rest_of_the_batch(imagenet: Path):
    data = folder(root=str(imagenet), augmentation=augmentation(repeats=2, mixup=0.8, cutmix=1.0, erase=0.5))
    whole, parts = training_batch(data, 3, 7, 0), [training_batch(data, 0), training_batch(data, 3, 7)][::-1]
    for key in ("labels", "other_labels", "shares"):
        assert torch.equal(whole[key], torch.cat([part[key] for part in parts]))
    inputs = data.inputs(whole, CPU)
    assert inputs.shape == (6, 3, 8, 8)
    assert torch.equal(inputs, torch.cat([data.inputs(part, CPU) for part in parts]))
    assert not torch.equal(data.inputs(training_batch(data, 3, 7, 0, epoch=1), CPU), inputs)


def test_partners_are_the_second_half_with_their_own_views(imagenet: Path):
    data = folder(root=str(imagenet), augmentation=augmentation(repeats=2, mixup=1.0))
    plain = folder(root=str(imagenet), augmentation=augmentation(repeats=2))
    batch = training_batch(data, 5, 2)
    assert batch["images"].shape == (8, 3, 8, 8) and batch["uniforms"].shape[0] == 8
    # Partners do not change the own views.
    assert torch.equal(batch["images"][:4], training_batch(plain, 5, 2)["images"])
    assert len({image.numpy().tobytes() for image in batch["images"][4:]}) == 4
    assert batch["labels"].tolist() == [1, 1, 0, 0] and batch["other_labels"].shape == (4,)
    assert batch["ids"] == ["bee/train_bee_1.png"] * 2 + ["ant/train_ant_2.png"] * 2 and len(batch["files"]) == 4
    assert batch["shares"].shape == (4,) and batch["shares"].dtype == torch.float32
    assert data.thumbnails(batch, 100).shape == (4, 3, 8, 8)


def test_a_mixed_image_consists_of_itself_and_its_partner_by_its_share(tmp_path: Path):
    """Dark images are one class and bright images another, so that a mean brightness shows how images are mixed."""
    for name, level in (("bright", 255), ("dark", 0)):
        for i in range(5):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (9, 9), (level,) * 3).save(tmp_path / name / f"{i}.png")
    for mixing in ({"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}):
        data = folder(
            train=str(tmp_path), mean=(0.0,) * 3, std=(1.0,) * 3, augmentation=augmentation(repeats=2, **mixing)
        )
        batch = training_batch(data, *range(10))
        own, partner, share = 1 - batch["labels"], 1 - batch["other_labels"], batch["shares"]
        assert (own != partner).any() and (own == partner).any() and share.min() >= 0 and share.max() <= 1
        brightness = data.inputs(batch, CPU).mean(dim=(1, 2, 3))
        torch.testing.assert_close(brightness, own * share + partner * (1 - share), atol=1e-5, rtol=0)


def test_all_images_of_train_and_no_others_are_partners(imagenet: Path):
    only_mixing = augmentation(crop="none", flip=0.0, mixup=1.0)
    data = folder(root=str(imagenet), val_count=3, augmentation=only_mixing)
    train = {tuple(data.sample("train", i, None)["views"][0].flatten().tolist()): i for i in range(7)}
    for index in (0, 6):
        samples = [data.sample("train", index, generator(i)) for i in range(60)]
        indices = [train[tuple(sample["other_views"][0].flatten().tolist())] for sample in samples]
        assert {*indices} == {*range(7)}
        labels = [data.sample("train", i, None)["label"] for i in indices]
        assert [sample["other_label"] for sample in samples] == labels


# Evaluation views.


def as_torchvision(file: Path, size: int, height_width: tuple[int, int], interpolation: str) -> Tensor:
    """Resize and centre crop by torchvision's transforms, after decoding by PIL."""
    with Image.open(file) as image:
        pixels = v2.functional.pil_to_tensor(image.convert("RGB"))
    steps = [v2.Resize(size, InterpolationMode(interpolation), antialias=True), v2.CenterCrop(list(height_width))]
    return v2.Compose(steps)(pixels)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(64, 48), (48, 64), (40, 40), (21, 90), (97, 61)])
def test_evaluation_views_are_torchvisions(size: tuple[int, int], interpolation: str, tmp_path: Path):
    file = write_image(tmp_path / "train/a/x.png", size)
    data = folder(root=str(tmp_path), image_size=(28, 28), crop_ratio=0.875, interpolation=interpolation)
    expected = as_torchvision(file, 32, (28, 28), interpolation)
    assert torch.equal(data.sample("train", 0, None)["views"][0], expected)
    viewed = data.view(read_image(file), file)
    assert torch.equal(viewed["views"][0], expected) and viewed["label"] == -1


def test_one_number_is_the_side_of_a_square():
    assert folder(image_size=24).image_size == (24, 24)


def test_an_image_that_is_not_square_is_covered_in_both_directions(tmp_path: Path):
    """60 x 60 for 14 x 28 at 0.875: resized to cover 16 x 32, so to 32 x 32, and cropped to its centre."""
    file = write_image(tmp_path / "train/a/x.png", (60, 60))
    data = folder(root=str(tmp_path), image_size=(14, 28), crop_ratio=0.875)
    expected = as_torchvision(file, 32, (14, 28), "bilinear")
    assert torch.equal(data.sample("train", 0, None)["views"][0], expected)
    assert data.sample("train", 0, generator(0))["views"][0].shape == (3, 14, 28)


def test_an_evaluation_batch_is_only_normalised(imagenet: Path):
    data = folder(root=str(imagenet), augmentation=augmentation(repeats=3, mixup=1.0, erase=1.0))
    batch = data.collate([data.sample("test", i, None) for i in (4, 0)])
    assert {*batch} == {"ids", "files", "images", "labels"} and batch["labels"].tolist() == [2, 0]
    expected = v2.functional.normalize(batch["images"] / 255, list(data.mean), list(data.std))
    torch.testing.assert_close(data.inputs(batch, CPU), expected, atol=1e-5, rtol=0)
    assert torch.equal(data.thumbnails(batch, 1), batch["images"][:1])


def test_a_users_images_make_a_batch_without_labels(tmp_path: Path):
    paths = [write_image(tmp_path / "a.png", (30, 20)), write_image(tmp_path / "b.png", (9, 9))]
    data = folder(root="nowhere")
    batch = data.collate([data.view(read_image(path), path) for path in paths])
    assert batch["images"].shape == (2, 3, 8, 8) and batch["labels"].tolist() == [-1, -1]
    assert batch["labels"].dtype == torch.int64 and batch["files"] == [str(path) for path in paths]


@pytest.mark.parametrize("mode", ["L", "CMYK", "1"])
def test_images_of_other_modes_have_three_channels(mode: str, tmp_path: Path):
    write_image(tmp_path / "train/a/x.tif", (20, 20), mode)
    data = folder(root=str(tmp_path), image_size=(20, 20))
    (image,) = data.sample("train", 0, None)["views"]
    assert image.shape == (3, 20, 20)
    with Image.open(tmp_path / "train/a/x.tif") as stored:
        assert stored.mode == mode
        assert torch.equal(image, v2.functional.pil_to_tensor(stored.convert("RGB")))


@pytest.mark.parametrize("crop", ["none", "padded"])
def test_images_in_memory_give_the_same_views_and_are_decoded_once(imagenet: Path, crop: Any):
    """The images are larger than the views; evaluation crops them in another way than training."""
    options = augmentation(crop=crop, padding=2, repeats=2, mixup=1.0, policy="rand")
    keys: dict[str, Any] = {"root": str(imagenet), "crop_ratio": 0.8, "augmentation": options}
    plain, cached = folder(**keys), folder(**keys, cache=True)

    def views(data: ImageFolder, epoch: int) -> list[Tensor]:
        samples = [data.sample("train", i, random) for i in range(10) for random in (None, generator(epoch, i))]
        samples += [data.sample("test", i, None) for i in range(5)]
        return [view for sample in samples for key in ("views", "other_views") for view in sample.get(key, ())]

    expected = [views(plain, 0), views(plain, 1)]
    assert all(map(torch.equal, views(cached, 0), expected[0])) and len(expected[0]) == 55
    for _ in range(9):
        views(cached, 2)  # until each image was a partner
    for file in imagenet.glob("*/*/*.png"):
        file.unlink()
    assert all(map(torch.equal, views(cached, 1), expected[1]))
    assert not all(map(torch.equal, expected[0], expected[1]))
    with pytest.raises(UserError, match="is missing"):
        views(plain, 0)


def test_images_in_memory_cannot_be_cropped_from_the_whole_image():
    with pytest.raises(UserError, match=r"data.cache=true keeps images at data.image_size, but .*crop=resized crops"):
        folder(cache=True)


def test_workers_give_the_same_images(imagenet: Path):
    data = folder(root=str(imagenet), augmentation=augmentation(repeats=2, mixup=1.0))
    order = batching.Order(data.cost("train"), data.batch_size, seed=0)
    span = {"start": 0, "stop": 2, "micro_batch": 2, "rank": 0, "world": 1, "pin": False}
    (_, in_process), (_, in_worker) = (next(batching.steps(data, order, workers=workers, **span)) for workers in (0, 1))
    assert [len(part["labels"]) for part in in_process] == [2, 2]
    for part, worker_part in zip(in_process, in_worker, strict=True):
        assert torch.equal(data.inputs(part, CPU), data.inputs(worker_part, CPU))


# Mistakes.


def error_message(data: ImageFolder, split: Any) -> str:
    """The one-sentence message of the error that counting a split raises."""
    with pytest.raises(UserError) as caught:
        data.count(split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_class_that_train_lacks_is_named(imagenet: Path):
    write_split(imagenet / "val", zebra=1)
    data = folder(root=str(imagenet))
    assert data.count("train") == 10
    message = error_message(data, "test")
    assert f"{imagenet / 'val' / 'zebra'} is no class" in message and str(imagenet / "train") in message


def test_a_folder_without_classes_is_refused_with_the_expected_layout(tmp_path: Path):
    (tmp_path / "train").mkdir()
    assert f"{tmp_path / 'train'} holds no class; expected" in error_message(folder(root=str(tmp_path)), "train")


def test_images_without_a_class_are_refused_with_the_expected_layout(imagenet: Path):
    for name in ("b.png", "a.jpg"):
        write_image(imagenet / "val" / name)
    message = error_message(folder(root=str(imagenet)), "test")
    assert "2 images lie directly in" in message and "the first is a.jpg" in message and "/<class>/<image>" in message


def test_a_class_without_images_is_named_in_train_and_allowed_elsewhere(imagenet: Path):
    (imagenet / "val/bee").mkdir()
    assert folder(root=str(imagenet)).count("test") == 5
    (imagenet / "train/dog/deeper").mkdir(parents=True)
    (imagenet / "train/dog/image.raw").touch()
    message = error_message(folder(root=str(imagenet)), "train")
    assert f"{imagenet / 'train' / 'dog'} holds no image (.avif" in message


def test_a_split_without_images_is_refused(imagenet: Path):
    (imagenet / "test/ant").mkdir(parents=True)
    assert f"class folders of {imagenet / 'test'} hold no image" in error_message(folder(root=str(imagenet)), "test")


def test_missing_folders_are_named(imagenet: Path):
    assert "There are no train images: give data.root" in error_message(folder(), "train")
    assert "gone does not exist" in error_message(folder(test="gone"), "test")
    assert "gone does not exist" in error_message(folder(train="gone"), "train")
    assert "gone does not exist" in error_message(folder(root=str(imagenet), val="gone"), "val")
    assert "gone does not exist" in error_message(folder(train="gone", val_count=1), "val")


def test_a_val_of_all_images_is_refused(imagenet: Path):
    assert folder(root=str(imagenet), val_count=9).count("train") == 1
    message = error_message(folder(root=str(imagenet), val_count=10), "train")
    assert "data.val_count=10 leaves nothing of the 10 images" in message


def test_an_unreadable_image_is_named(imagenet: Path):
    broken = imagenet / "train/ant/train_ant_0.png"
    broken.write_bytes(broken.read_bytes()[:-60])
    (imagenet / "train/bee/lost.jpg").symlink_to("nowhere")
    data = folder(root=str(imagenet), augmentation=augmentation())
    with pytest.raises(UserError, match=r"train_ant_0.png is broken"):
        data.sample("train", 0, generator(0))
    with pytest.raises(UserError, match=r"lost.jpg is missing"):
        data.sample("train", 4, None)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_one_sentence_from_a_worker_also(workers: int, imagenet: Path):
    (imagenet / "val/ant/val_ant_0.png").write_bytes(b"no image")
    data = folder(root=str(imagenet), val_count=3)
    with pytest.raises(UserError, match=r"val_ant_0.png is broken or no image") as caught:
        [*batching.evaluation(data, "test", batch_size=2, rank=0, world=1, workers=workers)]
    assert "\n" not in str(caught.value)


def test_the_location_of_a_sample_is_its_file(imagenet: Path):
    data = folder(root=str(imagenet), val_count=3)
    for split in ("train", "val", "test"):
        for index in range(data.count(split)):
            assert data.where(split, index) == data.sample(split, index, None)["file"]


def test_a_folder_that_cannot_be_read_is_named(imagenet: Path, monkeypatch: pytest.MonkeyPatch):
    scan: Callable[[Any], Any] = os.scandir

    def denied(path: Any) -> Any:
        if os.fsencode(path).endswith(b"bee"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert "bee cannot be read (Permission denied)" in error_message(folder(root=str(imagenet)), "train")


def test_a_crop_larger_than_the_image_is_refused():
    with pytest.raises(UserError, match=r"data.crop_ratio=1.1: expected at most 1"):
        folder(crop_ratio=1.1)
