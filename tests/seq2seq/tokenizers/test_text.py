"""Reading parallel text: line ends, both layouts, and one sentence per broken file."""

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from seq2seq.tokenizers.text import Lines, read_lines, read_pair, read_tabbed

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Returns a function that writes bytes, or text as UTF-8, to a file."""

    def write_file(content: bytes | str, name: str = "file.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


def message(path: Path, read: Callable[[Path], object] = read_lines) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    return str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_of_any_system_and_a_missing_last_one_change_nothing(write: Write, end: str, last: bool) -> None:
    assert [*read_lines(write(end.join(["ein Haus", "", " zwei ", "好"]) + end * last))] == [
        *("ein Haus", "", " zwei ", "好"),
    ]


def test_a_byte_order_mark_is_removed_at_the_start_only(write: Write) -> None:
    assert [*read_lines(write(b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n"))] == ["a", "\ufeffb"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"])
def test_other_separators_do_not_split_a_line(write: Write, separator: str) -> None:
    assert [*read_lines(write(f"a{separator}b\nc\n"))] == [f"a{separator}b", "c"]


def test_gzip_is_recognised_by_its_content_and_not_by_its_name(write: Write) -> None:
    packed = gzip.compress("größer\nhöher\n".encode())
    for name in ("a.gz", "a.txt"):
        assert [*read_lines(write(packed, name))] == ["größer", "höher"]
    assert [*read_lines(write("plain\n", "b.gz"))] == ["plain"]


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", gzip.compress(b"", mtime=0)])
def test_an_empty_file_is_one_sentence_of_error(write: Write, content: bytes) -> None:
    assert message(write(content)).endswith("file.txt is empty; expected one sentence per line.")


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    assert message(tmp_path / "no.txt") == f"There is no file {tmp_path / 'no.txt'}; correct its path."
    assert message(tmp_path).startswith(f"{tmp_path} cannot be read (Is a directory)")


def test_a_broken_gzip_file_is_named(write: Write) -> None:
    assert "file.txt is a broken gzip file" in message(write(gzip.compress(b"many words\n" * 99)[:-12]))
    assert "file.txt is a broken gzip file" in message(write(b"\x1f\x8bno gzip at all"))


def test_invalid_utf8_names_its_file_line_and_byte(write: Write) -> None:
    error = message(write(b"eins\r\nzwei\r\ndrei \xe4\r\nvier\xff\r\n"))
    assert "file.txt: line 3 is not valid UTF-8 (byte 0xe4);" in error
    assert "line 1 is not valid UTF-8 (byte 0xff)" in message(write("Haus\n".encode("utf-16")))


def test_two_files_of_different_line_counts_are_refused_with_both_counts(write: Write) -> None:
    source, target = write("a\n" * 1200, "s.en"), write("b\n" * 1201, "t.de")
    error = message(source, lambda path: read_pair(path, target))
    assert "s.en has 1,200 lines and" in error and "t.de has 1,201" in error
    assert [len(side) for side in read_pair(source, source)] == [1200, 1200]


def test_one_tabbed_file_has_both_languages(write: Write) -> None:
    source, target = read_tabbed(write("\ufeffa house\tein Haus\r\n\tleer\nempty\t\n two \t zwei "))
    assert [*source] == ["a house", "", "empty", " two "] and [*target] == ["ein Haus", "leer", "", " zwei "]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a\tb\nab\na\tb\n", "line 2 has no tab;"),
        ("a\tb\n\na\tb\n", "line 2 has no tab;"),
        ("a\tb\na\tb\na\tb\tc\td\n", "line 3 has 3 tabs;"),
        ("ab", "line 1 has no tab;"),
    ],
)
def test_a_line_without_exactly_one_tab_is_named(write: Write, content: str, expected: str) -> None:
    assert expected in message(write(content), read_tabbed)


def test_a_line_has_its_number_in_its_file(write: Write) -> None:
    lines = read_lines(write(b"\xef\xbb\xbfa\r\n\nb\nc"))
    assert [lines.number(i) for i in range(4)] == [1, 2, 3, 4]
    assert lines.take(np.array([3, 1])).number(0) == 4
    assert [Lines.of(["a", "", "b"]).number(i) for i in range(3)] == [1, 2, 3]


def test_lines_can_be_taken_in_any_order_without_copying_text() -> None:
    lines = Lines.of(["a", "", "größer", "你好"])
    assert [*lines] == ["a", "", "größer", "你好"] == [*lines], "iterating twice gives the same"
    taken = lines.take(np.array([3, 0]))
    assert [*taken] == ["你好", "a"] and np.shares_memory(taken.rows.flat, lines.rows.flat)
    assert len(Lines.of([])) == 0 and [*Lines.of([])] == []
