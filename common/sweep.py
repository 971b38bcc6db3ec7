"""Sweeps (`-m`): one run for each combination, by Hydra's multirun."""

import itertools
import os
import re
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from common import run_folder
from common.compose import GROUPS, Command, plain, quoted
from common.config import check
from common.errors import UserError
from common.run_folder import Job


def sweep(job: Job, command: Command) -> int:
    """Run `job` for every combination, by Hydra's multirun; one that fails does not stop the others."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("-m does not work under torchrun; start one torchrun for each setting.")
    if command.door != "train":
        raise UserError(f"-m sweeps are for train.py; call {command.door}.py once for each setting.")
    if {"run_dir", "resume"} & command.keys:
        raise UserError("run_dir= and resume= name one run, and -m makes many, each in a folder of its own.")
    overrides, subfolder = _spread(command)
    folder = run_folder.fresh(Path("runs", "sweeps"))
    failures: list[Exception] = []

    def one(cfg: DictConfig) -> float | None:
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        try:
            config = plain(cfg)
            check(config, config["trust"])
            return run_folder.run(job, config, run_dir)
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
