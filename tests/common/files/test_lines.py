"""Lines stay in memory while the disk is full."""

import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.files.lines import LineFile, as_json, write_atomically


@contextmanager
def file_limit(count: int) -> Iterator[None]:
    """Limit files to `count` bytes inside, as when a disk or a quota is full in the middle of a line."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_lines_are_in_the_file_as_soon_as_they_are_added(tmp_path: Path) -> None:
    lines = LineFile(tmp_path / "a.txt")
    assert not (tmp_path / "a.txt").exists(), "no file before the first line"
    for word in ("eins", "zwölf"):
        lines.add(word)
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "eins\nzwölf\n"
    lines.close()
    lines.add("again")
    lines.close()
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "eins\nzwölf\nagain\n"


def test_lines_refused_by_a_full_disk_are_written_later_complete_and_in_order(tmp_path: Path) -> None:
    lines = LineFile(tmp_path / "a.txt")
    with file_limit(10):
        lines.add("123456")
        for word in ("abcdef", "ghijkl"):  # three bytes of the first still fit
            with pytest.raises(OSError, match="File too large"):
                lines.add(word)
        with pytest.raises(OSError):
            lines.flush()
        assert (tmp_path / "a.txt").read_text() == "123456\nabc"
    lines.flush()
    assert (tmp_path / "a.txt").read_text() == "123456\nabcdef\nghijkl\n"
    lines.close()


def test_a_text_file_that_does_not_fit_is_named_and_unchanged(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.json", "old")
    with file_limit(10), pytest.raises(OSError, match="File too large") as error:
        write_atomically(tmp_path / "a.json", "a long text" * 1000)
    assert error.value.filename == str(tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_opening_a_file_is_retried(tmp_path: Path) -> None:
    lines = LineFile(tmp_path / "folder" / "a.txt")
    with pytest.raises(OSError):
        lines.add("one")
    os.mkdir(tmp_path / "folder")
    lines.add("two")
    assert (tmp_path / "folder/a.txt").read_text() == "one\ntwo\n"


def test_json_has_null_for_what_is_not_finite() -> None:
    values = {"loss": float("nan"), "rate": float("inf"), "AP": 0.5, "goal": "val/AP", "step": 3}
    assert json.loads(as_json(values)) == {"loss": None, "rate": None, "AP": 0.5, "goal": "val/AP", "step": 3}
    assert "NaN" not in as_json(values) and "Infinity" not in as_json(values, indent=1)
