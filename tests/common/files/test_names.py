r"""Names that are not UTF-8 are escaped so that they can be restored, and names of answers are short enough."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from common.files import names
from common.files.lines import LineFile, write_atomically
from common.files.table import table

NAMES = [
    *("plain.jpg", "größer 你好.png", "", "a\\b", r"C:\users\x", r"\n", r"\u00e9"),  # unchanged
    *("caf\udce9", "\udc80\udcff", "caf\\\udce9", "\\\\\udce9x", r"caf\udce9", r"caf\\udce9", r"\ud800", "\ud800"),
]


@pytest.mark.parametrize("name", NAMES)
def test_an_escaped_name_is_utf8_and_can_be_restored(name: str) -> None:
    escaped = names.escape(name)
    escaped.encode()
    assert names.unescape(escaped) == name


def test_names_are_escaped_as_in_json_and_no_two_alike() -> None:
    assert names.escape("caf\udce9") == r"caf\udce9"
    assert [names.escape(name) for name in NAMES[:7]] == NAMES[:7]
    assert len({names.escape(name) for name in NAMES}) == len(NAMES)


def test_a_json_file_and_a_log_take_any_name(tmp_path: Path) -> None:
    content = {"classes": NAMES}
    write_atomically(tmp_path / "task.json", json.dumps(content, ensure_ascii=False))
    assert json.loads((tmp_path / "task.json").read_text("utf-8")) == content
    lines = LineFile(tmp_path / "train.log")
    lines.add("classes caf\udce9")
    lines.close()
    assert (tmp_path / "train.log").read_text("utf-8") == "classes caf\\udce9\n"


def test_a_printed_name_is_one_line_without_control_characters() -> None:
    assert names.printable("a\n\t\x1b[2J\udce9 é.png") == r"a\n\t\x1b[2J\udce9 é.png"
    assert table("t", [("class", "n"), ("cat\x1b[2J\nAP 1.0", 1)]).splitlines()[3] == r"cat\x1b[2J\nAP 1.0  1"


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="the escape is of bash and zsh")
def test_a_printed_command_names_the_same_file_when_it_is_pasted() -> None:
    words = [os.fsdecode(word) for word in (b"run_dir=r\xe9\xff's \\x\n", b"a b", "größer".encode())]
    line = f"printf '%s\\0' {names.shell_command(words)}"
    names.escape(line).encode()
    output = subprocess.run(["bash", "-c", line], capture_output=True, check=True).stdout
    assert output.split(b"\0")[:-1] == [os.fsencode(word) for word in words]


def test_the_name_of_an_answer_fits_a_folder_and_is_its_own() -> None:
    assert names.answer_name("a.jpg", ".classes.json") == "a.jpg.classes.json"
    long = ["x" * 250 + ".jpg", "x" * 250 + ".png", "é" * 125 + ".jpg", "x" * 240 + "\udce9" * 10 + ".jpg"]
    answers = [names.answer_name(name, ".attention.png") for name in long]
    assert all(len(os.fsencode(name)) <= 255 and name.endswith(".attention.png") for name in answers)
    assert len({*answers}) == len(long)
