"""What the doors have in common: help, a checked config, a run's folder, sweeps, and an exit code.

0 done; 1 a defect, with its traceback; 2 a user's mistake, in one sentence; 130 Ctrl-C; 143 another signal that asks
for an end. The config is checked before a folder is made and before the job imports torch.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import OmegaConf

from common.cli import sweep
from common.config.check import check
from common.config.compose import CONFIGS, GROUPS, Command, ConfigReader, choices_of
from common.errors import Stopped, UserError
from common.files import run_folder
from common.files.run_folder import Job

REQUIRED_ARGUMENTS = {
    "train": "model=NAME",
    "evaluate": "checkpoint=FILE",
    "predict": "checkpoint=FILE input=FILE_OR_FOLDER_OR_-",
}
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
  -m key=a,b model=x,y                   train once for each combination; sweep_dir=FOLDER goes on with a sweep
  hydra/launcher=joblib                  several runs of a sweep at once (hydra.launcher.n_jobs=2); or submitit_slurm
"""


def launch(job: Job, door: str, base: ConfigReader | None = None, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `job` with the config that the command line asks for, and leave with an exit code.

    train gets (config, run_dir): the new folder, or None on ranks above 0, which learn it from rank 0 once the
    processes have met. The other doors get (config), composed on top of what `base` reads from checkpoint=FILE.
    """
    sys.path.append(os.getcwd())  # a user's own package lies where the command is given
    rank, first_here = int(os.environ.get("RANK", "0")), os.environ.get("LOCAL_RANK", "0") == "0"
    started, folder = False, None
    try:
        command = Command(door, sys.argv[1:] if arguments is None else arguments, base)
        if command.flags.help:
            print(_usage(door), end="")
            sys.exit(0)
        command.prepare()
        if command.flags.multirun:
            sys.exit(sweep.sweep(job, command))
        composed = command.compose()
        check(composed.config, composed.config.get("trust") or [], door)
        if first_here:
            print("".join(f"{notice}\n" for notice in composed.notices), end="", file=sys.stderr)
        if command.flags.cfg:
            print(OmegaConf.to_yaml(OmegaConf.create(composed.config)), end="")
            sys.exit(0)
        started = True
        if door != "train":
            job(composed.config)
        else:
            folder = run_folder.choose(composed) if rank == 0 else None
            run_folder.run_in(job, composed.config, folder)
    except UserError as error:
        if started or first_here:  # before the start all ranks of a machine make the same mistake
            print(f"rank {rank}: {error}" if rank else error, file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        if rank == 0:
            print(f"{stop} {_to_go_on(command, folder) if folder else ''}".rstrip(), file=sys.stderr)
        _leave(stop.code)
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C.", file=sys.stderr)
        sys.exit(130)
    _leave(0)


def stored_config(file: Path) -> dict[str, Any]:
    """The config inside a checkpoint; torch is imported only once a command line has got this far."""
    from common.train import assembly

    return assembly.stored_config(file)


def _to_go_on(command: Command, folder: Path) -> str:
    """The line that goes on with a run: the one that started it, with the folder's name."""
    missing = {"run_dir": f"run_dir={folder}", "resume": "resume=auto"}
    words = [*command.arguments, *(word for key, word in missing.items() if key not in command.keys)]
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return f"To go on: {'torchrun [its options]' if several else 'python'} {shlex.join([sys.argv[0], *words])}"


def _leave(code: int) -> NoReturn:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # With several processes Python's way out now and then aborts in a library's thread ("terminate called without
        # an active exception", torch 2.15 with gloo), and a run that is finished would count as failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _usage(door: str) -> str:
    """The groups by their files, and the door's keys by its yaml with its comments."""
    keys = (CONFIGS / f"{door}.yaml").read_text(encoding="utf-8").partition("\n\n")[2]
    lines = {"groups": "\n".join(f"  {group}: {', '.join(choices_of(group))}" for group in GROUPS)}
    lines["keys"] = "\n".join(f"  {line}" for line in keys.splitlines())
    return USAGE.format(door=door, needs=REQUIRED_ARGUMENTS[door], **lines) + (TRAIN_OPTIONS if door == "train" else "")
