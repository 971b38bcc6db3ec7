"""Cut a finished run back to one of its checkpoints, as if it had been killed, for tests of resuming."""

import shutil
from pathlib import Path


def cut_back(whole: Path, cut: Path, step: int) -> Path:
    """Copy a run as it was after `step`, the step of one of its checkpoints."""
    shutil.copytree(whole, cut)
    (cut / "results.json").unlink()
    for file in (cut / "checkpoints").iterdir():
        if file.name != f"step_{step:08}.pt" and file.suffix == ".pt":
            file.unlink()
    return cut
