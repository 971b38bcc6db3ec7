"""A run's log: the console, train.log, metrics.jsonl and timing.jsonl; dispatch.py sends numbers to loggers."""

import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from tqdm import tqdm

from common.config.diff import flatten
from common.errors import Stopped, UserError
from common.files.dispatch import Dispatch
from common.files.lines import LineFile, as_json
from common.files.loggers import Description, LoggerName
from common.files.names import printable
from common.files.progress import Progress, is_terminal
from common.files.records import RECORD_FILES, Remainder, describe_lines, keep_records
from common.files.table import table
from common.machine import console
from common.machine.console import escape_controls

# Config keys that differ between machines, or between several starts of one run. They are not sent to loggers.
LOCAL_KEYS = ("run_dir", "sweep_dir", "resume", "allow_changes", "cache_dir")
MAX_CONSOLE_NUMBERS = 6  # maximum in a console line about training; metrics.jsonl holds all numbers


class Log:
    """The log of one run, to be used as a context manager. On ranks other than 0, nothing is printed or written.

    metrics.jsonl holds no values that depend on the clock, so that a repeated run can write the same bytes. Values that
    depend on the clock go to timing.jsonl.
    """

    def __init__(self, folder: Path | None, main: bool):
        """Log to the console, and to files in `folder` unless it is None; the folder is created if missing.

        `main` is whether this process is rank 0.
        """
        self.main = main
        self.folder = folder if main else None
        self.terminal = is_terminal()
        self.line_counts = dict.fromkeys(RECORD_FILES, 0)
        self._bar: Any = None
        self._progress: Progress | None = None
        self._best = ""
        self._files: dict[str, LineFile] = {}
        self._failed: set[str] = set()  # files that could not be written, to warn only once
        self._dropped: set[str] = set()  # streams of the console that could not be written, to warn only once
        self._loggers = Dispatch(self.warning)
        self._step = 0  # the last step whose lines `truncate_after` retained
        # (step, name) -> a number that `truncate_after` removed; None for each value of timing.jsonl
        self._removed: dict[tuple[int, str], float | None] = {}
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Log":
        """Install a hook for exceptions in threads (see `_report_thread`), and return this log."""
        self._thread_hook = threading.excepthook
        threading.excepthook = self._report_thread
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the exception that ended the block, if any, to train.log, and close all files.

        For Stopped, UserError and SystemExit, only the message is written; for any other exception, the traceback.
        """
        if isinstance(error, UserError | Stopped | SystemExit):
            stopped = isinstance(error.__context__, Stopped)  # submitit's handler raises SystemExit after a stop
            self._append("train.log", printable(str(error.__context__ if stopped else error)))
        elif error is not None:
            self._append("train.log", "".join(traceback.format_exception(kind, error, trace)).rstrip())
        self.close(finished=error is None)
        threading.excepthook = self._thread_hook

    def truncate_after(self, step: int, evaluated: bool = True, expected: Mapping[str, int] | None = None) -> bool:
        """Remove the lines after `step` from metrics.jsonl and timing.jsonl; call this before numbers are logged.

        An incomplete last line, left by a kill, and lines that hold no record are removed, too. With `evaluated=False`,
        the evaluation of `step` will be repeated, and its lines are removed as well. Returns whether lines of that
        evaluation were removed. `expected` is the number of lines of each file, as stored in the checkpoint of `step`
        (`line_counts`); None skips the comparison. Warns of lines that held no record, and of a file whose number of
        remaining lines is not the expected one.
        """
        assert "metrics.jsonl" not in self._files
        self._step = step
        evaluation_dropped, warnings = False, []
        for name in RECORD_FILES if self.folder else ():
            assert self.folder is not None
            path = self.folder / name
            is_timing = name == "timing.jsonl"
            remainder = _truncate(path, step, evaluated, is_timing) if path.exists() else Remainder(0, [], [])
            self.line_counts[name] = remainder.kept
            self._removed |= _numbers_of(remainder.removed, is_timing)
            evaluation_dropped |= not evaluated and any(
                record["step"] == step and not _is_training(record, is_timing) for record in remainder.removed
            )
            if remainder.invalid:
                warnings.append(f"{path} had no record on {describe_lines(remainder.invalid)}, now removed.")
            if expected is not None and remainder.kept != expected.get(name, 0):
                count = f"{remainder.kept} lines up to step {step}, and had {expected.get(name, 0)}"
                warnings.append(f"{path} has {count} when the checkpoint was written; it was changed or damaged since.")
        for warning in warnings:
            self.warning(warning)
        return evaluation_dropped

    def open_loggers(self, names: Sequence[LoggerName], config: Mapping[str, Any]) -> None:
        """Send numbers and pictures to the loggers `names` from now on; call this before the first step.

        The loggers get `config` without LOCAL_KEYS. A logger that already shows the run continues it. When the run logs
        the numbers again that `truncate_after` removed, TensorBoard gets all of them. The other loggers get only those
        of metrics.jsonl that have changed, and none of timing.jsonl.
        """
        if self.folder:
            shown = {key: value for key, value in config.items() if key not in LOCAL_KEYS}
            run = Description(self.folder, shown, flatten(shown), self._step)
            for name, location in self._loggers.open(names, run, self._removed).items():
                self.info(f"{name:<9} {location}")

    def info(self, text: str) -> None:
        """Print one or more lines to the console, and write them to train.log."""
        if self.main:
            text = escape_controls(text)  # names of classes and files may hold control characters
            if self._bar is not None:
                tqdm.write(text, file=sys.stdout)
            else:
                print(text, flush=True)
            self._append("train.log", text)
            self._report_dropped()

    def warning(self, text: str) -> None:
        """Print and log a warning."""
        self.info(f"Warning: {text}")

    def table(self, title: str, rows: Sequence[Sequence[Any]]) -> None:
        """Print and log a table with a title; the first of `rows` is the header."""
        self.info(table(title, rows))

    def numbers(self, step: int, numbers: Mapping[str, float], timing: Mapping[str, float] | None = None) -> None:
        """Log numbers of `step` under keys such as train/loss or val/AP.

        In metrics.jsonl and timing.jsonl, NaN and infinity become null. `timing` holds values that depend on the clock,
        such as samples per second. A progress bar shows the numbers of training. Without a bar, and for all other
        numbers, a line is printed.
        """
        if not self.main:
            return
        timing = dict(timing or {})
        is_training = all(name.startswith("train/") for name in numbers)
        printed = {
            name.removeprefix("train/"): value
            for name, value in [*numbers.items()][: MAX_CONSOLE_NUMBERS if is_training else None]
        }
        text = ", ".join(f"{name} {_short(value)}" for name, value in (printed | timing).items())
        if is_training and self._bar is not None:
            self._bar.set_postfix_str(", ".join(filter(None, (self._best, text))), refresh=False)
            self._append("train.log", f"step {step}: {text}")
            self._report_dropped()
        else:
            remaining = self._progress.remaining() if self._progress and is_training else ""
            best = f", {self._best}" if self._best and is_training else ""
            self.info(f"step {step}{remaining}{best}: {text}")
        self._append_record("metrics.jsonl", {"step": step, **numbers})
        if timing:
            self._append_record("timing.jsonl", {"step": step, "time": time.time(), **timing})
        if self.folder:
            self._loggers.numbers(step, {**numbers, **{f"timing/{name}": value for name, value in timing.items()}})

    def pictures(self, name: str, images: Tensor | None, step: int) -> None:
        """Show uint8 images (B, 3, H, W) in the loggers; does nothing if `images` is None."""
        if self.folder and images is not None:
            self._loggers.picture(step, name, images)

    def show_best(self, text: str) -> None:
        """Show `text`, which states the goal's best value on val so far, with all later numbers of training.

        A progress bar shows the text beside the numbers. Without a bar, each line about training contains the text.
        """
        self._best = text

    @contextmanager
    def progress(self, steps: int, start: int = 0) -> Iterator[Progress]:
        """A context with a progress bar in a terminal; `start` of `steps` steps are already done.

        Yields the `Progress`, which the caller advances. Without a terminal, lines about training show the remaining
        time.
        """
        if self.main and self.terminal:
            self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)
        self._progress = Progress(steps, start, self._bar)
        try:
            yield self._progress
        finally:
            if self._bar is not None:
                self._bar.close()
            self._bar = self._progress = None

    def flush(self) -> None:
        """Write everything logged so far to the disk; call this before writing a checkpoint.

        A power cut then loses no line of a step up to the checkpoint. Raises OSError if a file cannot be written; the
        lines of this file then stay in memory.
        """
        for lines in self._files.values():
            lines.flush()
        self._failed.clear()
        self._loggers.flush()

    def close(self, finished: bool = True) -> None:
        """Close all files and loggers; `finished` is False if a signal or an error ended the run.

        Further logging reopens the files. Of the loggers, only TensorBoard is reopened.
        """
        self._loggers.close(finished)
        for lines in self._files.values():
            with suppress(OSError):  # a warning was printed at the first failure
                lines.close()
        self._files = {}

    def _append_record(self, name: str, record: Mapping[str, float]) -> None:
        self.line_counts[name] += 1
        self._append(name, _json(record))

    def _append(self, name: str, line: str) -> None:
        if self.folder is None:
            return
        stamp = time.strftime("%Y-%m-%d %H:%M:%S  ") if name == "train.log" else ""
        lines = self._files.setdefault(name, LineFile(self.folder / name))
        try:
            lines.add(f"{stamp}{line}")
        except OSError as error:
            self._warn_once(name, f"{lines.path} cannot be written ({error.strerror}); its lines stay in memory.")

    def _report_thread(self, failure: threading.ExceptHookArgs) -> None:
        """Report an exception in a thread, except an OSError in a thread of TensorBoard.

        The next call of TensorBoard's writer raises that OSError again.
        """
        if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__module__.startswith("tensorboard")):
            self._thread_hook(failure)

    def _report_dropped(self) -> None:
        """Warn once of each console stream that cannot be written, in train.log and on standard error."""
        for stream, error in console.failures().items():
            if self.folder and stream not in self._dropped:
                self._dropped.add(stream)
                sentence = f"Warning: {stream} cannot be written ({error.strerror}); the run goes on, and logs to"
                self._append("train.log", f"{sentence} this file.")
                print(f"{sentence} {self.folder / 'train.log'}.", file=sys.stderr, flush=True)

    def _warn_once(self, name: str, sentence: str) -> None:
        if name not in self._failed:
            self._failed.add(name)
            print(f"Warning: {sentence}", file=sys.stderr, flush=True)


def _short(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def _json(numbers: Mapping[str, float]) -> str:
    converted = {name: value if isinstance(value, int) else float(value) for name, value in numbers.items()}
    return as_json(converted)


def _truncate(path: Path, step: int, evaluated: bool, is_timing: bool) -> Remainder:
    """Remove the lines after `step` from a file; if `evaluated` is False, also those of the evaluation at `step`."""
    return keep_records(
        path,
        lambda record: (
            record["step"] < step or (record["step"] == step and (evaluated or _is_training(record, is_timing)))
        ),
    )


def _is_training(record: Mapping[str, Any], is_timing: bool) -> bool:
    """Whether training, not an evaluation, has logged a record; only training writes to timing.jsonl."""
    return is_timing or any(name.startswith("train/") for name in record)


def _numbers_of(records: Sequence[Mapping[str, Any]], is_timing: bool) -> dict[tuple[int, str], float | None]:
    """The numbers in `records` by (step, name), with the names that loggers get; values of timing.jsonl become None."""
    numbers: dict[tuple[int, str], float | None] = {}
    for record in records:
        for name, value in record.items():
            key = (record["step"], f"timing/{name}" if is_timing else name)
            if value is not None:  # None stands for a number that is not finite, which was not sent to loggers
                numbers[key] = None if is_timing else value
    return numbers
