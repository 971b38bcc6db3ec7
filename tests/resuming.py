"""Cut a finished run back to one of its checkpoints, as if it had been killed, for tests of resuming."""

import shutil
from pathlib import Path

from common.files import checkpoint


def cut_back(whole: Path, cut: Path, step: int) -> Path:
    """Copy a run as it was after `step`, the step of one of its checkpoints."""
    shutil.copytree(whole, cut)
    (cut / "results.json").unlink()
    for file in (cut / "checkpoints").iterdir():
        if file.suffix == ".pt" and not _kept(file, step):
            file.unlink()
    return cut


def _kept(file: Path, step: int) -> bool:
    """Whether a checkpoint was there after `step`, and is not an earlier one; best.pt may be earlier."""
    return file.name == f"step_{step:08}.pt" or (file.name == "best.pt" and checkpoint.load(file)["step"] <= step)
