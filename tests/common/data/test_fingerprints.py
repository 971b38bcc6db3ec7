"""Digests of files and arrays: equal for equal contents in any folder, and different for different ones."""

import hashlib
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from common.data.costs import equal_costs
from common.data.fingerprints import digest, digest_file, digest_files
from common.errors import UserError

NAMES = np.array([f"class {i % 3}/{i}.png".encode() for i in range(2500)])


def write(folder: Path) -> Path:
    for i, name in enumerate(NAMES):
        path = folder / name.decode()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * (i % 7))
    return folder


def test_files_are_recognised_by_names_and_lengths_and_not_by_their_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "here")
    before = digest_files(folder, NAMES)
    moved = shutil.copytree(folder, tmp_path / "there")
    assert digest_files(moved, NAMES) == before == digest_files(moved, NAMES.astype("S200"))
    assert digest_files(moved, NAMES[::-1]) != before, "the order is that of the samples"
    assert digest_files(moved, np.char.replace(NAMES, b"class 1", b"class 9")) != before
    (moved / NAMES[2400].decode()).write_bytes(b"longer than it was")
    assert digest_files(moved, NAMES) != before
    (folder / NAMES[0].decode()).unlink()
    assert digest_files(folder, NAMES) != before, "a missing file is no error here"


def test_names_do_not_run_together(tmp_path: Path) -> None:
    assert digest_files(tmp_path, np.array([b"ab", b"c"])) != digest_files(tmp_path, np.array([b"a", b"bc"]))


def test_arrays_are_hashed_in_order_whatever_their_layout_in_memory(tmp_path: Path) -> None:
    array = np.arange(12).reshape(3, 4)
    assert digest([array]) == digest([np.asfortranarray(array)]) != digest([array.T])
    (tmp_path / "bytes").write_bytes(array.tobytes())
    assert digest_file(tmp_path / "bytes") == digest([array])
    with pytest.raises(UserError, match="cannot be read"):
        digest_file(tmp_path / "missing")


def test_an_array_that_is_not_contiguous_is_hashed_in_pieces_as_a_whole() -> None:
    for array in (equal_costs(7, 200_000), np.arange(300_000).reshape(100_000, 3)[:, ::2], np.arange(70_000)[::-1]):
        assert digest([array]) == hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()


def test_the_digest_of_millions_of_equal_costs_takes_little_memory() -> None:
    """2 MiB; as one array of int64, they would take 76."""
    tracemalloc.start()
    try:
        digest([equal_costs(1, 10_000_000)])
        assert tracemalloc.get_traced_memory()[1] < 2 * 2**20
    finally:
        tracemalloc.stop()
