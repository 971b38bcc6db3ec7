"""The checkpoints of one run: which are kept, which is the best, and from which the run resumes."""

import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError
from common.files.checkpoint import NewerFormatError, is_ours, load, save
from common.files.lines import sync_folder

MIN_CHECKPOINTS = 2  # a run keeps at least this many, so that it can be resumed if one file is damaged
LoadedCheckpoint = tuple[Path, dict[str, Any]]  # the checkpoint's file and content
Check = Callable[[Path, dict[str, Any]], None]  # raises UserError if a file's content does not belong to the run


class _Skipped(NamedTuple):
    """A file that cannot be used, and the reason; `undamaged` is True if the file was loaded and `check` refused it."""

    file: Path
    error: UserError
    undamaged: bool


def _accept(path: Path, content: dict[str, Any]) -> None:
    """The default check, which accepts every checkpoint."""


class CheckpointFolder:
    """The folder of a run's checkpoints: step_00001000.pt and so on, best.pt, average.pt, and stop_00001037.pt.

    average.pt exists only if the last checkpoints were averaged. stop_00001037.pt is written when a signal stops the
    run at step 1037 and no regular checkpoint is due at this step. Its name differs from the others, so that a run
    which was stopped and resumed has the same files step_*.pt as a run which was not stopped.
    """

    def __init__(self, path: Path, writes: bool = True, keep: int = MIN_CHECKPOINTS):
        """Create the folder, and remove temporary files that were left when a process was killed while saving.

        With `writes=False` (on ranks above 0), nothing in the folder is changed. `keep` is the number of latest
        checkpoints to keep; values below MIN_CHECKPOINTS are raised to it.
        """
        self.path, self.writes, self.keep = Path(path), writes, max(keep, MIN_CHECKPOINTS)
        self._of_other_runs: list[Path] = []  # undamaged files that `latest` skipped
        if writes:
            self.path.mkdir(parents=True, exist_ok=True)
            for leftover in self.path.glob(".*.tmp"):
                leftover.unlink()

    def save(self, step: int, content: dict[str, Any], keep_steps: Collection[int] = ()) -> Path:
        """Write the checkpoint of `step` and, once it is on the disk, remove checkpoints that are no longer kept.

        The latest `keep` checkpoints and those of the steps in `keep_steps` are kept. All files stop_*.pt are removed.
        Returns the checkpoint's path. Raises OSError if the checkpoint cannot be written; older checkpoints are then
        untouched.
        """
        path = self._file(step)
        if self.writes:
            self._write(path, content)
            # Files of later steps do not count as latest: they are damaged, and resuming skipped them.
            last = [saved for saved in self.steps() if saved <= step][-self.keep :]
            with suppress(OSError):  # the checkpoint itself is written; the next save tries to remove files again
                for obsolete in set(self.steps()) - {*last, *keep_steps}:
                    self._file(obsolete).unlink()
                self._remove_stops()
        return path

    def save_stop(self, step: int, content: dict[str, Any]) -> Path:
        """Write the checkpoint of a run that stops at `step`, and remove only the checkpoints of earlier stops.

        Returns the checkpoint's path. Raises OSError if the checkpoint cannot be written.
        """
        path = self._file(step, "stop")
        if self.writes:
            self._write(path, content)
            with suppress(OSError):
                self._remove_stops(except_file=path)
        return path

    def mark_best(self, step: int) -> None:
        """Replace best.pt by a hard link to the checkpoint of `step`, or by a copy on file systems without links.

        Raises OSError if that fails. The earlier best.pt is then removed, because it is no longer the best checkpoint.
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
            temporary.unlink(missing_ok=True)  # os.replace leaves it if both are links to one file already
        sync_folder(self.path)

    def latest(self, warn: Callable[[str], None] = warnings.warn, check: Check = _accept) -> LoadedCheckpoint | None:
        """The path and content of the newest undamaged checkpoint that `check` accepts; None if there is no checkpoint.

        Later files that cannot be used are skipped, with a warning for each. If there are files but none can be used,
        raises the error of `check` for the newest undamaged one, or UserError if all are damaged. A file in the format
        of a newer version of this program is not skipped; NewerFormatError is raised.
        """
        files = [(step, kind) for kind in ("step", "stop") for step in self.steps(kind)]
        newest_first = [self._file(step, kind) for step, kind in sorted(files, reverse=True)]
        checkpoint, skipped = _first_usable(newest_first, check)
        self._of_other_runs = [item.file for item in skipped if item.undamaged]
        if checkpoint is None and self._of_other_runs:
            raise next(item.error for item in skipped if item.undamaged)
        if checkpoint is None and skipped:
            reason = f"no checkpoint in {self.path} can be used ({' '.join(str(item.error) for item in skipped)})"
            raise UserError(f"{reason}; put an undamaged one there, or start again with another run_dir.")
        for item in skipped:
            warn(f"{item.error} Resuming from {checkpoint[0].name if checkpoint else 'the start'} instead.")
        return checkpoint

    def set_aside(self) -> list[Path]:
        """Rename the undamaged files that `latest` skipped; returns their new paths.

        NAME becomes other_run_NAME. Without the new names, `save` would later delete these files.
        """
        renamed = [file.with_name(f"other_run_{file.name}") for file in self._of_other_runs if self.writes]
        for file, new in zip(self._of_other_runs, renamed, strict=False):
            os.replace(file, new)
        self._of_other_runs = []
        return renamed

    def best(
        self,
        ranked: Sequence[int] = (),
        warn: Callable[[str], None] = warnings.warn,
        check: Check = _accept,
    ) -> LoadedCheckpoint | None:
        """The path and content of best.pt or, if best.pt is not usable, of the first usable checkpoint of `ranked`.

        `ranked` are steps, best first. A checkpoint is usable if it is undamaged and `check` accepts it. Returns None
        if no file is usable. Warns of each file that is skipped. Raises NewerFormatError as `latest` does.
        """
        files = [self.path / "best.pt", *(self._file(step) for step in ranked)]
        checkpoint, skipped = _first_usable([file for file in files if file.exists()], check)
        for item in skipped:
            warn(f"{item.error} Using {checkpoint[0].name if checkpoint else 'the last checkpoint'} instead.")
        return checkpoint

    def has_best(self) -> bool:
        """Whether there is a best.pt."""
        return (self.path / "best.pt").exists()

    def was_written(self) -> bool:
        """Whether a checkpoint was ever written here, even if it no longer exists."""
        return self._marker().exists()

    def average(self) -> Path:
        """The path of average.pt, the average of the last checkpoints; the file may not exist."""
        return self.path / "average.pt"

    def last(self, count: int) -> list[Path]:
        """The `count` latest files step_*.pt, in ascending order of their steps; the files may be damaged.

        If there are fewer than `count` files, all are returned.
        """
        return [self._file(step) for step in self.steps()[-count:]]

    def steps(self, kind: str = "step") -> list[int]:
        """The steps that have a file step_*.pt, damaged or not, in ascending order.

        With kind="stop", the steps that have a file stop_*.pt.
        """
        matches = (re.fullmatch(rf"{kind}_(\d{{8,}})\.pt", path.name) for path in self.path.glob(f"{kind}_*.pt"))
        return sorted(int(match[1]) for match in matches if match)

    def _file(self, step: int, kind: str = "step") -> Path:
        return self.path / f"{kind}_{step:08d}.pt"

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        save(path, content)
        with suppress(OSError):  # the checkpoint itself is written
            self._marker().touch()

    def _marker(self) -> Path:
        return self.path.parent / ".saved"  # not in the folder of checkpoints, whose files may all be lost

    def _remove_stops(self, except_file: Path | None = None) -> None:
        for step in self.steps("stop"):
            if self._file(step, "stop") != except_file:
                self._file(step, "stop").unlink()


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        with open(target, "rb+") as copy:
            os.fsync(copy.fileno())


def _first_usable(files: Sequence[Path], check: Check) -> tuple[LoadedCheckpoint | None, list[_Skipped]]:
    """The first of `files` that is an undamaged checkpoint and passes `check`, and the files skipped before it."""
    skipped: list[_Skipped] = []
    for file in files:
        content = None
        try:
            content = load(file)
            if not is_ours(content):
                content = None
                raise UserError(f"{file} was not written by this program.")
            check(file, content)
            return (file, content), skipped
        except NewerFormatError:
            # The file is undamaged. If it were skipped, the run would resume from an earlier step, and its next `save`
            # would delete the file.
            raise
        except UserError as error:
            skipped.append(_Skipped(file, error, undamaged=content is not None))
    return None, skipped
