"""A run's folder: which one, whose it is, and a job in it."""

import errno
import itertools
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from common.config.check import did_you_mean
from common.config.compose import Composed
from common.config.diff import flatten, refuse_changes
from common.config.migrations import migrate_config
from common.errors import Stopped, UserError
from common.files.lines import write_atomically
from common.files.lock import NAME as LOCK_FILE
from common.files.lock import lock

Job = Callable[..., float | None]


def run_in(job: Job, config: dict[str, Any], folder: Path | None) -> float | None:
    """`job` in its folder, which no other process may use meanwhile.

    A user's mistake before the first checkpoint frees the folder: the line can be mended.
    """
    if folder is None:
        return job(config, None)
    _make(folder)
    with lock(folder):
        new = not (folder / "config.yaml").exists()
        _claim(folder, config)
        try:
            reached = job(config, folder)
        except UserError:
            if new and not any((folder / "checkpoints").glob("*")):
                _free(folder)
            raise
        except Stopped:
            write_atomically(folder / "config.yaml", config_text(config))
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            how = "mend that, and the same line with resume=auto goes on"
            raise UserError(f"{error.filename or folder} cannot be written ({error.strerror}); {how}.") from error
        write_atomically(folder / "config.yaml", config_text(config))  # with the changes that allow_changes permitted
        return reached


def _free(folder: Path) -> None:
    (folder / "config.yaml").unlink(missing_ok=True)
    if not {path.name for path in folder.iterdir()} - {LOCK_FILE}:
        shutil.rmtree(folder)


def choose(composed: Composed) -> Path:
    """The folder that the command line names, or a new one named by what runs and when; raises UserError."""
    config = composed.config
    if config["run_dir"]:
        return Path(config["run_dir"])
    if config["resume"]:
        raise UserError("resume=auto needs run_dir=FOLDER, which says what to go on with.")
    parts = [composed.choices.get(part) or _kind(config[part]) for part in ("model", "data")]
    return create_timestamped(Path("runs", re.sub(r"[^\w.-]+", "_", "-".join(parts))))


def _kind(section: dict[str, Any]) -> str:
    """A name for a part that no group chose, as in a config that a run left: detr.data.coco.Coco is coco."""
    return str(section["_target_"]).rpartition(".")[2].lower()


def create_timestamped(parent: Path) -> Path:
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


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK_FILE).touch()
    except OSError as error:
        raise UserError(f"run_dir={folder}: cannot be written ({error.strerror}); name another folder.") from error


def config_text(config: dict[str, Any]) -> str:
    """What config.yaml says of a run.

    `--config-dir FOLDER --config-name config` runs it again, elsewhere: the file does not name its own folder.
    """
    of_this_call: dict[str, Any] = {"run_dir": None, "sweep_dir": None, "resume": None, "allow_changes": []}
    return OmegaConf.to_yaml(OmegaConf.create({**config, **of_this_call}))


def _claim(folder: Path, config: dict[str, Any]) -> None:
    """Write config.yaml into a new run's folder. Raises UserError when another run lies there.

    Of a run that is there `config` takes over what trainer.precision=auto came to, whatever the device is now.
    """
    file, allowed = folder / "config.yaml", config["allow_changes"]
    _refuse_unknown(allowed, config)
    if file.exists() and not config["resume"]:
        raise UserError(f"run_dir={folder} already holds a run; add resume=auto to go on with it.")
    if file.exists():
        finished = (folder / "results.json").exists()
        before = read_config(file)
        refuse_changes(before, config, f"{folder}", [] if finished else allowed)
        if config["trainer"]["precision"] == "auto":
            config["trainer"]["precision"] = before["trainer"]["precision"]
    else:
        write_atomically(file, config_text(config))


def read_config(file: Path) -> dict[str, Any]:
    """What a run's config.yaml holds, by the keys of today; raises UserError when it is no config."""
    try:
        config = OmegaConf.to_container(OmegaConf.load(file))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{file} cannot be read ({reason}); put the run's own config there.") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} holds no config; put the run's own there.")
    return migrate_config({str(key): value for key, value in config.items()})


def _refuse_unknown(allowed: list[str], config: dict[str, Any]) -> None:
    """Raise UserError for a word in allow_changes that is neither a key nor a section."""
    keys = flatten(config)
    known = {".".join(key.split(".")[:depth]) for key in keys for depth in range(1, key.count(".") + 2)}
    for key in allowed:
        if key not in known:
            raise UserError(f"allow_changes: {key} is not a key of this config{did_you_mean(key, known)}")
