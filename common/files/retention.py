"""The checkpoints of one run: which are kept, which is the best, and which can be gone on from."""

import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files.checkpoint import NewerFormatError, is_ours, load, save
from common.files.lines import sync_folder

MIN_CHECKPOINTS = 2  # checkpoints of a run at least; with one, a fault of the disk would cost the run
LoadedCheckpoint = tuple[Path, dict[str, Any]]


class CheckpointFolder:
    """step_00001000.pt and others, best.pt, perhaps average.pt, and stop_00001037.pt where a signal came.

    A stop's file is apart from the others, so that they are the same whether a run was stopped or not.
    """

    def __init__(self, path: Path, writes: bool = True, keep: int = MIN_CHECKPOINTS):
        """Make the folder and clear what a killed save left; with `writes=False` (other ranks) only read.

        `keep` is how many of the last checkpoints stay, two at least.
        """
        self.path, self.writes, self.keep = Path(path), writes, max(keep, MIN_CHECKPOINTS)
        if writes:
            self.path.mkdir(parents=True, exist_ok=True)
            for leftover in self.path.glob(".*.tmp"):
                leftover.unlink()

    def save(self, step: int, content: dict[str, Any], keep_steps: Collection[int] = ()) -> Path:
        """Write the checkpoint of `step`; only when it is safe on the disk do those go that are not kept.

        `keep_steps` are steps to keep besides the last ones. Raises OSError when the checkpoint cannot be written;
        older checkpoints are then untouched, and the next save starts again.
        """
        path = self._file(step)
        if self.writes:
            self._write(path, content)
            # A later step than this one is a damaged file that the run was continued without.
            last = [other for other in self.steps() if other <= step][-self.keep :]
            with suppress(OSError):  # the checkpoint is there; the next save tries again
                for other in set(self.steps()) - {*last, *keep_steps}:
                    self._file(other).unlink()
                self._forget_stops()
        return path

    def save_stop(self, step: int, content: dict[str, Any]) -> Path:
        """Write the checkpoint of a run that stops at `step`, between the regular ones, all of which stay."""
        path = self._file(step, "stop")
        if self.writes:
            self._write(path, content)
            with suppress(OSError):
                self._forget_stops(but=path)
        return path

    def mark_best(self, step: int) -> None:
        """Make the checkpoint of `step` best.pt: the same file under a second name, or a copy where links are not.

        Raises OSError when that cannot be; there is no best.pt then, rather than one that is not the best.
        """
        if not self.writes:
            return
        best, temporary = self.path / "best.pt", self.path / ".best.pt.tmp"
        try:
            temporary.unlink(missing_ok=True)
            _link_or_copy(self._file(step), temporary)
            os.replace(temporary, best)
        except OSError:
            best.unlink(missing_ok=True)
            raise
        finally:
            temporary.unlink(missing_ok=True)  # still there, too, when both were names of one file
        sync_folder(self.path)

    def latest(self, warn: Callable[[str], None] = warnings.warn) -> LoadedCheckpoint | None:
        """The newest checkpoint that is whole, after one sentence to `warn` for each newer one; None without any.

        Raises UserError when there are checkpoints and all of them are damaged.
        """
        files = [(step, kind) for kind in ("step", "stop") for step in self.steps(kind)]
        newest_first = [self._file(step, kind) for step, kind in sorted(files, reverse=True)]
        found, reasons = _first_whole(newest_first)
        if reasons and found is None:
            reason = f"no checkpoint in {self.path} can be used ({' '.join(reasons)})"
            raise UserError(f"{reason}; put a whole one there, or start anew with another run_dir.")
        for reason in reasons:
            warn(f"{reason} Going on from {found[0].name if found else 'the start'} instead.")
        return found

    def best(self, ranked: Sequence[int] = (), warn: Callable[[str], None] = warnings.warn) -> LoadedCheckpoint | None:
        """best.pt; where that is damaged the best of the steps in `ranked` that is not; None without any."""
        files = [self.path / "best.pt", *(self._file(step) for step in ranked)]
        found, reasons = _first_whole([file for file in files if file.exists()])
        for reason in reasons:
            warn(f"{reason} Taking {found[0].name if found else 'the last checkpoint'} instead.")
        return found

    def has_best(self) -> bool:
        """Whether there is a best.pt."""
        return (self.path / "best.pt").exists()

    def was_written(self) -> bool:
        """Whether a checkpoint was ever written here, be it there or not."""
        return self._mark().exists()

    def average(self) -> Path:
        """Where the average of the last checkpoints lies, if there is one."""
        return self.path / "average.pt"

    def last(self, count: int) -> list[Path]:
        """The files of the last `count` steps, whole or not, the newest last; fewer where there are fewer."""
        return [self._file(step) for step in self.steps()[-count:]]

    def steps(self, kind: str = "step") -> list[int]:
        """The steps that have a file, whole or not, in order; those of a stop with kind="stop"."""
        found = (re.fullmatch(rf"{kind}_(\d{{8,}})\.pt", path.name) for path in self.path.glob(f"{kind}_*.pt"))
        return sorted(int(match[1]) for match in found if match)

    def _file(self, step: int, kind: str = "step") -> Path:
        return self.path / f"{kind}_{step:08d}.pt"

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        save(path, content)
        self._mark().touch()

    def _mark(self) -> Path:
        return self.path.parent / ".saved"  # outside the folder, which may be lost as a whole

    def _forget_stops(self, but: Path | None = None) -> None:
        for step in self.steps("stop"):
            if self._file(step, "stop") != but:
                self._file(step, "stop").unlink()


def _link_or_copy(file: Path, other: Path) -> None:
    try:
        os.link(file, other)
    except OSError:
        shutil.copyfile(file, other)
        with open(other, "rb+") as copy:
            os.fsync(copy.fileno())


def _first_whole(files: Sequence[Path]) -> tuple[LoadedCheckpoint | None, list[str]]:
    """The first file that is a whole checkpoint, and what is wrong with each one before it."""
    reasons: list[str] = []
    for file in files:
        try:
            content = load(file)
            if not is_ours(content):
                raise UserError(f"{file} was not written by this program.")
            return (file, content), reasons
        except NewerFormatError:
            raise  # is whole: going on from an older one would end with its loss
        except UserError as error:
            reasons.append(str(error))
    return None, reasons
