"""What the doors have in common: help, a checked config, a run's folder, sweeps, and an exit code.

0 done; 1 a defect, with its traceback; 2 a user's mistake, in one sentence; 130 Ctrl-C. The config is checked before
a folder is made and before the job imports torch.
"""

import itertools
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from common.compose import CONFIGS, GROUPS, Base, Command, Composed, choices_of, plain, quoted
from common.config import check
from common.errors import UserError

Job = Callable[..., float | None]

NEEDS = {"train": "model=NAME", "evaluate": "checkpoint=FILE", "predict": "checkpoint=FILE input=FILE_OR_FOLDER_OR_-"}
USAGE = """\
usage: python {door}.py {needs} [group=NAME ...] [key=value ...] [options]

groups, each choice a file in configs/:
{groups}

keys (those of the groups by their full name, as in optimizer.lr=1e-4; --cfg job shows all):
{keys}

options:
  --cfg job                              print the config and leave
  --config-dir FOLDER                    your own configs in FOLDER/model/, FOLDER/data/, FOLDER/experiment/ and so on
"""
TRAIN_OPTIONS = """\
  --config-dir RUN --config-name config  run again what a run's folder holds
  -m key=a,b model=x,y                   train once for each combination
"""


def launch(job: Job, door: str, base: Base | None = None, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `job` with the config that the command line asks for, and leave with an exit code.

    train gets (config, run_dir): the new folder, or None on ranks above 0, which learn it from rank 0 once the
    processes have met. The other doors get (config), composed on top of what `base` reads from checkpoint=FILE.
    """
    sys.path.append(os.getcwd())  # a user's own package lies where the command is given
    rank, first_here = int(os.environ.get("RANK", "0")), os.environ.get("LOCAL_RANK", "0") == "0"
    started = False
    try:
        command = Command(door, sys.argv[1:] if arguments is None else arguments, base)
        if command.flags.help:
            print(_usage(door), end="")
            sys.exit(0)
        command.prepare()
        if command.flags.multirun:
            sys.exit(_sweep(job, command))
        composed = command.compose()
        check(composed.config, composed.config.get("trust") or [], door)
        if command.flags.cfg:
            print(OmegaConf.to_yaml(OmegaConf.create(composed.config)), end="")
            sys.exit(0)
        started = True
        if door != "train":
            job(composed.config)
        else:
            _run(job, composed.config, _choose_folder(composed) if rank == 0 else None)
    except UserError as error:
        if started or first_here:  # before the start all ranks of a machine make the same mistake
            print(f"rank {rank}: {error}" if rank else error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C.", file=sys.stderr)
        sys.exit(130)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # With several processes Python's way out now and then aborts in a library's thread ("terminate called without
        # an active exception", torch 2.15 with gloo), and a run that is finished would count as failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    sys.exit(0)


def _usage(door: str) -> str:
    """The groups by their files, and the door's keys by its yaml with its comments."""
    keys = (CONFIGS / f"{door}.yaml").read_text(encoding="utf-8").partition("\n\n")[2]
    lines = {"groups": "\n".join(f"  {group}: {', '.join(choices_of(group))}" for group in GROUPS)}
    lines["keys"] = "\n".join(f"  {line}" for line in keys.splitlines())
    return USAGE.format(door=door, needs=NEEDS[door], **lines) + (TRAIN_OPTIONS if door == "train" else "")


# A run's folder.


def _run(job: Job, config: dict[str, Any], folder: Path | None) -> float | None:
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


def _choose_folder(composed: Composed) -> Path:
    config = composed.config
    if config["run_dir"]:
        return Path(config["run_dir"])
    if config["resume"]:
        raise UserError("resume=auto needs run_dir=FOLDER, which says what to go on with.")
    parts = [composed.choices.get(part) or _kind(config[part]) for part in ("model", "data")]
    return _fresh(Path("runs", re.sub(r"[^\w.-]+", "_", "-".join(parts))))


def _kind(section: dict[str, Any]) -> str:
    """A name for a part that no group chose, as in a config that a run left: detr.coco.Coco is coco."""
    return str(section["_target_"]).rpartition(".")[2].lower()


def _fresh(parent: Path) -> Path:
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


# Sweeps.


def _sweep(job: Job, command: Command) -> int:
    """Run `job` for every combination, by Hydra's multirun; one that fails does not stop the others."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("-m does not work under torchrun; start one torchrun for each setting.")
    if command.door != "train":
        raise UserError(f"-m sweeps are for train.py; call {command.door}.py once for each setting.")
    if {"run_dir", "resume"} & command.keys:
        raise UserError("run_dir= and resume= name one run, and -m makes many, each in a folder of its own.")
    overrides, subfolder = _spread(command)
    folder = _fresh(Path("runs", "sweeps"))
    failures: list[Exception] = []

    def one(cfg: DictConfig) -> float | None:
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        try:
            config = plain(cfg)
            check(config, config["trust"])
            return _run(job, config, run_dir)
        except Exception as error:
            failures.append(error)
            print(f"{run_dir}: {error}" if isinstance(error, UserError) else traceback.format_exc(), file=sys.stderr)
            raise

    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra hand errors on instead of leaving by itself
    hydra_keys = {"sweep.dir": quoted(str(folder)), "sweep.subdir": quoted(subfolder), "output_subdir": "null"}
    settings = [f"hydra.{key}={value}" for key, value in {**hydra_keys, "job.name": command.door}.items()]
    sys.argv[1:] = ["-m", "hydra/job_logging=none", *settings, *overrides]
    try:
        hydra.main(version_base="1.3", config_path=str(command.folder), config_name=command.config_name)(one)()
    except Exception:
        if not failures:
            raise
    if not failures:
        return 0
    print(f"{len(failures)} of the runs in {folder} failed.", file=sys.stderr)
    return 2 if all(isinstance(error, UserError) for error in failures) else 1


def _spread(command: Command) -> tuple[list[str], str]:
    """The overrides as multirun takes them, and each run's folder name; every combination is checked first.

    Hydra looks for fixed keys in a config that has no model yet, so model.heads=2 becomes a sweep of one value, and
    trainer.epochs=null, of which it makes no sweep, a key that is added where it is not there.
    The folder's name interpolates the swept keys (0-detr-seed_1), but for values that make no good file name.
    """
    name = "${hydra.job.num}"
    overrides: list[str] = []
    values: list[list[str]] = []
    for one in command.parse(command.overrides):
        key, text = one.key_or_group, one.input_line or ""
        swept = one.is_sweep_override()
        choices = list(one.sweep_string_iterator()) if swept and one.is_discrete_sweep() else []
        values.append([f"{one.get_key_element()}={choice}" for choice in choices] or [text])
        fixed = not swept and text.startswith(f"{key}=") and "." in key and not key.startswith("hydra")
        value = text.partition("=")[2]
        overrides.append(text if not fixed else f"++{text}" if value == "null" else f"{key}=choice({value})")
        if len(choices) > 1 and all(re.fullmatch(r"[\w.+-]+", choice) for choice in choices):
            last = key.rpartition(".")[2]
            name += f"-${{hydra.runtime.choices.{key}}}" if key in GROUPS else f"-{last}_${{{key}}}"
    if not any(key.startswith("hydra/sweeper") for key in command.keys):  # other sweepers choose as they go
        for combination in itertools.product(*values):
            config = command.compose(list(combination)).config
            check(config, config.get("trust") or [])
    return overrides, name
