"""Checkpoint files: what they can hold, and every kind of damage."""

import argparse
import io
import os
import pickle
import random
import resource
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from common.errors import UserError
from common.files import checkpoint

CONTENT = {
    "weights": {"a": torch.arange(12.0).reshape(3, 4), "b": torch.tensor([1, 2])},
    "options": {"lr": 1e-3, "name": "x", "on": True, "none": None, "list": [1, (2, "ü")], 7: "int key"},
    "random": random.Random(0).getstate(),
    "kind": [torch.bfloat16, torch.device("cuda", 1)],
}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def same(a, b) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def intact_bytes(folder: Path) -> bytes:
    checkpoint.save(folder / "intact.pt", CONTENT)
    return (folder / "intact.pt").read_bytes()


def test_a_saved_file_is_loaded_unchanged_and_recognised_as_ours(tmp_path):
    checkpoint.save(tmp_path / "a.pt", CONTENT)
    content = checkpoint.load(tmp_path / "a.pt")
    assert checkpoint.is_ours(content)
    assert same({**CONTENT, "format": "triptych-1"}, content)
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.float64(0.5), "numpy.float64"),
        (np.zeros(2), "numpy.ndarray"),
        (Path("x"), "pathlib.PosixPath"),
        (argparse.Namespace(a=1), "argparse.Namespace"),
        ({1, 2}, "builtins.set"),
    ],
)
def test_a_value_that_could_not_be_loaded_is_not_saved_and_is_named(value, kind, tmp_path):
    checkpoint.save(tmp_path / "a.pt", {"old": 1})
    with pytest.raises(TypeError, match=rf"content\['metrics'\]\[1\]\['AP'\] is a {kind}"):
        checkpoint.save(tmp_path / "a.pt", {"metrics": [0, {"AP": value}]})
    assert checkpoint.load(tmp_path / "a.pt")["old"] == 1


def test_two_saves_of_the_same_content_are_the_same_bytes(tmp_path):
    checkpoint.save(tmp_path / "a.pt", CONTENT)
    first = (tmp_path / "a.pt").read_bytes()
    checkpoint.save(tmp_path / "a.pt", CONTENT)
    assert (tmp_path / "a.pt").read_bytes() == first


def test_a_full_disk_leaves_the_old_file_and_the_next_save_works(tmp_path):
    checkpoint.save(tmp_path / "a.pt", {"old": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(OSError):
            checkpoint.save(tmp_path / "a.pt", {"new": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["a.pt"] and checkpoint.load(tmp_path / "a.pt")["old"] == 1
    checkpoint.save(tmp_path / "a.pt", {"new": 2})
    assert checkpoint.load(tmp_path / "a.pt")["new"] == 2


def test_the_new_file_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    checkpoint.save(tmp_path / "a.pt", CONTENT)
    assert calls == ["fsync", "replace", "fsync"]  # file, name, folder


DAMAGE = {
    "empty": (lambda data: b"", "is empty"),
    "text": (lambda data: b"hello, this is some text\n" * 9, "is no PyTorch checkpoint"),
    "page": (lambda data: b"<!DOCTYPE html><html>404</html>", "is no PyTorch checkpoint"),
    "pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "git lfs pull"),
    "half": (lambda data: data[: len(data) // 2], "is damaged"),
    "last byte missing": (lambda data: data[:-1], "is damaged"),
    "zeroed": (lambda data: bytes(len(data)), "is no PyTorch checkpoint"),
    "zeroed start": (lambda data: bytes(512) + data[512:], "is no PyTorch checkpoint"),
    "zeroed middle": (lambda data: data[:700] + bytes(300) + data[1000:], "is damaged"),
    "list": (lambda data: pickle.dumps([1, 2]), "is no PyTorch checkpoint"),
    "four bytes": (lambda data: data[:4], "is damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_sentence_with_file_reason_and_remedy(name, tmp_path):
    damage, reason = DAMAGE[name]
    path = write(tmp_path / "my file.pt", damage(intact_bytes(tmp_path)))
    with warnings.catch_warnings(), pytest.raises(UserError) as caught:
        warnings.simplefilter("error")
        checkpoint.load(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and reason in text and text.endswith(".") and "\n" not in text
    assert any(remedy in text for remedy in ("copy or download it again", "git lfs pull", "give another file"))


def test_no_flipped_byte_changes_what_is_loaded(tmp_path):
    """A file with a flipped byte is either refused, or the byte lies in padding or dates and changes nothing."""
    intact = intact_bytes(tmp_path)
    expected = checkpoint.load(tmp_path / "intact.pt")
    refused = 0
    for position in range(0, len(intact), 13):
        flipped = bytearray(intact)
        flipped[position] ^= 0x55
        path = write(tmp_path / "flipped.pt", bytes(flipped))
        try:
            assert same(checkpoint.load(path), expected)
        except UserError:
            refused += 1
    assert refused > 0.5 * len(intact) / 13
    start = intact.index(CONTENT["weights"]["a"].numpy().tobytes())
    flipped = bytearray(intact)
    flipped[start + 5] ^= 1
    with pytest.raises(UserError, match="checksum"):
        checkpoint.load(write(tmp_path / "flipped.pt", bytes(flipped)))


def test_a_missing_file_a_folder_and_another_zip_are_named_in_errors(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.pt does not exist"):
        checkpoint.load(tmp_path / "nothing.pt")
    with pytest.raises(UserError, match="is a folder"):
        checkpoint.load(tmp_path)
    with pytest.raises(UserError, match="/dev/zero is no regular file"):
        checkpoint.load("/dev/zero")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("page.xml", "text")
    with pytest.raises(UserError, match="is a zip file but no PyTorch checkpoint"):
        checkpoint.load(tmp_path / "a.zip")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds a list"):
        checkpoint.load(tmp_path / "list.pt")


def test_a_file_of_a_newer_version_is_not_mistaken_for_another_programs(tmp_path):
    torch.save({"format": "triptych-2"}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="triptych-2"):
        checkpoint.load(tmp_path / "a.pt")


class Malicious:
    """Creates a folder when it is unpickled by pickle itself."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("kind", ["zip", "old", "pickle"])
def test_a_malicious_pickle_is_refused_and_nothing_is_executed(kind, tmp_path):
    content = {"model": {"a": torch.zeros(2)}, "args": Malicious(tmp_path / "executed")}
    if kind == "pickle":
        write(tmp_path / "a.pt", pickle.dumps(content["args"]))
    else:
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UserError, match=r"a\.pt (holds posix.mkdir.*nothing was executed|is no PyTorch checkpoint)"):
        checkpoint.load(tmp_path / "a.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_other_programs_files_with_a_namespace_load_in_both_serialisations(zipped, tmp_path):
    content = {"model": CONTENT["weights"], "args": argparse.Namespace(lr=1e-4, masks=False)}
    torch.save(content, tmp_path / "detr.pth", _use_new_zipfile_serialization=zipped)
    loaded = checkpoint.load(str(tmp_path / "detr.pth"))
    assert same(loaded["model"], content["model"]) and loaded["args"] == content["args"]
    assert not checkpoint.is_ours(loaded)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # allowed only during that load


def test_a_truncated_file_in_the_old_serialisation_is_refused(tmp_path):
    torch.save({"model": CONTENT["weights"]}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "old.pth").read_bytes()
    for length in (10, len(data) // 2, len(data) - 5):
        with pytest.raises(UserError, match="damaged"):
            checkpoint.load(write(tmp_path / "truncated.pth", data[:length]))


ARRAYS = {
    "block/kernel": np.arange(12, dtype=np.float32).reshape(3, 4),
    "columns first": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "high byte first": np.array([1.5, -2.0], dtype=">f4"),
    "half": np.array([[0.5]], dtype=np.float16),
    "count": np.array(7, dtype=np.int64),
}


def test_an_npz_is_loaded_as_a_flat_dict_of_tensors(tmp_path):
    np.savez(tmp_path / "a.npz", **ARRAYS)
    with open(tmp_path / "by content.pt", "wb") as file:
        np.savez_compressed(file, **ARRAYS)
    for name in ("a.npz", "by content.pt"):
        content = checkpoint.load(tmp_path / name)
        assert list(content) == list(ARRAYS) and not checkpoint.is_ours(content)
        for key, array in ARRAYS.items():
            assert content[key].shape == array.shape and content[key].tolist() == array.tolist()
        assert [str(value.dtype) for value in content.values()] == [
            f"torch.{kind}" for kind in ("float32", "float64", "float32", "float16", "int64")
        ]


def test_two_opaque_bytes_are_bfloat16(tmp_path):
    """By hand: bfloat16 is the upper half of a float32."""
    values = np.array([[1.0, -2.5, 3e38], [0.0, 0.15625, -1e-30]], dtype=np.float32)
    halves = (values.view(np.uint32) >> 16).astype(np.uint16)
    np.savez(tmp_path / "a.npz", bf16=halves.view("V2"), scalar=halves[0, 1].view("V2"))
    content = checkpoint.load(tmp_path / "a.npz")
    assert content["bf16"].dtype == content["scalar"].dtype == torch.bfloat16 and content["scalar"].shape == ()
    expected = (halves.astype(np.uint32) << 16).view(np.float32)
    assert content["bf16"].float().tolist() == expected.tolist() and content["scalar"] == -2.5


@pytest.mark.parametrize("first", [True, False])
def test_an_npz_with_pickles_is_refused_and_nothing_is_executed(first, tmp_path):
    objects = {"objects": np.array([Malicious(tmp_path / "executed")], dtype=object)}
    np.savez(tmp_path / "a.npz", **({**objects, **ARRAYS} if first else {**ARRAYS, **objects}))
    with pytest.raises(
        UserError, match=r"a\.npz holds pickled objects \(objects\), .*nothing was executed, give a file"
    ):
        checkpoint.load(tmp_path / "a.npz")
    assert not (tmp_path / "executed").exists()
    np.load(tmp_path / "a.npz", allow_pickle=True)["objects"]
    assert (tmp_path / "executed").exists(), "pickle itself executes it"


def test_an_npz_with_an_array_of_strings_is_refused_by_its_name(tmp_path):
    np.savez(tmp_path / "a.npz", weights=np.zeros(2), words=np.array(["a", "b"]))
    with pytest.raises(UserError, match=r"a\.npz holds words, which is no array of numbers .*; give a file of plain"):
        checkpoint.load(tmp_path / "a.npz")


def with_shape(shape: tuple[int, ...], data: bytes) -> bytes:
    """An .npy file whose header states this shape of float32."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue() + data


@pytest.mark.parametrize("shape", [(10**12,), (2**40, 2**40), (3,), (0,), (0, 10**30)])
def test_an_array_whose_header_states_another_size_is_refused_before_it_is_allocated(shape, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("kernel.npy", with_shape(shape, bytes(8)))
    with pytest.raises(UserError, match=r"a\.npz holds kernel, which is no array of numbers .*and 8 bytes"):
        checkpoint.load(tmp_path / "a.npz")


def test_safetensors_are_loaded_as_a_dict_whatever_the_suffix(tmp_path):
    tensors = {"a.weight": torch.randn(3, 4), "b": torch.tensor([1, 2]), "c": torch.ones(2, dtype=torch.bfloat16)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    write(tmp_path / "b.pt", (tmp_path / "a.safetensors").read_bytes())
    for name in ("a.safetensors", "b.pt"):
        content = checkpoint.load(tmp_path / name)
        assert same(tensors, dict(sorted(content.items()))) and not checkpoint.is_ours(content)
        assert all(content[key].dtype == tensors[key].dtype for key in tensors)


OTHER_FORMATS = {
    "npz": lambda path: np.savez(path, **ARRAYS),
    "safetensors": lambda path: safetensors.torch.save_file({"a": torch.randn(50), "b": torch.randn(50)}, path),
}


@pytest.mark.parametrize("kind", OTHER_FORMATS)
def test_another_programs_file_truncated_at_any_length_is_refused(kind, tmp_path):
    intact = tmp_path / f"intact.{kind}"
    OTHER_FORMATS[kind](intact)
    data = intact.read_bytes()
    checkpoint.load(intact)
    for length in (len(data) - 1, len(data) // 2, 100, 20, 9):
        path = write(tmp_path / f"truncated.{kind}", data[:length])
        with pytest.raises(UserError) as caught:
            checkpoint.load(path)
        text = str(caught.value)
        assert text.startswith(str(path)) and "is damaged" in text and text.endswith("; copy or download it again.")
        assert "\n" not in text


def test_a_flipped_bit_in_an_npz_is_detected(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.arange(1000.0))
    flipped = bytearray((tmp_path / "a.npz").read_bytes())
    flipped[4000] ^= 1
    with pytest.raises(UserError, match=r"is damaged \(the checksum of a\.npy is wrong\); copy or download it again"):
        checkpoint.load(write(tmp_path / "flipped.npz", bytes(flipped)))


def test_an_npz_or_safetensors_cannot_pass_for_our_checkpoint(tmp_path):
    np.savez(tmp_path / "a.npz", format=np.zeros(1))
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"format": "triptych-1"})
    for name in ("a.npz", "a.safetensors"):
        assert not checkpoint.is_ours(checkpoint.load(tmp_path / name))
