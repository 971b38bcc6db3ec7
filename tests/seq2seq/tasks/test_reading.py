"""Reading the lines to translate: files, pipes while they fill, and terminals."""

import builtins
import gzip
import os
import pty
import sys
import threading
from collections.abc import Iterator
from io import BufferedWriter, FileIO
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from common.config.compose import configure
from common.errors import UserError
from seq2seq.tasks.reading import READ_BYTES, Line, lines

pytestmark = pytest.mark.timeout(20)  # a read that waits for too much waits forever


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileIO]:
    """Standard input is a pipe; this is its writing end, which a test may close."""
    reader, writer = os.pipe()
    with open(reader) as stdin, FileIO(writer, "w") as writing_end:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield writing_end


def texts(groups: Iterator[list[Line]]) -> list[str]:
    return [line.text for line in chain.from_iterable(groups)]


# Files.


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_file_comes_in_groups_of_consecutive_numbered_lines(tmp_path: Path, pack: Any) -> None:
    (tmp_path / "a").write_bytes(pack("eins\r\n\nd\u2028r\x0cei\nvier\nfünf".encode()))
    assert [*lines(str(tmp_path / "a"), 2)] == [
        [Line(1, "eins"), Line(2, "")],
        [Line(3, "d\u2028r\x0cei"), Line(4, "vier")],
        [Line(5, "fünf")],
    ]


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "utf16").write_bytes("gut\n".encode("utf-16"))
    (tmp_path / "old").write_bytes(b"eins\rzwei\r")
    messages = {"missing": "no file", "empty": "is empty", "utf16": "line 1 is not valid UTF-8", "old": "no line feed"}
    for name, message in messages.items():
        with pytest.raises(UserError, match=message):
            next(lines(str(tmp_path / name), 8))


def test_a_pattern_stands_for_the_lines_of_all_matching_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are numbered over all files, as by `cat`, but a last line without its line feed is not joined."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("eins\nzwei\ndrei")
    Path("b.txt").write_text("vier\n")
    Path("c.txt").mkdir()
    assert [*lines("*.txt", 2)] == [
        [Line(1, "eins", origin="a.txt:1"), Line(2, "zwei", origin="a.txt:2")],
        [Line(3, "drei", origin="a.txt:3")],
        [Line(4, "vier", origin="b.txt:1")],
    ]
    assert [*lines("[b]*", 2)] == [*lines("b.txt", 2)] == [[Line(1, "vier")]]
    Path("*.txt").write_text("this very file\n")
    assert texts(lines("*.txt", 2)) == ["this very file"]
    Path("b.txt").write_text("vier\n", encoding="utf-16")
    with pytest.raises(UserError, match=r"b\.txt"):
        next(lines("?.txt", 8))


def test_a_folder_or_a_pattern_without_a_match_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder; give a text file, or a pattern such as .*/\*\.txt\.$"):
        next(lines(str(tmp_path), 8))
    with pytest.raises(UserError, match=r"input=.*/\*\.de: no file matches this pattern; give a text file"):
        next(lines(str(tmp_path / "*.de"), 8))


LATIN = "it is not valid UTF-8 (byte 0xf6); convert the text to UTF-8, or correct the line"


def test_a_line_of_a_file_that_is_not_utf8_is_a_problem_among_lines_that_are(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"gut\nsch\xf6n\r\nfertig")
    groups = lines(str(tmp_path / "latin"), 8)
    assert [*groups] == [[Line(1, "gut"), Line(2, "", LATIN), Line(3, "fertig")]]


# Pipes.


def test_a_line_of_a_pipe_is_returned_before_the_next_is_written(pipe: FileIO) -> None:
    groups = lines("-", 8)
    for number, text in enumerate(["eins", "", "drei"], start=1):
        pipe.write(f"{text}\n".encode())
        assert next(groups) == [Line(number, text)]
    pipe.close()
    assert [*groups] == []


def test_groups_of_a_pipe_have_the_lines_that_have_arrived_up_to_the_limit(pipe: FileIO) -> None:
    groups = lines("-", 3)
    pipe.write(b"1\n2\r\n3\n4\n5 is not")
    assert [len(next(groups)) for _ in range(2)] == [3, 1]
    pipe.write(b" done\n6\n7")
    assert next(groups) == [Line(5, "5 is not done"), Line(6, "6")]
    pipe.close()
    assert [*groups] == [[Line(7, "7")]], "the last line end may be missing"


def test_a_group_is_filled_over_several_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"a line of 23 characters\n" * 9000)
    with open(path) as stdin:  # predict.py ... < large
        monkeypatch.setattr(sys, "stdin", stdin)
        lengths = [len(group) for group in lines("-", 4000)]
    assert lengths == [4000, 4000, 1000] and READ_BYTES < 24 * 4000


def test_the_lines_of_a_long_stream_are_complete_and_in_order(pipe: FileIO) -> None:
    expected = [f"line {i} " + "größer 你好 " * (i % 7) for i in range(30_000)]

    def write() -> None:
        with BufferedWriter(pipe, 777) as file:  # splits lines and characters anywhere
            file.write("\n".join(expected).encode())

    writer = threading.Thread(target=write)
    writer.start()
    read = [*chain.from_iterable(lines("-", 64))]
    writer.join()
    assert read == [Line(i, text) for i, text in enumerate(expected, start=1)]


def test_separators_and_byte_order_marks_are_treated_as_in_files(pipe: FileIO) -> None:
    pipe.write("\ufeffa\u2028b\x0cc\rd\r\n\ufeffe\n\r\n".encode())
    pipe.close()
    assert texts(lines("-", 9)) == ["a\u2028b\x0cc\rd", "\ufeffe", ""]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"eins\n", mtime=0), "is compressed; decompress it first"),
        (b"\x28\xb5\x2f\xfd...", "is compressed"),
        ("eins\n".encode("utf-16"), "is UTF-16"),
        (b"eins\rzwei\r", "carriage returns and no line feed"),
    ],
)
def test_a_pipe_that_has_no_lines_of_text_is_one_sentence(pipe: FileIO, content: bytes, message: str) -> None:
    pipe.write(content)
    pipe.close()
    with pytest.raises(UserError, match=f"Standard input .*{message}"):
        next(lines("-", 8))


def test_a_single_line_may_contain_or_end_with_a_carriage_return(pipe: FileIO, tmp_path: Path) -> None:
    pipe.write(b"eins\rzwei\n")
    pipe.close()
    assert texts(lines("-", 8)) == ["eins\rzwei"]
    (tmp_path / "a").write_bytes(b"eins\r")
    assert texts(lines(str(tmp_path / "a"), 8)) == ["eins"]


def test_an_empty_pipe_gives_no_group(pipe: FileIO) -> None:
    pipe.close()
    assert [*lines("-", 9)] == []


def test_a_line_of_a_pipe_that_is_not_utf8_is_a_problem_among_lines_that_are(pipe: FileIO) -> None:
    pipe.write(b"1\n2\n3\n4 \xf6\n5\n")
    groups = lines("-", 2)
    assert [next(groups) for _ in range(3)] == [
        [Line(1, "1"), Line(2, "2")],
        [Line(3, "3"), Line(4, "", LATIN)],
        [Line(5, "5")],
    ]
    pipe.write("ü".encode()[:1])  # an incomplete character
    pipe.close()
    (group,) = groups
    assert group[0].number == 6 and "(byte 0xc3)" in group[0].problem


def test_closing_the_iterator_does_not_wait_for_the_pipe(pipe: FileIO) -> None:
    groups = lines("-", 2)
    pipe.write(b"1\n2\n3\n")
    assert len(next(groups)) == 2
    groups.close()  # while the pipe is open


def test_a_closed_standard_input_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="which is closed; give a file, or a pipe"):
        next(lines("-", 2))


# Terminals.


def test_a_terminal_prompts_for_each_line_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keyboard, terminal = pty.openpty()
    with open(terminal) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        groups = lines("-", 8)
        os.write(keyboard, "größer\n\n".encode())
        assert [next(groups), next(groups)] == [[Line(1, "größer")], [Line(2, "")]], "one line at a time"
        os.write(keyboard, b"\x04")  # Ctrl-D
        assert [*groups] == []
    os.close(keyboard)
    output = capsys.readouterr()
    assert output.err == "> > > \n" and output.out == ""


class Terminal:
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_line_editing_is_used_if_the_output_is_a_terminal_and_ends_quietly(
    monkeypatch: pytest.MonkeyPatch, end: type[BaseException]
) -> None:
    typed = iter(["eins", ""])

    def input_line(prompt: str) -> str:
        assert prompt == "> "
        text = next(typed, None)
        if text is None:
            raise end
        return text

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(builtins, "input", input_line)
    groups = [*lines("-", 8)]
    monkeypatch.undo()
    assert groups == [[Line(1, "eins")], [Line(2, "")]]


def test_invalid_bytes_that_python_turned_into_surrogates_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(builtins, "input", lambda prompt: "sch\udcf6n")
    assert next(lines("-", 8)) == [Line(1, "", LATIN)]


def test_a_dash_passes_through_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "file.pt").touch()
    arguments = [f"checkpoint={tmp_path / 'file.pt'}", "input=-", "model=vit"]
    assert configure("predict", arguments, base=lambda file: {})["input"] == "-"
