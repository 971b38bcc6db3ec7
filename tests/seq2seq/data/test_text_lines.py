"""Lines of text files by memory map: the same lines as `read_lines`, pieces of the text, and errors of broken files."""

import bz2
import gzip
import lzma
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import UserError
from seq2seq.data import text_lines
from seq2seq.data.text_lines import TextLines, text_files
from seq2seq.tokenizers.text import read_lines

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Returns a function that writes bytes, or text as UTF-8, to a file."""

    def write_file(content: bytes | str, name: str = "file.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


def message(*paths: Path) -> str:
    with pytest.raises(UserError) as caught:
        TextLines(paths)
    return str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "ein Haus\n\n zwei \n好\n",
        "a\r\nb\r\n\r\nc\r\n",
        "a\nb",
        "a\r\nb\r",
        "\ufeffa\n\ufeffb\n",
        "a\u2028b\nc\r\r\n",
        "x",
    ],
)
@pytest.mark.parametrize("scan_bytes", [1, 2, 5, 1 << 24])
def test_the_lines_are_those_of_read_lines_however_the_file_is_scanned(
    write: Write, monkeypatch: pytest.MonkeyPatch, content: str, scan_bytes: int
) -> None:
    monkeypatch.setattr(text_lines, "SCAN_BYTES", scan_bytes)
    path = write(content)
    lines = TextLines([path])
    assert [*lines] == [lines[i] for i in range(len(lines))] == [*read_lines(path)]


def test_several_files_are_one_sequence(write: Write) -> None:
    lines = TextLines([write("a\nb", "1"), write("", "2"), write("c\n", "3")])
    assert [*lines] == ["a", "b", "c"] and lines[2] == lines[-1] == "c" and lines[1:] == ["b", "c"]
    assert lines.where(2).startswith("line 1 of ") and lines.where(2).endswith("3")
    with pytest.raises(IndexError):
        lines[3]


def test_a_key_names_one_file_or_those_of_a_pattern_also_in_the_home_folder(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = [write("b", "b.txt"), write("a", "a.txt")]
    (tmp_path / "c.txt").mkdir()
    assert text_files("data.train", "~/a.txt") == [paths[1]]
    assert text_files("data.train", "~/*.txt") == sorted(paths)
    with pytest.raises(UserError, match=r"data.val=~/\*.md: no file matches this pattern"):
        text_files("data.val", "~/*.md")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress], ids=["gzip", "bzip2", "xz"])
def test_a_compressed_file_is_recognised_by_its_content(write: Write, compress: Callable[[bytes], bytes]) -> None:
    lines = TextLines([write(compress("größer\nhöher\n".encode()), "a.txt")])
    assert [*lines] == ["größer", "höher"]


@pytest.mark.parametrize("size", [1, 3, 4, 7, 10, 1000])
@pytest.mark.parametrize("content", ["eins zwei drei\nvier\r\n\r\nfünf", "好" * 20, "a b " * 9 + "\n", "\n\n\nx y\n"])
def test_chunks_joined_are_the_lines_with_line_feeds(write: Write, size: int, content: str) -> None:
    lines = TextLines([write(content, "1"), write("z", "2")])
    chunks = [*lines.chunks(size)]
    assert "".join(chunks) == "".join(f"{line}\n" for line in lines)
    assert all(chunks) and max(len(chunk.encode()) for chunk in chunks) <= size + 4


def test_a_long_line_is_cut_before_a_space(write: Write) -> None:
    expected = ["one two", " three", " four\n", "five\n"]
    assert [*TextLines([write("one two three four\nfive\n")]).chunks(10)] == expected


@pytest.mark.parametrize("content", ["", "\n \n\t\r\n", b"\xef\xbb\xbf"])
def test_a_corpus_without_text_is_refused(write: Write, content: str | bytes) -> None:
    assert "there is no text" in message(write(content))


@pytest.mark.parametrize("scan_bytes", [2, 3, 1 << 24])
def test_another_encoding_is_refused_with_the_line(
    write: Write, monkeypatch: pytest.MonkeyPatch, scan_bytes: int
) -> None:
    monkeypatch.setattr(text_lines, "SCAN_BYTES", scan_bytes)
    assert "line 2 is not valid UTF-8 (byte 0xfc)" in message(write("größe\n".encode() + "für\n".encode("latin-1")))
    assert "line 2 is not valid UTF-8 (byte 0xc3)" in message(write(b"a\nb\xc3"))  # incomplete at the end
    assert "not valid UTF-8" in message(write("text\n".encode("utf-16")))


def test_missing_and_unsupported_files_and_old_line_ends_are_refused(write: Write, tmp_path: Path) -> None:
    assert "There is no file" in message(tmp_path / "missing.txt")
    assert "unzip" in message(write(b"PK\x03\x04" + b"x" * 20))
    assert "is a broken gzip file" in message(write(gzip.compress(b"text" * 100)[:20]))
    assert "carriage returns" in message(write("one\rtwo\r"))


@pytest.mark.slow
def test_one_line_of_100_megabytes_is_read_in_chunks(write: Write) -> None:
    content = b"word " * 20_000_000
    path, start = write(content), time.perf_counter()
    lines = TextLines([path])
    assert len(lines) == 1 and lines.total == len(content)
    assert sum(len(chunk) for chunk in lines.chunks(1 << 20)) == len(content) + 1
    assert time.perf_counter() - start < 30  # about 1 s; the limit would be missed by a quadratic loop
