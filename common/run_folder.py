"""A run's folder: which one, whose it is, and a job in it."""

import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from common.compose import Composed
from common.errors import UserError

Job = Callable[..., float | None]


def run(job: Job, config: dict[str, Any], folder: Path | None) -> float | None:
    """`job` in its folder. A user's mistake before the first checkpoint frees the folder: the line can be mended."""
    if folder is None:
        return job(config, None)
    _claim(folder, config)
    try:
        return job(config, folder)
    except UserError:
        if not any((folder / "checkpoints").glob("*")):
            (folder / "config.yaml").unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()
        raise


def choose(composed: Composed) -> Path:
    """The folder that the command line names, or a new one named by what runs and when; raises UserError."""
    config = composed.config
    if config["run_dir"]:
        return Path(config["run_dir"])
    if config["resume"]:
        raise UserError("resume=auto needs run_dir=FOLDER, which says what to go on with.")
    parts = [composed.choices.get(part) or _kind(config[part]) for part in ("model", "data")]
    return fresh(Path("runs", re.sub(r"[^\w.-]+", "_", "-".join(parts))))


def _kind(section: dict[str, Any]) -> str:
    """A name for a part that no group chose, as in a config that a run left: detr.coco.Coco is coco."""
    return str(section["_target_"]).rpartition(".")[2].lower()


def fresh(parent: Path) -> Path:
    """A new folder named by the time; two jobs that start in the same second get two."""
    now = time.strftime("%Y-%m-%d_%H-%M-%S")
    for number in itertools.count(1):
        folder = parent / (now if number == 1 else f"{now}_{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise AssertionError


def _claim(folder: Path, config: dict[str, Any]) -> None:
    """Write config.yaml into the run's folder; raises UserError when another run lies there.

    `--config-dir FOLDER --config-name config` runs it again, elsewhere: the file does not name its own folder.
    """
    text = OmegaConf.to_yaml(OmegaConf.create({**config, "run_dir": None, "resume": None}))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "config.yaml", "x", encoding="utf-8") as file:  # x: of two runs at once one is refused
            file.write(text)
    except OSError as error:
        if not isinstance(error, FileExistsError) or not folder.is_dir():
            raise UserError(f"run_dir={folder}: cannot be written ({error.strerror}); name another folder.") from error
        if not config["resume"]:
            raise UserError(f"run_dir={folder} already holds a run; add resume=auto to go on with it.") from None
