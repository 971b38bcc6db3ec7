"""Print tables that compare runs: the config keys in which the runs differ, their states and metrics, best run first.

    python scripts/compare.py runs/detr-shapes
    python scripts/compare.py runs/sweeps/2026-01-01_12-00-00 runs/detr-shapes/best_of_all --csv table.csv
    python scripts/compare.py runs --columns optimizer.lr,val/AP,test/AP --sort test/AP --reverse

Each argument is a run's folder, or a folder that contains runs at any depth. Runs are sorted by their goal, unless
--sort names a column. The goal is the metric that selects the best checkpoint, such as val/AP. The metrics of a
finished run come from its results.json. For an unfinished run, the table shows the best value so far of the goal of the
finished runs. If no finished run has a goal that the unfinished run measures, the table shows the val metrics of its
last evaluation. --csv also writes the table to a file.

Each task has its own table. Runs whose configs differ only in the seed form a group; keys that do not change results,
such as run_dir, are not compared. If a group has several runs, another table shows the mean and the sample standard
deviation (divisor n - 1) over the finished runs of each group. A table that is wider than the terminal is split into
several tables. The environment variable COLUMNS overrides the width of the terminal. If there is neither a terminal nor
COLUMNS, lines have at most 120 characters.

--by-length adds tables of the BLEU and exact match of translators by the length of the source, from the runs'
predictions/scores.json. --length-picture FILE draws them as an SVG file.
"""

import argparse
import csv
import io
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Python adds only the script's own folder

from common.cli import start
from common.cli.jobs import STATUS_FOLDER, statuses_in
from common.config.check import did_you_mean
from common.config.diff import flatten
from common.errors import UserError
from common.files.records import describe_lines, read_record, step_record
from common.files.run_folder import read_config
from common.files.table import tables
from common.machine import console
from scripts.comparing.lengths import SCORES, Curve, length_picture, length_table, read_curves
from scripts.comparing.seeds import Row, groups_of, means_table

IGNORED_KEYS = (
    "run_dir",
    "sweep_dir",
    "resume",
    "allow_changes",
    "trust",
    "check_memory",
    "cache_dir",
    "trainer.log",
    "trainer.workers",
    "trainer.timeout",
    "trainer.grace",
)  # these keys do not change a run's results
WIDTH = 120  # characters in a line, if there is neither a terminal nor COLUMNS
FIXED_COLUMNS = ("run", "state")  # the first columns, which are always shown
TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ")  # the start of each entry of train.log


class Run(NamedTuple):
    """The content of a run's folder."""

    folder: Path
    config: dict[str, Any]  # dotted keys -> values
    results: dict[str, Any]  # the content of results.json; empty until the run is finished
    evaluations: list[dict[str, Any]]  # the lines of metrics.jsonl that hold val metrics
    state: str  # "done", or the progress of an unfinished run and, if it is known, why the run ended

    @property
    def task(self) -> str:
        """The name of the task's class, such as detr.tasks.detection.Detection."""
        return str(self.config.get("task._target_", "an unknown task"))

    @property
    def goal(self) -> str | None:
        """The name of the metric that selects the best checkpoint, such as val/AP; None until the run is finished."""
        return self.results.get("goal")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of the runs that the command line names; returns the exit code."""
    console.guard()
    options = _options(arguments)
    try:
        folders, failures = find_runs(options.folders)
        runs = [read_run(folder) for folder in folders]
        tasks = {task: [run for run in runs if run.task == task] for task in sorted({run.task for run in runs})}
        rows = {task: _sort(runs_of_task, _rows(runs_of_task), options) for task, runs_of_task in tasks.items()}
        _refuse_unknown_columns([row for part in rows.values() for row in part], options)
        if options.csv:
            _write_csv(options.csv, rows, options)
        curves = _curves(runs, rows) if options.by_length or options.length_picture else []
        if options.length_picture:
            _write_text(options.length_picture, length_picture(curves), "--length-picture")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    width = shutil.get_terminal_size((WIDTH, 0)).columns
    parts = [part for task in tasks for part in _tables(task, tasks[task], rows[task], options, width)]
    if options.by_length:
        unit = curves[0].unit
        parts += [
            tables(f"test/{score} by {unit} of the source", length_table(curves, score), width) for score in SCORES
        ]
    notes = ["\n".join(part for line in failures for part in textwrap.wrap(line, width))]
    print("\n\n".join(filter(None, parts + notes)))
    return 0


def _tables(task: str, runs: list[Run], rows: list[Row], options: argparse.Namespace, width: int) -> list[str]:
    """Format the table of one task's runs and, if some runs differ only in the seed, the table of means over seeds."""
    columns = _columns(rows, options.columns)
    cells = [[_cell(row.get(column), column) for column in columns] for row in rows]
    parts = [tables(f"{len(runs)} {'run' if len(runs) == 1 else 'runs'} of {task}", [columns, *cells], width)]
    configs = {str(run.folder): {k: v for k, v in run.config.items() if k not in IGNORED_KEYS} for run in runs}
    groups = groups_of(rows, [configs[row["run"]] for row in rows])
    if any(len(group.rows) > 1 for group in groups):
        goal, direction = next(((run.goal, run.results.get("direction")) for run in runs if run.goal), ("", None))
        if goal and not options.sort:
            sign = 1 if direction == "minimize" else -1
            groups.sort(key=lambda group: math.inf if (mean := group.mean(goal)) is None else sign * mean)
        parts.append(tables("mean ± standard deviation over seeds", means_table(groups, columns), width))
    return parts


def _curves(runs: list[Run], rows: dict[str, list[Row]]) -> list[Curve]:
    """Read the scores by source length of all runs, in the order of the tables."""
    classes = {str(run.folder): str(run.config.get("model._target_", "-")).rpartition(".")[2] for run in runs}
    folders = [str(row["run"]) for part in rows.values() for row in part]
    return read_curves([Path(folder) for folder in folders], [classes[folder] for folder in folders])


def find_runs(paths: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """Find the folders of runs under `paths`, and the runs of sweeps that ended without a config.yaml.

    Runs without a config.yaml are found by their status files in the sweep's folder. Returns the folders of the runs
    with a config.yaml, and, for each run without one, a line of text that says why it ended. Raises UserError for a
    path that is not a folder, or that contains no run of these two kinds.
    """
    folders: dict[Path, None] = {}
    failures: list[str] = []
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: there is no such folder; give runs' folders, or folders of runs.")
        runs = [path] if (path / "config.yaml").is_file() else [file.parent for file in path.rglob("config.yaml")]
        sweeps = [status_folder.parent for status_folder in path.rglob(STATUS_FOLDER)]
        statuses = [pair for sweep in sweeps for pair in statuses_in(sweep).items()]
        failed = [f"{folder}: {status.why}" for folder, status in statuses if not (folder / "config.yaml").exists()]
        if not runs and not failed:
            raise UserError(f"{path}: neither it nor a folder in it holds a run (a config.yaml).")
        folders |= dict.fromkeys(sorted(runs))
        failures += sorted(failed)
    return list(folders), failures


def read_run(folder: Path) -> Run:
    """Read a run's folder; raises UserError for a file that cannot be read."""
    config, file = flatten(read_config(folder / "config.yaml")), folder / "results.json"
    results = read_record(file, "delete it, and resume=auto writes it again") if file.is_file() else {}
    lines = _read_metrics(folder / "metrics.jsonl")
    evaluations = [line for line in lines if any(name.startswith("val/") for name in line)]
    return Run(folder, config, results, evaluations, _state(folder, config, lines))


def _is_finished(folder: Path) -> bool:
    return (folder / "results.json").is_file()


def _read_metrics(file: Path) -> list[dict[str, Any]]:
    """Read the records in a metrics.jsonl; returns an empty list if there is no such file.

    The last line is ignored if it is incomplete because the run was killed or is still writing it. Raises UserError if
    a complete line is not a record.
    """
    text = file.read_text("utf-8", "replace") if file.is_file() else ""
    records = [step_record(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    if invalid := [number for number, record in enumerate(records, 1) if record is None]:
        raise UserError(f"{file} is damaged ({describe_lines(invalid)}: no record); resume the run, or delete them.")
    return [record for record in records if record is not None]


def _state(folder: Path, config: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    """Describe a run's state: "done", or the last logged step and, if it is known, why the run ended."""
    if _is_finished(folder):
        return "done"
    steps = config.get("trainer.steps")
    step = max((line.get("step", 0) for line in lines), default=0)
    progress = f"at step {step}" + (f" of {steps}" if steps else "")
    status = statuses_in(folder.parent).get(folder)
    reason = f"{status.state}: {status.why}" if status else _end_of_log(folder / "train.log")
    return f"{progress}; {reason}" if reason else progress


def _end_of_log(file: Path) -> str:
    """Return the reason why a run ended, from the last entry of its log.

    If the last line of the entry says that a signal stopped the run, this line is the reason. Otherwise, if the entry
    is a traceback, the reason is "failed: " followed by the last line. In all other cases, the reason is an empty
    string.
    """
    lines = file.read_text("utf-8", "replace").splitlines() if file.is_file() else []
    start = next((number for number in reversed(range(len(lines))) if TIMESTAMP.match(lines[number])), len(lines))
    entry = [line for line in lines[start:] if line.strip()]
    message = TIMESTAMP.sub("", entry[-1]).removeprefix("common.errors.Stopped: ") if entry else ""
    if message.startswith("Stopped by"):
        return message.rstrip(".")
    return f"failed: {message}" if entry and "Traceback (most recent call last)" in entry[0] else ""


def _rows(runs: list[Run]) -> list[Row]:
    """Make a dict (column -> value) for each run: folder, state, the config keys in which runs differ, and metrics."""
    differing = _differing_keys(runs)
    directions: dict[str | None, Any] = {run.goal: run.results.get("direction") for run in runs if run.goal}
    rows = []
    for run in runs:
        row = {"run": str(run.folder), "state": run.state}
        row |= {key: run.config[key] for key in differing if key in run.config}
        goal = run.goal or _goal_of(run, directions)
        results = run.results or _results_so_far(run, goal, directions)
        metrics = {name: value for name, value in results.items() if name not in ("goal", "direction")}
        row |= {goal: metrics.pop(goal)} if goal in metrics else {}
        rows.append(row | metrics)
    return rows


def _differing_keys(runs: list[Run]) -> list[str]:
    """Return the config keys whose values differ between runs.

    If the class of a top-level section differs (for example model._target_), the other keys of this section are left
    out, except keys that name a class.
    """
    missing = object()

    def differs(key: str) -> bool:
        return any(run.config.get(key, missing) != runs[0].config.get(key, missing) for run in runs)

    keys = list(dict.fromkeys(key for run in runs for key in run.config if key not in IGNORED_KEYS))
    differing = [key for key in keys if differs(key)]
    sections = {key.removesuffix("_target_") for key in differing if re.fullmatch(r"\w+\._target_", key)}
    return [key for key in differing if key.endswith("._target_") or not key.startswith(tuple(sections))]


def _goal_of(run: Run, goals: dict[str | None, Any]) -> str | None:
    """Return the goal of an unfinished run: the first of `goals` that its evaluations contain.

    The keys of `goals` are the goals of the finished runs. Returns None if the evaluations contain none of them.
    """
    measured = {name for line in run.evaluations for name in line}
    return next((goal for goal in goals if goal in measured), None)


def _results_so_far(run: Run, goal: str | None, directions: dict[str | None, Any]) -> dict[str, Any]:
    """Return the results of an unfinished run so far: metric -> value.

    The result holds the best value of `goal` or, if `goal` is None, all val metrics of the last evaluation.
    `directions` maps each goal to "minimize" or "maximize". The result is empty if there is no value yet.
    """
    if goal is None:
        return {name: value for name, value in (run.evaluations or [{}])[-1].items() if name.startswith("val/")}
    values = [line[goal] for line in run.evaluations if line.get(goal) is not None]
    better = min if directions[goal] == "minimize" else max
    return {goal: better(values)} if values else {}


def _sort(runs: list[Run], rows: list[Row], options: argparse.Namespace) -> list[Row]:
    """Sort the rows by the goal, best first; with --sort, sort them by the named column in ascending order.

    Without --sort, runs with the same goal stand together, and runs without a finite value of their goal come last.
    --reverse then reverses the whole order.
    """
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
        ordered = sorted(rows, key=lambda row: _sort_key(row.get(options.sort)))
    return ordered[::-1] if options.reverse else ordered


def _sort_key(value: Any) -> tuple[int, float, str]:
    """Return a key that sorts numbers first, in ascending order, then text, then None."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return 0, value, ""
    return (2, 0.0, "") if value is None else (1, 0.0, str(value))


def _refuse_unknown_columns(rows: list[Row], options: argparse.Namespace) -> None:
    """Raise UserError if --sort or --columns names a column that no row has."""
    known = {column for row in rows for column in row}
    names = [("--columns", name) for name in _names(options.columns)] + [("--sort", options.sort)] * bool(options.sort)
    for option, name in names:
        if name not in known:
            raise UserError(f"{option} {name} is not a column of these runs{did_you_mean(name, known)}")


def _columns(rows: list[Row], option: str | None) -> list[str]:
    """Return the columns of a table.

    With `option` (--columns), these are FIXED_COLUMNS and the columns of `option` that occur in `rows`. If `option` is
    None, these are all columns: FIXED_COLUMNS, then config keys, then metrics.
    """
    known = list(dict.fromkeys(column for row in rows for column in row))
    if option is None:
        return sorted(known, key=lambda column: "/" in column)
    return [*FIXED_COLUMNS, *(name for name in _names(option) if name in known and name not in FIXED_COLUMNS)]


def _names(option: str | None) -> list[str]:
    return [name.strip() for name in option.split(",")] if option else []


def _cell(value: Any, column: str) -> Any:
    """Convert a value for the printed table.

    A metric, which is a number or None in a column whose name contains a slash, becomes a float (NaN for None). Any
    other value becomes text ("-" for None).
    """
    if "/" in column and (value is None or isinstance(value, int | float)):
        return float("nan") if value is None else float(value)
    return "-" if value is None else str(value)


def _write_csv(file: Path, rows: dict[str, list[Row]], options: argparse.Namespace) -> None:
    """Write one table with the runs of all tasks to `file`.

    If there are several tasks and --columns is not given, the column `task._target_` names the task of each run.
    """
    task_of = [({"task._target_": task} if len(rows) > 1 else {}, row) for task in rows for row in rows[task]]
    complete = [row | task for task, row in task_of]
    columns = _columns(complete, options.columns)
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *([row.get(name, "") for name in columns] for row in complete)])
    _write_text(file, text.getvalue(), "--csv")


def _write_text(file: Path, text: str, option: str) -> None:
    """Write a file that a command-line option names."""
    try:
        with open(file, "w", encoding="utf-8", newline="") as opened:
            opened.write(text)
    except OSError as error:
        raise UserError(f"{option} {file} cannot be written ({error.strerror}); name another file.") from error


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folders", nargs="+", type=Path, help="runs' folders, or folders that hold runs")
    parser.add_argument("--columns", help="columns after run and state: config keys and metrics, separated by commas")
    parser.add_argument(
        "--sort", metavar="COLUMN", help="sort by this key or metric, ascending (default: by the goal, best first)"
    )
    parser.add_argument("--reverse", action="store_true", help="reverse the order")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table to this file")
    parser.add_argument("--by-length", action="store_true", help="also print translators' scores by source length")
    parser.add_argument("--length-picture", type=Path, metavar="FILE", help="draw them as an SVG file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    start.script(main)
