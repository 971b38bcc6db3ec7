"""Fashion-MNIST as published, CIFAR-10 from batches written here, and missing or damaged files."""

import gzip
import hashlib
import pickle
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets

from common.config import check as config
from common.config import compose
from common.errors import UserError
from vit.data.downloads import PUBLISHED_SETS, Downloaded
from vit.data.in_memory import InMemory

FILES = [f"{part}-ubyte" for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every download fail."""

    def fail(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", fail)


def built(name: str, root: Path, *overrides: str) -> InMemory:
    """The data set of a config."""
    section = compose.configure("train", ["model=vit", f"data={name}", f"data.root={root}", *overrides])["data"]
    data: InMemory = config.build(section)
    return data


def error_message(data: InMemory) -> str:
    """The one-sentence message of the error that counting raises."""
    with pytest.raises(UserError) as caught:
        data.count("train")
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".") and sentence.startswith(f"data.root={data.root}: ")
    return sentence


# Fashion-MNIST.


@pytest.fixture(scope="module")
def unpacked(real_data: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the published files, also unpacked by torchvision."""
    root = tmp_path_factory.mktemp("fashion")
    shutil.copytree(real_data("fashion_mnist") / "FashionMNIST/raw", root / "FashionMNIST/raw")
    for file in (root / "FashionMNIST/raw").iterdir():
        file.chmod(0o644)
    built("fashion_mnist", root).count("train")
    return root


def published(root: Path, name: str) -> np.ndarray:
    """A published file, read by the format's specification: a header of 4 bytes and 4 for each axis, big-endian."""
    content = gzip.decompress((root / "FashionMNIST/raw" / f"{name}-ubyte.gz").read_bytes())
    shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def test_the_published_test_images_are_the_test_split_in_their_order(unpacked: Path) -> None:
    data = built("fashion_mnist", unpacked)
    assert isinstance(data, Downloaded)
    images, labels = data.load()["test"]
    assert images.shape == (10_000, 1, 28, 28) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert np.array_equal(images[:, 0].numpy(), published(unpacked, "t10k-images-idx3"))
    assert np.array_equal(labels.numpy(), published(unpacked, "t10k-labels-idx1"))
    assert data.classes()[0] == "T-shirt/top" and data.classes()[9] == "Ankle boot" and len(data.classes()) == 10


def hashes(images: Any, labels: Any) -> list[bytes]:
    rows = zip(np.ascontiguousarray(images).reshape(len(labels), -1), labels, strict=True)
    return sorted(hashlib.blake2b(row.tobytes() + bytes([int(label)]), digest_size=8).digest() for row, label in rows)


def test_val_is_split_from_the_published_train_and_nothing_is_lost(unpacked: Path) -> None:
    data = built("fashion_mnist", unpacked)
    assert [data.count(split) for split in ("train", "val", "test")] == [55_000, 5_000, 10_000]
    parts = [data.load()[split] for split in ("train", "val")]
    images, labels = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    expected = (published(unpacked, "train-images-idx3"), published(unpacked, "train-labels-idx1"))
    assert hashes(images, labels) == hashes(*expected)
    assert parts[1][1].bincount(minlength=10).min() > 400, (
        "500 of each class are expected, with a standard deviation of 21"
    )


def test_the_configs_mean_and_deviation_are_those_of_train(unpacked: Path) -> None:
    data = built("fashion_mnist", unpacked, "data.val_count=0")
    assert data.count("val") == 0
    pixels = data.load()["train"][0].float() / 255
    assert data.mean == [pytest.approx(pixels.mean().item(), abs=1e-3)]
    assert data.std == [pytest.approx(pixels.std().item(), abs=1e-3)]


def test_published_files_are_unpacked_without_a_network(unpacked: Path, tmp_path: Path) -> None:
    """Only the test images are packed here; for speed the other files are already unpacked."""
    (tmp_path / "FashionMNIST/raw").mkdir(parents=True)
    for name in FILES:
        for file in (f"{name}.gz", *([] if name.startswith("t10k-images") else [name])):
            (tmp_path / "FashionMNIST/raw" / file).symlink_to(unpacked / "FashionMNIST/raw" / file)
    data = built("fashion_mnist", tmp_path)
    assert data.count("test") == 10_000
    assert (tmp_path / "FashionMNIST/raw/t10k-images-idx3-ubyte").is_file()


@pytest.mark.parametrize(
    ("file", "name", "other"),
    [
        ("FashionMNIST/raw/t10k-images-idx3-ubyte", "fashion_mnist", "cifar10"),
        ("FashionMNIST/raw/t10k-images-idx3-ubyte.gz", "fashion_mnist", "cifar10"),
        ("cifar-10-python.tar.gz", "cifar10", "fashion_mnist"),
        ("cifar-10-batches-py", "cifar10", "fashion_mnist"),
    ],
)
def test_a_root_with_one_set_does_not_hold_the_other(file: str, name: str, other: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    data, other_data = built(name, tmp_path), built(other, tmp_path)
    assert isinstance(data, Downloaded) and isinstance(other_data, Downloaded)
    assert data.root_has_files() and not other_data.root_has_files()


def test_without_files_and_network_the_message_names_the_files_and_their_folder(tmp_path: Path) -> None:
    sentence = error_message(built("fashion_mnist", tmp_path / "a b=c"))
    assert "no route to host" in sentence
    assert sentence.endswith("put FashionMNIST/raw/*-ubyte.gz there, and remove damaged files.")


def test_a_damaged_download_is_refused(unpacked: Path, tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for name in FILES:
        shutil.copy(unpacked / "FashionMNIST/raw" / f"{name}.gz", raw)
    damaged = raw / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert "not as published" in error_message(built("fashion_mnist", tmp_path))


@pytest.mark.parametrize("name", ["train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("length", [0, 6, 5000])
def test_a_partly_unpacked_file_is_refused(unpacked: Path, tmp_path: Path, name: str, length: int) -> None:
    """torchvision checks whether the files exist, not whether they are complete."""
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for file in FILES:
        (raw / file).symlink_to(unpacked / "FashionMNIST/raw" / file)
    (raw / name).unlink()
    (raw / name).write_bytes((unpacked / "FashionMNIST/raw" / name).read_bytes()[:length])
    assert "not as published" in error_message(built("fashion_mnist", tmp_path))


def test_a_val_of_all_images_is_refused(unpacked: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.val_count would leave nothing to train on: the set has 60000 images"):
        built("fashion_mnist", unpacked, "data.val_count=60000").count("train")


# CIFAR-10: small batches are written in its format, and their checksums are not compared.


@pytest.fixture
def batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Write files of ten images each in the published layout: rows of red, green and blue planes."""
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda path, md5=None: Path(path).is_file())
    folder, rng = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir()
    content = {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pixels = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
        content[name] = {"data": pixels, "labels": rng.permutation(10).tolist()}
        (folder / name).write_bytes(pickle.dumps(content[name]))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(PUBLISHED_SETS["cifar10"].names)}))
    return content


def test_cifars_planes_become_channels_and_its_test_batch_is_the_test_split(
    batches: dict[str, Any], tmp_path: Path
) -> None:
    data = built("cifar10", tmp_path, "data.val_count=8")
    assert [data.count(split) for split in ("train", "val", "test")] == [42, 8, 10]
    images, labels = data.load()["test"]
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64 and images.is_contiguous()
    assert labels.tolist() == batches["test_batch"]["labels"]
    for image, row in zip(images, batches["test_batch"]["data"], strict=True):
        for channel, plane in enumerate(np.split(row, 3)):
            assert np.array_equal(image[channel].numpy(), plane.reshape(32, 32))
    batch = data.collate([data.sample("test", i, None) for i in range(3)])
    assert data.inputs(batch, torch.device("cpu")).shape == (3, 3, 32, 32)


def test_cifars_val_is_split_from_its_train(batches: dict[str, Any], tmp_path: Path) -> None:
    data = built("cifar10", tmp_path, "data.val_count=8")
    parts = [data.load()[split] for split in ("train", "val")]
    images, labels = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    names = [f"data_batch_{i}" for i in range(1, 6)]
    rows = np.concatenate([batches[name]["data"] for name in names])
    assert hashes(images, labels) == hashes(rows, [label for name in names for label in batches[name]["labels"]])


def test_cifars_class_names_are_the_published_ones(batches: dict[str, Any], tmp_path: Path) -> None:
    built("cifar10", tmp_path, "data.val_count=8").count("train")
    assert datasets.CIFAR10(tmp_path).classes == list(
        PUBLISHED_SETS["cifar10"].names
    )  # the names here are known before the files are read
    words = "airplane automobile bird cat deer dog frog horse ship truck"
    assert built("cifar10", tmp_path / "nowhere").classes() == words.split()


def test_cifar_without_files_and_network_names_the_file(tmp_path: Path) -> None:
    sentence = error_message(built("cifar10", tmp_path))
    assert "no route to host" in sentence and "put cifar-10-python.tar.gz there" in sentence


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "cifar-10-batches-py/test_batch"])
def test_other_files_with_cifars_names_are_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(pickle.dumps({"data": [], "labels": []}))
    assert "not as published" in error_message(built("cifar10", tmp_path))
