"""A run's log: its files, its lines on the console, and what remains of it after resuming."""

import json
import os
import select
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.errors import Stopped, UserError
from common.files.log import Log, table


def records(path: Path) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def run(log: Log, steps: range, evaluate_at: int | None = None) -> None:
    with log.progress(1000, steps.start) as progress:
        for step in steps:
            progress.advance(step + 1)
            log.numbers(step + 1, {"train/loss": 1 / (step + 1)}, {"images/s": 100.0})
            if step + 1 == evaluate_at:
                log.numbers(step + 1, {"val/AP": 0.5})


def test_metrics_hold_no_times_and_two_runs_write_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        with Log(tmp_path / name, True) as log:
            run(log, range(3), evaluate_at=2)
    text = (tmp_path / "a" / "metrics.jsonl").read_text()
    assert text == (tmp_path / "b" / "metrics.jsonl").read_text()
    assert records(tmp_path / "a" / "metrics.jsonl") == [
        {"step": 1, "train/loss": 1.0},
        {"step": 2, "train/loss": 0.5},
        {"step": 2, "val/AP": 0.5},
        {"step": 3, "train/loss": 1 / 3},
    ]
    timing = records(tmp_path / "a" / "timing.jsonl")
    assert [record["step"] for record in timing] == [1, 2, 3]
    assert all(record["time"] > 0 and record["images/s"] == 100 for record in timing)


def test_numbers_of_any_type_give_valid_json(tmp_path):
    with Log(tmp_path, True) as log:
        log.numbers(1, {"a": float("nan"), "b": float("-inf"), "c": -1.0, "d": np.float32(0.5), "e": torch.tensor(2.0)})
        log.numbers(2, {"f": 7})
    assert records(tmp_path / "metrics.jsonl") == [
        {"step": 1, "a": None, "b": None, "c": -1.0, "d": 0.5, "e": 2.0},
        {"step": 2, "f": 7},
    ]


def test_without_a_terminal_lines_show_the_remaining_time_and_no_carriage_return(tmp_path, capfd):
    with Log(tmp_path, True) as log:
        log.info("start")
        run(log, range(3))
        log.warning("look here.")
    out, err = capfd.readouterr()
    assert err == "" and "\r" not in out and "\x1b" not in out
    lines = out.splitlines()
    assert lines[0] == "start" and lines[-1] == "Warning: look here."
    assert lines[1] == "step 1 of 1000: loss 1, images/s 100"
    assert lines[3].startswith("step 3 of 1000 (00:0") and lines[3].endswith(" left): loss 0.3333, images/s 100")
    in_file = (tmp_path / "train.log").read_text().splitlines()
    assert [line[21:] for line in in_file] == lines  # after the date and time


def terminal_output(folder: Path, columns: int, monkeypatch) -> str:
    reader, writer = os.openpty()
    with open(writer, "w") as terminal:
        termios.tcsetwinsize(writer, (24, columns))
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "stderr", terminal)
        with Log(folder, True) as log:
            run(log, range(990, 1000), evaluate_at=995)
        terminal.flush()
        output = b""
        while select.select([reader], [], [], 0.2)[0]:  # the terminal passes on what was written bit by bit
            output += os.read(reader, 100_000)
    os.close(reader)
    return output.decode()


def test_a_terminal_shows_a_progress_bar_and_evaluations_as_lines_above_it(tmp_path, monkeypatch):
    output = terminal_output(tmp_path, 100, monkeypatch)
    assert "1000/1000" in output and "loss 0.001" in output and "\r" in output
    assert "step 995: val/AP 0.5\r\n" in output and "step 996" not in output
    assert "step 996: loss" in (tmp_path / "train.log").read_text()


def test_a_terminal_that_reports_no_columns_shows_lines(tmp_path, monkeypatch):
    assert "step 996 of 1000" in terminal_output(tmp_path, 0, monkeypatch)


def test_a_training_line_is_short_and_metrics_are_complete(tmp_path, capsys):
    numbers = {f"train/part{i}": float(i) for i in range(30)}
    with Log(tmp_path, True) as log:
        log.numbers(1, numbers)
    assert capsys.readouterr().out == "step 1: part0 0, part1 1, part2 2, part3 3, part4 4, part5 5\n"
    assert records(tmp_path / "metrics.jsonl") == [{"step": 1, **numbers}]


def test_other_ranks_write_nothing(tmp_path, capfd):
    with Log(tmp_path / "run", False) as log:
        run(log, range(3), evaluate_at=2)
        log.info("a")
        log.table("b", [["c"], [1]])
        log.pictures("d", torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 1)
        log.flush()
    assert not (tmp_path / "run").exists() and capfd.readouterr() == ("", "")


def test_without_a_folder_only_the_console_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Log(None, True) as log:
        log.numbers(1, {"test/AP": 0.25})
        log.truncate_after(1)
        log.flush()
    assert capsys.readouterr().out == "step 1: test/AP 0.25\n" and os.listdir(tmp_path) == []


@pytest.mark.parametrize("incomplete", ['{"step": 3, "train/lo', '{"step": 3, "train/loss": 1}'])
def test_truncation_leaves_the_lines_of_an_uninterrupted_run(incomplete, tmp_path):
    with Log(tmp_path, True) as log:
        run(log, range(10), evaluate_at=4)
    expected = (tmp_path / "metrics.jsonl").read_text()
    for name in ("metrics.jsonl", "timing.jsonl"):
        with open(tmp_path / name, "a") as file:
            file.write(incomplete)  # by a kill, with a step that would otherwise remain
    with Log(tmp_path, True) as log:
        log.warning("resuming from an older checkpoint.")
        log.truncate_after(6)
        assert [record["step"] for record in records(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 4, 5, 6]
        assert [record["step"] for record in records(tmp_path / "timing.jsonl")] == [1, 2, 3, 4, 5, 6]
        run(log, range(6, 10))
    assert (tmp_path / "metrics.jsonl").read_text() == expected
    assert not list(tmp_path.glob(".*"))


def test_a_step_to_be_evaluated_again_keeps_only_its_training_line(tmp_path):
    with Log(tmp_path, True) as log:
        run(log, range(4), evaluate_at=2)
    expected = (tmp_path / "metrics.jsonl").read_text()
    with Log(tmp_path, True) as log:
        log.truncate_after(2, evaluated=False)
        assert [list(record) for record in records(tmp_path / "metrics.jsonl")] == [["step", "train/loss"]] * 2
        log.numbers(2, {"val/AP": 0.5})
        run(log, range(2, 4))
    assert (tmp_path / "metrics.jsonl").read_text() == expected


def test_tensorboard_has_numbers_and_pictures_and_no_step_twice_after_resuming(tmp_path):
    with Log(tmp_path, True) as log:
        log.open_loggers(["tensorboard"], {})
        run(log, range(5), evaluate_at=2)
        log.numbers(3, {"val/bad": float("nan")})
        log.pictures("val", torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 2)
    with Log(tmp_path, True) as log:
        log.truncate_after(3)
        log.open_loggers(["tensorboard"], {})
        run(log, range(3, 5))
        log.close()
        run(log, range(5, 6))  # opened again, with nothing to purge
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert events.Scalars("val/AP")[0].value == 0.5 and events.Scalars("timing/images/s")[0].value == 100
    assert "val/bad" not in events.Tags()["scalars"] and events.Tags()["images"] == ["val"]


def test_a_defect_is_logged_with_its_traceback_and_a_user_error_as_one_sentence(tmp_path):
    with pytest.raises(ZeroDivisionError), Log(tmp_path, True):
        _ = 1 / 0
    text = (tmp_path / "train.log").read_text()
    assert "Traceback (most recent call last)" in text and "_ = 1 / 0" in text
    with pytest.raises(UserError), Log(tmp_path / "b", True):
        raise UserError("the file x is empty.")
    assert (tmp_path / "b" / "train.log").read_text()[21:] == "the file x is empty.\n"


def test_a_table_is_aligned():
    rows = [["class", "AP", "images"], ["a circle", 0.51234, 12], ["b", float("nan"), 3], ["all", -1.0, 15]]
    assert table("Results", rows) == "\n".join(
        [
            "Results",
            "class          AP  images",
            "--------  -------  ------",
            "a circle   0.5123      12",
            "b               -       3",
            "all       -1.0000      15",
        ]
    )


def test_a_stop_is_logged_as_one_sentence_without_a_traceback(tmp_path):
    with pytest.raises(Stopped), Log(tmp_path, True):
        raise Stopped(["SIGUSR1"], "after step 3 of 9")
    assert (tmp_path / "train.log").read_text().splitlines()[-1].endswith("Stopped by SIGUSR1 after step 3 of 9.")


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
@pytest.mark.parametrize("line", ["{}", "5", "null", '"text"', "[1]", '{"step": null}', '{"step": 2, "tra'])
def test_a_line_without_a_record_is_removed_with_a_warning_that_names_it(name, line, tmp_path, capsys):
    with Log(tmp_path, True) as log:
        run(log, range(5), evaluate_at=3)
    expected = (tmp_path / name).read_text()
    rows = expected.splitlines(keepends=True)
    (tmp_path / name).write_text("".join([*rows[:2], f"{line}\n", *rows[2:]]))
    with Log(tmp_path, True) as log:
        counts = {"metrics.jsonl": 6, "timing.jsonl": 5}
        assert not log.truncate_after(5, expected=counts) and log.line_counts == counts
    assert (tmp_path / name).read_text() == expected
    warning = f"Warning: {tmp_path / name} had no record on line 3, now removed."
    assert capsys.readouterr().out.splitlines()[-1] == warning and warning in (tmp_path / "train.log").read_text()


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
@pytest.mark.parametrize("damage", ["cut", "line", "file", "added"])
def test_lines_lost_or_added_since_the_checkpoint_are_warned_of(name, damage, tmp_path, capsys):
    with Log(tmp_path, True) as log:
        run(log, range(5))
        counts = dict(log.line_counts)
        run(log, range(5, 8))
    text = (tmp_path / name).read_text()
    rows = text.splitlines(keepends=True)
    damaged = {
        "cut": text[: len("".join(rows[:4])) + 9],
        "line": "".join(rows[1:]),
        "added": rows[0] + text,
        "file": "",
    }
    (tmp_path / name).write_text(damaged[damage]) if damage != "file" else (tmp_path / name).unlink()
    capsys.readouterr()
    with Log(tmp_path, True) as log:
        log.truncate_after(5, expected=counts)
    remaining = {"cut": 4, "line": 4, "file": 0, "added": 6}[damage]
    warnings = capsys.readouterr().out.splitlines()
    assert len(warnings) == 1 and f"{name} has {remaining} lines up to step 5, and had 5 when" in warnings[0]


def test_the_lines_of_an_undamaged_log_are_counted_without_a_warning(tmp_path, capsys):
    with Log(tmp_path, True) as log:
        run(log, range(6), evaluate_at=4)
        assert log.line_counts == {"metrics.jsonl": 7, "timing.jsonl": 6}
    capsys.readouterr()
    with Log(tmp_path, True) as log:
        log.truncate_after(4, evaluated=False, expected={"metrics.jsonl": 4, "timing.jsonl": 4})
        log.numbers(4, {"val/AP": 0.5})
        run(log, range(4, 6))
        assert log.line_counts == {"metrics.jsonl": 7, "timing.jsonl": 6}
    assert "Warning" not in capsys.readouterr().out
