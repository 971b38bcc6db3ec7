"""A run's folder: choose it, lock it, write the run's config into it, and run a job in it."""

import errno
import itertools
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.config.check import did_you_mean
from common.config.compose import Composed
from common.config.diff import DATA_PATHS, PRECISION, TEACHER_PATH, flatten, refuse_changes
from common.config.migrations import CHANGED_CUTS, migrate_config
from common.config.plain_text import config_yaml
from common.config.yaml_files import read_yaml
from common.errors import Stopped, UserError
from common.files.lines import write_atomically
from common.files.lock import NAME as LOCK_FILE
from common.files.lock import lock
from common.files.records import LOGGERS_FILE, RECORD_FILES

Job = Callable[..., float | None]
FOLDERS = ("checkpoints", "predictions")
WRITTEN_AT_START = ("task.json", "train.log", LOGGERS_FILE, *RECORD_FILES)
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # full, over a quota, file too large, read-only


def run_in(job: Job, config: dict[str, Any], folder: Path | None) -> float | None:
    """Run `job` in `folder`, which is locked against other processes; returns what the job returns.

    `folder` is None on ranks other than 0, which write no files. The job is called with `config` and `folder`. Raises
    UserError if the folder holds a run that `config` may not resume (see `_claim`), if another process uses the folder,
    or if a file cannot be written because the disk is full or read-only.

    If a UserError or KeyboardInterrupt ends a new run before its first checkpoint, its config.yaml is removed, so that
    a corrected command can use the folder. If the run has not logged any step either, its other files are removed, too
    (see `_release`).
    """
    if folder is None:
        return job(config, None)
    _create(folder)
    with lock(folder):
        before = {path.name for path in folder.iterdir()}
        new = "config.yaml" not in before
        try:
            with _unwritable_reported(folder):
                _refuse_odd_entries(folder)
                _claim(folder, config)
                result = job(config, folder)
                write_atomically(folder / "config.yaml", config_text(config))  # allow_changes may have changed keys
                return result
        except (UserError, KeyboardInterrupt):  # inside `StopSignals`, the first Ctrl-C raises Stopped instead
            if new and not any((folder / "checkpoints").glob("*")):
                _release(folder, before)
                if not config["run_dir"]:  # without run_dir, the parent folders may be new, too
                    _remove_empty(folder.parent, folder.parent.parent)
            raise
        except Stopped:
            with suppress(OSError):  # such as a full disk; the checkpoint also holds the config
                write_atomically(folder / "config.yaml", config_text(config))
            raise


@contextmanager
def _unwritable_reported(folder: Path) -> Iterator[None]:
    """A context that turns the OSError of a full or read-only disk into a UserError, which names the file."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        reason = f"{error.filename or 'a file'} cannot be written ({error.strerror})"
        raise UserError(f"{reason}; make room, then repeat the command with run_dir={folder} resume=auto.") from error


def holds_a_run(folder: Path) -> bool:
    """Whether `folder` is the folder of a run, finished or not."""
    return (folder / "config.yaml").exists() and (folder / "checkpoints").exists()


def _release(folder: Path, before: set[str]) -> None:
    """Make the folder of a new run usable again, after a UserError or KeyboardInterrupt before its first checkpoint.

    config.yaml is removed. If no step was logged, the files in WRITTEN_AT_START, TensorBoard's events and an empty
    folder of checkpoints are removed, too. The folder itself is then removed if only the lock file is left in it.
    Files with a name in `before` were there when the run started, and stay.
    """
    (folder / "config.yaml").unlink(missing_ok=True)
    if any((folder / name).is_file() and (folder / name).stat().st_size for name in RECORD_FILES):
        return
    for file in [*(folder / name for name in WRITTEN_AT_START), *folder.glob("events.out.tfevents.*")]:
        if file.name not in before:
            file.unlink(missing_ok=True)
    _remove_empty(folder / "checkpoints")
    if not {path.name for path in folder.iterdir()} - {LOCK_FILE}:
        shutil.rmtree(folder)


def _remove_empty(*folders: Path) -> None:
    """Remove each of `folders` that exists and is empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def choose(composed: Composed) -> Path:
    """The folder that the key run_dir names or, if run_dir is not set, a new folder named by model, data and time.

    The new folder is created here; the folder of run_dir is created later. Raises UserError if the new folder cannot be
    created, or for resume=auto without run_dir.
    """
    config = composed.config
    if config["run_dir"]:
        return Path(config["run_dir"])
    if config["resume"]:
        raise UserError("resume=auto needs run_dir=FOLDER, the run to resume.")
    parts = [composed.choices.get(part) or _kind(config[part]) for part in ("model", "data")]
    return create_timestamped(Path("runs", re.sub(r"[^\w.-]+", "_", "-".join(parts))))


def _kind(section: dict[str, Any]) -> str:
    """The name for a config section that was not chosen by name: its class's name in lower case (coco for Coco)."""
    return str(section["_target_"]).rpartition(".")[2].lower()


def create_timestamped(parent: Path) -> Path:
    """Create a folder in `parent` that is named by the time. Jobs that start in the same second get different folders.

    Raises UserError if the folder cannot be created.
    """
    timestamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    for number in itertools.count(1):
        folder = parent / (timestamp if number == 1 else f"{timestamp}_{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            reason = f"{folder} cannot be created ({error.strerror})"
            raise UserError(f"{reason}; name a folder that can be written, with run_dir= or sweep_dir=.") from error
    raise AssertionError


def _create(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK_FILE).touch()
    except OSError as error:
        raise UserError(
            f"run_dir={folder}: cannot be written ({error.strerror}); correct that, or name another."
        ) from error


def config_text(config: dict[str, Any]) -> str:
    """The text of a run's config.yaml.

    The keys for the run's folder and for resuming are reset, and cache_dir, the folder of downloads, is left out. With
    `--config-dir FOLDER --config-name config`, the run can therefore be repeated in another folder and by another user.
    """
    neutral: dict[str, Any] = {"run_dir": None, "sweep_dir": None, "resume": None, "allow_changes": []}
    return config_yaml({key: value for key, value in {**config, **neutral}.items() if key != "cache_dir"})


def _refuse_odd_entries(folder: Path) -> None:
    """Raise UserError if `folder` holds a file in place of a folder that runs write into, or a special file.

    Opening a special file, such as a named pipe, might block.
    """
    for path in folder.iterdir():
        if path.name in FOLDERS and not path.is_dir():
            raise UserError(f"{path} is no folder, but the run writes into one of this name; rename or remove it.")
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is neither a file nor a folder, but a pipe or a device, say; remove it.")


def _claim(folder: Path, config: dict[str, Any]) -> None:
    """Write config.yaml into a new run's folder, or check that `config` may resume the run in the folder.

    Raises UserError if the folder holds a run and resume=auto is not set, or if `config` differs from the stored config
    of the run in a key that may not change. Also raises UserError if allow_changes names an unknown key. When a run is
    resumed, `config` is changed in two places: a precision of `auto` becomes the stored precision, and `_restore_cuts`
    replaces some default sizes of val and test by the stored ones.
    """
    file, allowed = folder / "config.yaml", config["allow_changes"]
    _refuse_unknown(allowed, config)
    if file.exists() and not config["resume"]:
        raise UserError(f"run_dir={folder} already holds a run; add resume=auto to resume it.")
    if file.exists():
        finished = (folder / "results.json").exists()
        stored = read_config(file)
        # If there is a checkpoint, paths of the data and of a teacher may differ: its digests are compared later.
        has_digests = any((folder / "checkpoints").glob("*.pt")) and not finished
        paths = (*DATA_PATHS, TEACHER_PATH) if has_digests else ()
        refuse_changes(stored, config, f"{folder}", [*paths, *([] if finished else allowed)])
        if config["trainer"]["precision"] == "auto":
            if not isinstance(precision := flatten(stored).get(PRECISION), str):
                raise UserError(f"{file} holds no {PRECISION}; put the run's own config there, or add that key.")
            config["trainer"]["precision"] = precision
        _restore_cuts(config.get("data"), stored.get("data"))
    else:
        write_atomically(file, config_text(config))


def _restore_cuts(section: Any, stored: Any) -> None:
    """Replace default sizes of val and test in `section` by the values in `stored`, in place.

    `section` is the section data of the config, and `stored` that of the run's stored config. A value is replaced only
    if it is a default that differs from the default of earlier versions (CHANGED_CUTS).
    """
    if not (isinstance(section, dict) and isinstance(stored, dict)):
        return
    for key, (default, _) in CHANGED_CUTS.get(str(section.get("_target_")), {}).items():
        if section.get(key) == default and key in stored:
            section[key] = stored[key]


def read_config(file: Path) -> dict[str, Any]:
    """Read a run's config.yaml and update it to this version's keys; raises UserError if the file holds no config."""
    remedy = "put the run's own config there"
    config = read_yaml(file, remedy, resolve=True)
    if not isinstance(config, dict) or not config:
        raise UserError(f"{file} holds no config; {remedy}.")
    return migrate_config({str(key): value for key, value in config.items()})


def _refuse_unknown(allowed: list[str], config: dict[str, Any]) -> None:
    """Raise UserError for an entry of allow_changes that is neither a key nor a section of the config."""
    keys = flatten(config)
    known = {".".join(key.split(".")[:length]) for key in keys for length in range(1, key.count(".") + 2)}
    for key in allowed:
        if key not in known:
            raise UserError(f"allow_changes: {key} is not a key of this config{did_you_mean(key, known)}")
