"""Reading parallel text: line ends, both layouts, and an error for each broken file."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from seq2seq.tokenizers.text import Lines, read_lines, read_pair, read_tabbed, read_two_files

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


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress], ids=["gzip", "bzip2", "xz"])
def test_compression_is_recognised_by_its_content_and_not_by_its_name(
    write: Write, compress: Callable[[bytes], bytes]
) -> None:
    packed = compress("größer\nhöher\n".encode())
    for name in ("a.gz", "a.bz2", "a.txt"):
        assert [*read_lines(write(packed, name))] == ["größer", "höher"]
    for plain in ("plain", "BZh91 plain", "PKW", "7z"):
        assert [*read_lines(write(f"{plain}\n", "b.gz"))] == [plain]


@pytest.mark.parametrize(("start", "command"), [(b"PK\x03\x04", "unzip FILE"), (b"\x28\xb5\x2f\xfd", "zstd -d FILE")])
def test_other_compressed_files_are_refused_with_the_command_that_decompresses_them(
    write: Write, start: bytes, command: str
) -> None:
    assert f"file.txt is compressed in an unsupported format; decompress it ({command})" in message(write(start + b"x"))


EMPTY = [compress(b"") for compress in (bytes, lambda x: gzip.compress(x, mtime=0), bz2.compress, lzma.compress)]


@pytest.mark.parametrize("content", [*EMPTY, b"\xef\xbb\xbf"])
def test_an_empty_file_is_one_sentence_of_error(write: Write, content: bytes) -> None:
    assert message(write(content)).endswith("file.txt is empty; expected one sentence per line.")


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    assert message(tmp_path / "no.txt") == f"There is no file {tmp_path / 'no.txt'}; correct its path."
    assert message(tmp_path).startswith(f"{tmp_path} cannot be read (Is a directory)")


@pytest.mark.parametrize(("compress", "name"), [(bz2.compress, "bzip2"), (lzma.compress, "xz")])
def test_a_broken_bzip2_or_xz_file_is_named(write: Write, compress: Callable[[bytes], bytes], name: str) -> None:
    packed = compress(b"many words\n" * 99)
    for broken in (packed[:-12], packed[:20] + b"xx" + packed[22:]):
        assert f"file.txt is a broken {name} file" in message(write(broken))


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


def test_blank_lines_at_the_end_of_one_file_are_left_out_with_a_note(write: Write) -> None:
    source, target = write("a\n\nb\n\n \n", "s.en"), write("A\n\nB\n", "t.de")
    *sides, notes = read_two_files(source, target)
    assert [[*side] for side in sides] == [["a", "", "b"], ["A", "", "B"]]
    assert notes == [f"2 blank lines at the end of {source} left out"]
    assert read_two_files(source, source)[2] == [] and len(read_pair(source, source)[0]) == 5, "both files have them"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n  \n"])
def test_blank_lines_at_the_end_of_a_tabbed_file_are_left_out_with_a_note(write: Write, end: str) -> None:
    path = write(f"a\tA\nb\tB\n{end}")
    source, target, notes = read_tabbed(path)
    assert ([*source], [*target]) == (["a", "b"], ["A", "B"])
    count = end.count("\n")
    assert notes == [f"{count} blank {'lines' if count > 1 else 'line'} at the end of {path} left out"]


def test_of_more_columns_the_first_two_are_read_and_named(write: Write) -> None:
    path = write("Go.\tGeh.\tCC-BY 2.0\nHi.\tHallo!\t\n")
    source, target, notes = read_tabbed(path)
    assert ([*source], [*target]) == (["Go.", "Hi."], ["Geh.", "Hallo!"])
    assert notes == [f"{path} has 3 columns: the first was read as the source, the second as the target"]


@pytest.mark.parametrize(("content", "column"), [("17\ta\tA\n 2.5\tb\tB\n", 1), ("a\t1276\tA\nb\t-3\tB\n", 2)])
def test_columns_of_ids_and_scores_are_not_read_as_sentences(write: Write, content: str, column: int) -> None:
    error = message(write(content), read_tabbed)
    assert f"column {column} of three or more has only numbers" in error and "cut -f2,3 FILE > pairs.tsv" in error


def test_one_tabbed_file_has_both_languages(write: Write) -> None:
    source, target, notes = read_tabbed(write("\ufeffa house\tein Haus\r\n\tleer\nempty\t\n two \t zwei "))
    assert [*source] == ["a house", "", "empty", " two "] and [*target] == ["ein Haus", "leer", "", " zwei "]
    assert notes == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a\tb\nab\na\tb\n", "line 2 has no tab;"),
        ("a\tb\n\na\tb\n", "line 2 has no tab;"),
        ("a\tb\na\tb\na\tb\tc\td\n", "line 3 has 3 tabs;"),
        ("ab", "line 1 has no tab;"),
        ("\n\n", "line 1 has no tab;"),
        ("a\tb\tc\na\tb\na\tb\tc\n", "line 2 has 1 tab, and line 1 has 2;"),
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
