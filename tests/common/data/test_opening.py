"""Only regular files are opened, and JSON that cannot be read is named in a sentence."""

import json
import os
import socket
from pathlib import Path

import pytest

from common.data.opening import open_regular, read_json
from common.errors import UserError

pytestmark = pytest.mark.timeout(60)


def test_a_regular_file_and_a_link_to_one_are_opened(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"text")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for path in (tmp_path / "file", str(tmp_path / "link")):
        with open_regular(path) as file:
            assert file.read() == b"text"


def test_nothing_else_is_opened_and_the_reason_is_given(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    reasons = {
        "pipe": "it is a named pipe and no regular file",
        "link": "it is a named pipe and no regular file",
        "/dev/zero": "it is a device and no regular file",
        "socket": "No such device or address",
        ".": "Is a directory",
        "gone": "No such file or directory",
        "a" * 5000: "File name too long",
        "a\0b": "no file can have this name",
        "\ud800": "no file can have this name",
    }
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for name, reason in reasons.items():
        with pytest.raises(OSError) as error:
            open_regular(tmp_path / name)
        assert error.value.strerror == reason
    assert not before or len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "is not JSON (Expecting"),
        (b"\xff\xfe\xfd", "is not JSON ("),
        (b"[" * 200_000, "is nested too deeply"),
        (b"9" * 5000, "is not JSON (a number has too many digits)"),
    ],
    ids=["broken", "no text", "deep", "digits"],
)
def test_json_that_cannot_be_read_is_named_in_a_sentence(content: bytes, reason: str, tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(path)
    assert str(error.value).startswith(f"{path} {reason}") and "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_is_read_in_any_encoding_of_unicode(encoding: str, tmp_path: Path):
    (tmp_path / "x.json").write_text(json.dumps({"a": ["\u00e9"]}, ensure_ascii=False), encoding=encoding)
    assert read_json(tmp_path / "x.json") == {"a": ["\u00e9"]}
