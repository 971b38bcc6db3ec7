"""Compare runs: what differs between their configs, how far they are, and their numbers, the best by the goal first.

    python scripts/compare.py runs/detr-shapes
    python scripts/compare.py runs/sweeps/2026-01-01_12-00-00 runs/detr-shapes/best_of_all --csv table.csv
    python scripts/compare.py runs --columns optimizer.lr,val/AP,test/AP --sort test/AP --reverse

A folder is a run's, or holds runs at any depth. Numbers are those of results.json; of a run that is not finished, the
goal's best value on val so far, or where no finished run tells the goal, those of the last evaluation. Only reads.
"""

import argparse
import csv
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder, not the project's

from common.cli.jobs import STATUS_FOLDER, statuses_in
from common.config.check import did_you_mean
from common.config.diff import flatten
from common.errors import UserError
from common.files.run_folder import read_config
from common.files.table import table

PLACE = ("run_dir", "sweep_dir", "resume", "allow_changes", "trust")  # keys that say nothing on what a run is
FIRST = ("run", "state")  # columns that are always there
STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ")  # what begins each entry of train.log


class Run(NamedTuple):
    """What a run's folder tells."""

    folder: Path
    config: dict[str, Any]  # by full keys
    results: dict[str, Any]  # empty until it is finished
    evaluations: list[dict[str, Any]]  # lines of metrics.jsonl with numbers on val
    state: str

    @property
    def goal(self) -> str | None:
        """The number that picks the best, such as val/AP, once the run is finished."""
        return self.results.get("goal")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of the runs that the command line names; the exit code."""
    options = _options(arguments)
    try:
        folders, failures = find(options.folders)
        runs = [read(folder) for folder in folders]
        rows = _sorted(runs, _rows(runs), options)
        columns = _columns(rows, options.columns)
        if options.csv:
            _write_csv(options.csv, columns, rows)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    shown = [[_shown(row.get(column), column) for column in columns] for row in rows]
    print(table(f"{len(runs)} runs", [columns, *shown]))
    print("".join(f"\n{line}" for line in failures), end="\n" if failures else "")
    return 0


def find(places: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """The folders of runs in these places, and a line on each run of a sweep that failed before it left one.

    Raises UserError for a place in which there is none.
    """
    folders: dict[Path, None] = {}
    failures: list[str] = []
    for place in places:
        if not place.is_dir():
            raise UserError(f"{place}: there is no such folder; give runs' folders, or folders of runs.")
        inside = [place] if (place / "config.yaml").is_file() else [file.parent for file in place.rglob("config.yaml")]
        notes = [pair for inner in place.rglob(STATUS_FOLDER) for pair in statuses_in(inner.parent).items()]
        lost = [f"{folder}: {note.why}" for folder, note in notes if not (folder / "config.yaml").exists()]
        if not inside and not lost:
            raise UserError(f"{place}: neither it nor a folder in it holds a run (a config.yaml).")
        folders |= dict.fromkeys(sorted(inside))
        failures += sorted(lost)
    return list(folders), failures


def read(folder: Path) -> Run:
    """What lies in a run's folder; raises UserError for a file that cannot be read."""
    config = flatten(read_config(folder / "config.yaml"))
    results = _json(folder / "results.json", (folder / "results.json").read_text("utf-8")) if _has(folder) else {}
    lines = _metrics(folder / "metrics.jsonl")
    evaluations = [line for line in lines if any(name.startswith("val/") for name in line)]
    return Run(folder, config, results, evaluations, _state(folder, config, lines))


def _has(folder: Path) -> bool:
    return (folder / "results.json").is_file()


def _json(file: Path, text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}); resume=auto makes it again once it is deleted.") from error


def _metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; the last may be half a line, being written or torn by a kill."""
    text = file.read_text("utf-8", "replace") if file.is_file() else ""
    return [_json(file, line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _state(folder: Path, config: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    """Done; or at which step, with what ended the run where that is known."""
    if _has(folder):
        return "done"
    steps = config.get("trainer.steps")
    step = max((line.get("step", 0) for line in lines), default=0)
    at = f"at step {step}" + (f" of {steps}" if steps else "")
    note = statuses_in(folder.parent).get(folder)
    why = f"{note.state}: {note.why}" if note else _end_of_log(folder / "train.log")
    return f"{at}; {why}" if why else at


def _end_of_log(file: Path) -> str:
    """What ended a run, if its log ends with a traceback or a stop: the last line of that."""
    lines = file.read_text("utf-8", "replace").splitlines() if file.is_file() else []
    last = next((number for number in reversed(range(len(lines))) if STAMP.match(lines[number])), len(lines))
    entry = [line for line in lines[last:] if line.strip()]
    said = STAMP.sub("", entry[-1]).removeprefix("common.errors.Stopped: ") if entry else ""
    if said.startswith("Stopped by"):
        return said.rstrip(".")
    return f"failed: {said}" if entry and "Traceback (most recent call last)" in entry[0] else ""


def _rows(runs: list[Run]) -> list[dict[str, Any]]:
    """A row by columns for each run: its folder and state, what differs, and its numbers."""
    differing = _differing(runs)
    directions = {run.goal: run.results.get("direction") for run in runs if run.goal}
    rows = []
    for run in runs:
        row = {"run": str(run.folder), "state": run.state}
        row |= {key: run.config[key] for key in differing if key in run.config}
        goal = run.goal or _goal_of(run, directions)
        numbers = run.results or _so_far(run, goal, directions)
        values = {name: value for name, value in numbers.items() if name not in ("goal", "direction")}
        row |= {goal: values.pop(goal)} if goal in values else {}  # type: ignore[misc]
        rows.append(row | values)
    return rows


def _differing(runs: list[Run]) -> list[str]:
    """The keys whose values are not the same in all runs; of sections of other classes, the class alone."""
    missing = object()

    def differs(key: str) -> bool:
        return any(run.config.get(key, missing) != runs[0].config.get(key, missing) for run in runs)

    keys = list(dict.fromkeys(key for run in runs for key in run.config if key not in PLACE))
    differing = [key for key in keys if differs(key)]
    others = {key.removesuffix("_target_") for key in differing if re.fullmatch(r"\w+\._target_", key)}
    return [key for key in differing if key.endswith("._target_") or not key.startswith(tuple(others))]


def _goal_of(run: Run, goals: dict[str | None, Any]) -> str | None:
    """The goal of a run that is not finished, from those of finished ones."""
    measured = {name for line in run.evaluations for name in line}
    return next((goal for goal in goals if goal in measured), None)


def _so_far(run: Run, goal: str | None, directions: dict[str | None, Any]) -> dict[str, Any]:
    """The goal's best value until now; without a goal, the numbers of the last evaluation."""
    if goal is None:
        return {name: value for name, value in (run.evaluations or [{}])[-1].items() if name.startswith("val/")}
    values = [line[goal] for line in run.evaluations if line.get(goal) is not None]
    better = min if directions[goal] == "minimize" else max
    return {goal: better(values)} if values else {}


def _sorted(runs: list[Run], rows: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """By the goal, the best first, runs of one goal together; or by a column, upwards."""
    if not options.sort:
        directions = {run.goal: run.results["direction"] for run in runs if run.goal and "direction" in run.results}

        def rank(row: dict[str, Any]) -> tuple[int, float]:
            for number, (goal, direction) in enumerate(directions.items()):
                value = row.get(str(goal))
                if value is not None and math.isfinite(value):
                    return number, value if direction == "minimize" else -value
            return len(directions), 0.0

        ordered = sorted(rows, key=rank)
    else:
        known = {column for row in rows for column in row}
        if options.sort not in known:
            raise UserError(f"--sort {options.sort} is no column of these runs{did_you_mean(options.sort, known)}")
        ordered = sorted(rows, key=lambda row: _order(row.get(options.sort)))
    return ordered[::-1] if options.reverse else ordered


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers by size, then words, then nothing at all."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return 0, value, ""
    return (2, 0.0, "") if value is None else (1, 0.0, str(value))


def _columns(rows: list[dict[str, Any]], chosen: str | None) -> list[str]:
    """The columns of the table: all, keys before numbers, or those that were chosen."""
    known = list(dict.fromkeys(column for row in rows for column in row))
    if chosen is None:
        return sorted(known, key=lambda column: "/" in column)  # sorting keeps the order of equals
    wanted = [column.strip() for column in chosen.split(",")]
    for column in wanted:
        if column not in known:
            raise UserError(f"--columns {column} is no column of these runs{did_you_mean(column, known)}")
    return [*FIRST, *(column for column in wanted if column not in FIRST)]


def _shown(value: Any, column: str) -> Any:
    """A cell: numbers of a run as numbers, what a config says as it says it."""
    if "/" in column and (value is None or isinstance(value, int | float)):
        return float("nan") if value is None else float(value)
    return "-" if value is None else str(value)


def _write_csv(file: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    try:
        with open(file, "w", encoding="utf-8", newline="") as opened:
            csv.writer(opened).writerows([columns, *([row.get(column, "") for column in columns] for row in rows)])
    except OSError as error:
        raise UserError(f"--csv {file} cannot be written ({error.strerror}); name another file.") from error


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folders", nargs="+", type=Path, help="runs' folders, or folders that hold runs")
    parser.add_argument("--columns", help="what to show beside run and state: keys and numbers, separated by commas")
    parser.add_argument("--sort", metavar="COLUMN", help="by this key or number, upwards, and not by the goal")
    parser.add_argument("--reverse", action="store_true", help="the last one first")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table to a file as well")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
