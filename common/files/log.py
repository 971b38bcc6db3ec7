"""Everything a run writes for people and scripts: console, train.log, metrics.jsonl, timing.jsonl and TensorBoard."""

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from tqdm import tqdm

from common.errors import Stopped, UserError
from common.files.lines import LineFile, write_atomically
from common.files.table import table

MAX_CONSOLE_NUMBERS = 6  # numbers of a training line on the console; the files hold all


class Log:
    """The log of one run, used as a context manager; on other ranks than the main one every method is silent.

    metrics.jsonl holds no wall-clock values, so that two runs of one seed write the same bytes; those go to
    timing.jsonl.
    """

    def __init__(self, folder: Path | None, main: bool):
        """Log to `folder`, made when missing, and to the console; None means the console alone."""
        self.main = main
        self.folder = folder if main else None
        self.terminal = _is_terminal()
        self._bar: Any = None
        self._progress: Progress | None = None
        self._files: dict[str, LineFile] = {}
        self._refused: set[str] = set()  # what could not be written, each said once
        self._board: Any = None
        self._purge: int | None = None
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Log":
        """Log until the block ends."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Write what ended the block to train.log, a traceback unless it is meant for the user, and close all files."""
        if isinstance(error, UserError | Stopped | SystemExit):
            stopped = isinstance(error.__context__, Stopped)  # by which another's handler left, as submitit's does
            self._append("train.log", str(error.__context__ if stopped else error))
        elif error is not None:
            self._append("train.log", "".join(traceback.format_exception(kind, error, at)).rstrip())
        self.close()

    def truncate_after(self, step: int, evaluated: bool = True) -> bool:
        """Forget what was logged after `step`, and half a line that a kill left; call it before anything is logged.

        `evaluated=False`: the evaluation of that very step comes again, so its lines go too; whether there were any.
        """
        assert self._board is None and "metrics.jsonl" not in self._files
        self._purge = step + 1
        gone = False
        for name in ("metrics.jsonl", "timing.jsonl"):
            if self.folder and (self.folder / name).exists():
                gone |= _cut(self.folder / name, step, evaluated)
        return gone

    def has_evaluations(self) -> bool:
        """Whether metrics.jsonl tells of an evaluation, which a checkpoint always comes before."""
        path = self.folder / "metrics.jsonl" if self.folder else None
        if path is None or not path.exists():
            return False
        return any('"val/' in line for line in path.read_text("utf-8", "replace").splitlines())

    def info(self, text: str) -> None:
        """One or more lines on the console and in train.log."""
        if self.main:
            if self._bar is not None:
                tqdm.write(text, file=sys.stdout)
            else:
                print(text, flush=True)
            self._append("train.log", text)

    def warning(self, text: str) -> None:
        """A sentence that the user should not miss."""
        self.info(f"Warning: {text}")

    def table(self, title: str, rows: Sequence[Sequence[Any]]) -> None:
        """Say `rows`, the first of them the header, under a title."""
        self.info(table(title, rows))

    def numbers(self, step: int, numbers: Mapping[str, float], timing: Mapping[str, float] | None = None) -> None:
        """Log what was measured at `step`: keys such as train/loss or val/AP; what is not finite becomes null.

        `timing` holds what depends on the clock (images/s). Training numbers move with the bar in a terminal and
        are a line elsewhere; all other numbers are always a line.
        """
        if not self.main:
            return
        timing = dict(timing or {})
        trains = all(name.startswith("train/") for name in numbers)
        shown = {
            name.removeprefix("train/"): value
            for name, value in [*numbers.items()][: MAX_CONSOLE_NUMBERS if trains else None]
        }
        words = ", ".join(f"{name} {_short(value)}" for name, value in (shown | timing).items())
        if trains and self._bar is not None:
            self._bar.set_postfix_str(words, refresh=False)
            self._append("train.log", f"step {step}: {words}")
        else:
            self.info(f"step {step}{self._progress.left() if self._progress and trains else ''}: {words}")
        self._append("metrics.jsonl", _json({"step": step, **numbers}))
        if timing:
            self._append("timing.jsonl", _json({"step": step, "time": time.time(), **timing}))
        if self.folder:
            named = {**numbers, **{f"timing/{name}": value for name, value in timing.items()}}
            finite = {name: value for name, value in named.items() if math.isfinite(value)}
            self._to_board(lambda board: [board.add_scalar(name, value, step) for name, value in finite.items()])

    def pictures(self, name: str, images: Tensor | None, step: int) -> None:
        """Show uint8 (B, 3, H, W) images side by side in TensorBoard."""
        if self.folder and images is not None:
            self._to_board(lambda board: board.add_images(name, images, step))

    @contextmanager
    def progress(self, steps: int, start: int = 0) -> Iterator["Progress"]:
        """A bar with the time left while inside, in a terminal; elsewhere only the time left in each line."""
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
        """Bring all that was logged to the disk; called before a checkpoint is written, which promises those lines.

        Raises OSError when that cannot be; the lines wait in memory then.
        """
        for lines in self._files.values():
            lines.flush()
        self._refused.clear()
        if self._board is not None:
            self._to_board(lambda board: board.flush())

    def close(self) -> None:
        """Close all files; logging again opens them again."""
        for lines in self._files.values():
            with suppress(OSError):  # said when it first happened
                lines.close()
        if self._board is not None:
            self._to_board(lambda board: board.close())
        self._files, self._board = {}, None

    def _append(self, name: str, line: str) -> None:
        if self.folder is None:
            return
        stamp = time.strftime("%Y-%m-%d %H:%M:%S  ") if name == "train.log" else ""
        lines = self._files.setdefault(name, LineFile(self.folder / name))
        try:
            lines.add(f"{stamp}{line}")
        except OSError as error:
            self._refuse(name, f"{lines.path} cannot be written ({error.strerror}); its lines wait.")

    def _to_board(self, write: Callable[[Any], Any]) -> None:
        """TensorBoard's files are only for looking at: what they cannot take, as on a full disk, is left out."""
        try:
            if self._board is None and "events" not in self._refused:  # tried again after the next flush
                from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed without a folder

                self._board, self._purge = SummaryWriter(str(self.folder), purge_step=self._purge), None
            if self._board is not None:
                write(self._board)
        except OSError as error:
            self._board = None
            self._refuse("events", f"TensorBoard's events cannot be written ({error.strerror}) and are left out.")

    def _refuse(self, name: str, sentence: str) -> None:
        if name not in self._refused:
            self._refused.add(name)
            print(f"Warning: {sentence}", file=sys.stderr, flush=True)


class Progress:
    """Where a run stands; the time left is counted from the first step's end, for that one may hold a compilation."""

    def __init__(self, steps: int, start: int, bar: Any):
        """After `start` of `steps`; `bar` is tqdm's or None."""
        self.steps, self.step, self._bar = steps, start, bar
        self._first: tuple[int, float] | None = None

    def advance(self, step: int) -> None:
        """`step` steps are done."""
        if self._bar is not None:
            self._bar.update(step - self.step)
        self.step = step
        self._first = self._first or (step, time.monotonic())

    def left(self) -> str:
        """What follows the step's number in a line: of how many, and the time left as [hours:]minutes:seconds."""
        done = self.step - self._first[0] if self._first else 0
        if not self._first or not done:
            return f" of {self.steps}"
        seconds = (time.monotonic() - self._first[1]) / done * (self.steps - self.step)
        return f" of {self.steps} ({tqdm.format_interval(seconds)} left)"


def _is_terminal() -> bool:
    """Whether a bar would be seen; some containers' terminals claim to have no columns, and tqdm then draws none."""
    both = sys.stdout.isatty() and sys.stderr.isatty()
    return both and os.get_terminal_size(sys.stderr.fileno()).columns > 0


def _short(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def _json(numbers: Mapping[str, float]) -> str:
    plain = {name: value if isinstance(value, int) else float(value) for name, value in numbers.items()}
    return json.dumps({name: value if math.isfinite(value) else None for name, value in plain.items()})


def _cut(path: Path, step: int, evaluated: bool) -> bool:
    """Whether lines of an evaluation at that very step went."""
    gone = False

    def stays(line: str) -> bool:
        try:
            record = json.loads(line)
        except ValueError:
            return False  # torn by a kill
        trains = path.name == "timing.jsonl" or any(name.startswith("train/") for name in record)
        nonlocal gone
        gone |= record["step"] == step and not trains and not evaluated
        return record["step"] < step or (record["step"] == step and (evaluated or trains))

    with open(path, encoding="utf-8", errors="replace") as file:
        kept = [line for line in file if line.endswith("\n") and stays(line)]
    write_atomically(path, "".join(kept))
    return gone
