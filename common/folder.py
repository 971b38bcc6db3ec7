"""The checkpoints of one run: which are kept, which is the best, and which can be gone on from."""

import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.checkpoint import is_ours, load, save, sync
from common.errors import UserError

KEPT = 2  # checkpoints of a run at least; with one, a fault of the disk would cost the run


class Folder:
    """The checkpoints of one run: step_00001000.pt, the last of them, best.pt, and perhaps average.pt."""

    def __init__(self, path: Path, writes: bool = True, keep: int = KEPT):
        """Make the folder and clear what a killed save left; with `writes=False` (other ranks) only read.

        `keep` is how many of the last checkpoints stay, two at least.
        """
        self.path, self.writes, self.keep = Path(path), writes, max(keep, KEPT)
        if writes:
            self.path.mkdir(parents=True, exist_ok=True)
            for leftover in self.path.glob(".*.tmp"):
                leftover.unlink()

    def save(self, step: int, content: dict[str, Any]) -> Path:
        """Write the checkpoint of `step`; only when it is safe on the disk do older ones than the last go.

        Raises OSError when it cannot be written; nothing is lost then, and the next save starts anew.
        """
        path = self._file(step)
        if self.writes:
            save(path, content)
            # A later step than this one is a damaged file that the run was continued without.
            kept = [other for other in self.steps() if other <= step][-self.keep :]
            for other in set(self.steps()) - set(kept):
                self._file(other).unlink()
        return path

    def mark_best(self, step: int) -> None:
        """Make the checkpoint of `step` best.pt: the same file under a second name, or a copy where links are not."""
        if not self.writes:
            return
        best, temporary = self.path / "best.pt", self.path / ".best.pt.tmp"
        temporary.unlink(missing_ok=True)
        try:
            os.link(self._file(step), temporary)
        except OSError:
            shutil.copyfile(self._file(step), temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, best)
        temporary.unlink(missing_ok=True)  # still there when both were names of one file
        sync(self.path)

    def latest(self, warn: Callable[[str], None] = warnings.warn) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is whole, after one sentence to `warn` for each newer one; None without any.

        Raises UserError when there are checkpoints and all of them are damaged.
        """
        reasons: list[str] = []
        for step in reversed(self.steps()):
            try:
                content = load(self._file(step))
                if not is_ours(content):
                    raise UserError(f"{self._file(step)} was not written by this program.")
            except UserError as error:
                reasons.append(str(error))
                continue
            for reason in reasons:
                warn(f"{reason} Going on from {self._file(step).name} instead.")
            return self._file(step), content
        if reasons:
            reason = f"no checkpoint in {self.path} can be used ({' '.join(reasons)})"
            raise UserError(f"{reason}; put a whole one there, or start anew with another run_dir.")
        return None

    def best(self) -> tuple[Path, dict[str, Any]] | None:
        """best.pt, or None when no checkpoint was marked; raises UserError when it is damaged."""
        path = self.path / "best.pt"
        return (path, load(path)) if path.exists() else None

    def average(self) -> Path:
        """Where the average of the last checkpoints lies, if there is one."""
        return self.path / "average.pt"

    def last(self, count: int) -> list[Path]:
        """The files of the last `count` steps, whole or not, the newest last; fewer where there are fewer."""
        return [self._file(step) for step in self.steps()[-count:]]

    def steps(self) -> list[int]:
        """The steps that have a file, whole or not, in order."""
        found = (re.fullmatch(r"step_(\d{8,})\.pt", path.name) for path in self.path.glob("step_*.pt"))
        return sorted(int(match[1]) for match in found if match)

    def _file(self, step: int) -> Path:
        return self.path / f"step_{step:08d}.pt"
