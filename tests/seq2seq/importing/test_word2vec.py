"""Files of word vectors: round trips are exact, gensim reads ours and we read gensim's, damage is one sentence."""

import bz2
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common.errors import UserError
from seq2seq.importing.word2vec import read_vectors, write_vectors

WORDS = ["the", "naïve", "42", "猫", "e-mail"]


def random_vectors(seed: int = 0) -> NDArray[np.float32]:
    """Vectors (5, 7) of very different magnitudes."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(len(WORDS), 7)) * 10.0 ** rng.integers(-30, 30, (len(WORDS), 7))).astype(np.float32)


@pytest.mark.parametrize("name", ["vectors.txt", "vectors.txt.gz"])
@pytest.mark.parametrize("binary", [False, True])
def test_every_bit_of_what_is_written_is_read_again(tmp_path: Path, name: str, binary: bool) -> None:
    vectors = random_vectors()
    write_vectors(tmp_path / name, WORDS, vectors, binary=binary)
    words, read = read_vectors(tmp_path / name)
    assert words == WORDS and read.dtype == np.float32
    assert read.tobytes() == vectors.tobytes()


def test_a_name_in_gz_is_compressed_and_equal_vectors_give_equal_files(tmp_path: Path) -> None:
    for name in ("a.gz", "b.gz"):
        write_vectors(tmp_path / name, WORDS, random_vectors(), binary=True)
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.gz").read_bytes()).startswith(b"5 7\nthe ")


@pytest.mark.parametrize("name", ["vectors.any", "vectors.gz"])
@pytest.mark.parametrize("binary", [False, True])
def test_gensim_reads_our_files_and_we_read_gensims(tmp_path: Path, name: str, binary: bool) -> None:
    gensim: Any = pytest.importorskip("gensim.models.keyedvectors")
    vectors = random_vectors(1)
    write_vectors(tmp_path / f"ours.{name}", WORDS, vectors, binary=binary)
    theirs = gensim.KeyedVectors.load_word2vec_format(str(tmp_path / f"ours.{name}"), binary=binary)
    assert theirs.index_to_key == WORDS and theirs.vectors.tobytes() == vectors.tobytes()
    theirs.save_word2vec_format(str(tmp_path / f"theirs.{name}"), binary=binary)
    words, read = read_vectors(tmp_path / f"theirs.{name}")
    assert words == WORDS
    # gensim writes text with the shortest digits that identify a float, so text is exact as well.
    assert read.tobytes() == vectors.tobytes()


def test_rows_as_the_c_program_writes_them_are_read(tmp_path: Path) -> None:
    """It ends a text row with a space and a binary row with a line feed; a float may contain a line feed's byte."""
    (tmp_path / "text").write_bytes(b"2 3\n</s> 0.5 -1 2e-3 \nof 1 2 3 \n")
    words, vectors = read_vectors(tmp_path / "text")
    assert words == ["</s>", "of"]
    np.testing.assert_array_equal(vectors, np.array([[0.5, -1, 2e-3], [1, 2, 3]], np.float32))
    rows = np.frombuffer(b"\n \n\n1 2\n   \n", "<f4").reshape(1, 3)
    (tmp_path / "binary").write_bytes(b"1 3\nof " + rows.tobytes() + b"\n")
    words, vectors = read_vectors(tmp_path / "binary")
    assert words == ["of"] and vectors.tobytes() == rows.tobytes()


def test_a_file_compressed_by_bzip2_is_read(tmp_path: Path) -> None:
    (tmp_path / "vectors").write_bytes(bz2.compress(b"1 2\nof 1 2\n"))
    assert read_vectors(tmp_path / "vectors")[0] == ["of"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "does not begin with the number of words"),
        (b"of 1 2\nto 3 4\n", "does not begin with the number of words"),
        (b"0 3\n", "nothing to read"),
        (b"99999999 300\nof 1 2\n", "too few"),
        (b"2 2\nof 1 2\n\n", "line 3 has 0 numbers"),
        (b"3 2\nof 1.0 2.0\nto 3.0 4.0\n", "ends after 2 of the 3 words"),
        (b"1 2\nof 1 2\nto 3 4\n", "goes on after the 1 words"),
        (b"2 2\nof 1 2\nto 3\n", "line 3 has 1 numbers, and the first line announces 2"),
        (b"2 2\nof 1 2\nto 3 4 5\n", "line 3 has 3 numbers"),
        (b"2 2\nof 1 2\nto 3 x\n", "line 3 has a field that is not a number"),
        (b"2 3\nof 1 2 x\nto 3 4 5\n", "line 2 has a field that is not a number"),
        (b"2 2\nnew york 1 2\nto 3 4\n", "line 2 has 3 numbers"),
        (b"2 2\nof 1 1e39\nto 3 4\n", "the vector of 'of' (word 1) is not finite"),
        (b"2 2\nof 1 2\nof 3 4\n", "holds 'of' twice, as words 1 and 2"),
        (b"2 2\nof 1 2\nto 3 nan\n", "the vector of 'to' (word 2) is not finite"),
        (b"2 2\n\xff\xfe 1 2\nto 3 4\n", "word 1 is not valid UTF-8"),
        (b"2 2\nof " + bytes([0, 0, 1, 2] * 2) + b"\nto \0\0\0\1", "ends after 1 of the 2 words"),
        (b"1 2\nof " + bytes([0, 0, 1, 2] * 2) + b"\nto \0\0\0\1", "goes on after the 1 words"),
    ],
)
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "vectors"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_vectors(path)
    assert reason in str(error.value) and str(path) in str(error.value)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no file"):
        read_vectors(tmp_path / "vectors")


@pytest.mark.parametrize("word", ["new york", "", "a\nb"])
def test_a_word_that_no_file_can_hold_is_refused_before_anything_is_written(tmp_path: Path, word: str) -> None:
    with pytest.raises(UserError, match="white space"):
        write_vectors(tmp_path / "vectors", [word], np.ones((1, 2)), binary=False)
    assert not (tmp_path / "vectors").exists()
