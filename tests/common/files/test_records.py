"""A file or a line that is JSON but no record is named, and never ends a command with a traceback."""

import json
import os
from pathlib import Path

import pytest

from common.errors import UserError
from common.files.records import describe_lines, goal_value, keep_records, read_record, step_record

NO_RECORDS = ["", "{", "5", "null", "true", '"text"', "[1, 2]", "[[]]", "[" * 100_000, "\0", "NaN"]


@pytest.mark.parametrize("text", NO_RECORDS)
def test_a_file_without_an_object_is_one_sentence_with_its_path(text: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(text)
    with pytest.raises(
        UserError, match=r"results.json is damaged .*; delete it, and the same command writes it again."
    ):
        read_record(file)
    with pytest.raises(UserError, match=r"none.json cannot be read \(No such file or directory\); look\."):
        read_record(tmp_path / "none.json", "look")
    file.write_text('{"test/AP": 0.5}')
    assert read_record(file) == {"test/AP": 0.5}


@pytest.mark.timeout(60)
def test_a_named_pipe_is_refused_and_nothing_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="it is a named pipe and no regular file"):
        read_record(tmp_path / "pipe")
    with pytest.raises(UserError, match="it is a named pipe and no regular file"):
        keep_records(tmp_path / "pipe", lambda record: True)


@pytest.mark.parametrize(
    "line", [*NO_RECORDS, "{}", '{"step": null}', '{"step": "3"}', '{"step": 3.0}', '{"step": true}']
)
def test_only_an_object_with_a_whole_step_is_a_record_of_a_step(line: str, tmp_path: Path) -> None:
    assert step_record(line) is None
    good = [json.dumps({"step": step, "train/loss": 0.5}) for step in (1, 2, 3)]
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join([good[0], line, good[1], good[2]]) + "\n" + good[0][:9])
    remainder = keep_records(file, lambda record: record["step"] < 3)
    assert remainder.kept == 2 and remainder.invalid == [2] and [record["step"] for record in remainder.removed] == [3]
    assert file.read_text() == f"{good[0]}\n{good[1]}\n"


@pytest.mark.parametrize(
    ("results", "value"),
    [
        ({"goal": "val/AP", "val/AP": 0.5}, 0.5),
        ({"goal": "val/AP", "val/AP": "high"}, None),
        ({"goal": "val/AP", "val/AP": True}, None),
        ({"goal": ["val/AP"]}, None),
        ({}, None),
    ],
)
def test_the_value_of_the_goal_is_a_number_or_nothing(results: dict[str, object], value: float | None) -> None:
    assert goal_value(results) == value


def test_many_line_numbers_are_abbreviated() -> None:
    assert describe_lines([3]) == "line 3" and describe_lines([3, 4]) == "lines 3, 4"
    assert describe_lines([*range(1, 13)]) == "lines 1, 2, 3, 4, 5 and 7 more"
