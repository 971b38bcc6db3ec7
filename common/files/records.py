"""Read and filter the records of a run, which are JSON objects.

A file holds one record (results.json), or one on each line (metrics.jsonl).
"""

import io
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from common.data.opening import open_regular
from common.errors import UserError
from common.files.lines import write_atomically

RECORD_FILES = ("metrics.jsonl", "timing.jsonl")  # files of a run with one JSON object on each line
LOGGERS_FILE = "loggers.json"  # file of a run: name of a logger -> what identifies the run in it
MAX_LISTED = 5  # maximum number of line numbers in a warning


class Remainder(NamedTuple):
    """The result of `keep_records`: the number of lines that remain in the file, and the lines that were removed."""

    kept: int  # number of lines that remain
    removed: list[dict[str, Any]]  # the records for which `keeps` was false
    invalid: list[int]  # numbers (from 1) of complete lines that held no record; they are removed, too


def read_record(path: Path, remedy: str = "delete it, and the same command writes it again") -> dict[str, Any]:
    """Read a file that holds one JSON object; raises UserError if it cannot be read or holds anything else.

    `remedy` says what the user can do; it is the end of the error's sentence.
    """
    try:
        with open_regular(path) as file:
            content = json.loads(file.read().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {remedy}.") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(f"{path} is damaged (it holds a {kind} and not an object of names and values); {remedy}.")
    return content


def goal_value(results: dict[str, Any]) -> float | None:
    """The best value on val of the run's goal, the metric that selects the best checkpoint.

    `results` is the content of a results.json. Returns None if the value is missing or is not a number.
    """
    value = results.get(str(results.get("goal")))
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def step_record(line: str) -> dict[str, Any] | None:
    """The record on a line, which is a JSON object with an integer under the key "step"; None for any other text."""
    record = None
    with suppress(ValueError, RecursionError):
        record = json.loads(line)
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def keep_records(path: Path, keeps: Callable[[dict[str, Any]], bool]) -> Remainder:
    """Rewrite a file of lines with only the records for which `keeps` is true.

    Lines without a record are removed, and so is an incomplete last line, which a kill can leave. Raises UserError if
    the file cannot be read.
    """
    kept, removed, invalid = [], [], []
    try:
        opened = open_regular(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); put the run's own file there.") from error
    with io.TextIOWrapper(opened, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            record = step_record(line)
            if not line.endswith("\n"):
                continue
            if record is None:
                invalid.append(number)
            elif keeps(record):
                kept.append(line)
            else:
                removed.append(record)
    write_atomically(path, "".join(kept))
    return Remainder(len(kept), removed, invalid)


def describe_lines(numbers: list[int]) -> str:
    """Format line numbers for a sentence: "line 3", or "lines 1, 2, 3, 4, 5 and 7 more"."""
    listed = ", ".join(map(str, numbers[:MAX_LISTED]))
    more = f" and {len(numbers) - MAX_LISTED} more" if len(numbers) > MAX_LISTED else ""
    return f"line{'s' if len(numbers) > 1 else ''} {listed}{more}"
