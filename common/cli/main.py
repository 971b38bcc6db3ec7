"""The command line of the doors train.py, evaluate.py and predict.py: help, config, run folder, sweeps and exit code.

The exit codes are:

- 0 for success;
- 1 for a defect of the program, which prints a traceback; for inputs of predict.py that got no answer; and for a sweep
  with failed or unfinished runs;
- 2 for a user's mistake or an error of the operating system (such as a full disk), if one sentence explains it; for a
  sweep, if all its unfinished runs were refused because of a user's mistake; and if --help, --cfg, evaluate.py or
  predict.py could not write to standard output;
- 130 for Ctrl-C;
- 143 if training was stopped by any other signal.

The config is checked before a folder is created and before the job is called. train.py imports torch only in its job.
"""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from common.cli import sweep
from common.cli.command import own_name
from common.config.check import DOOR_KEYS
from common.config.compose import CONFIGS, GROUPS, Command, ConfigReader, choices_of
from common.config.plain_text import config_yaml
from common.errors import Stopped, UserError
from common.files import names, run_folder
from common.files.run_folder import Job
from common.machine import console, system_errors, threads, torchrun

REQUIRED_ARGUMENTS = {
    "train": "model=NAME",
    "evaluate": "checkpoint=FILE",
    "predict": "checkpoint=FILE input=INPUT",
}
USAGE = """\
usage: {program} {required} [group=NAME ...] [key=value ...] [options]

groups and their choices (files in configs/):
{groups}

keys (a group's keys by their full name, as in optimizer.lr=1e-4; --cfg job prints all):
{keys}

options:
  --cfg job                              print the config and exit
  --config-dir FOLDER                    further configs in FOLDER/model/, FOLDER/data/, FOLDER/experiment/ and so on
"""
PREDICT_OPTIONS = """
options of prediction, by model (NAME=value is short for task.predict.NAME=value):
"""
TRAIN_OPTIONS = """\
  --config-dir RUN --config-name config  run the config in a run's folder again
  -m key=a,b model=x,y                   train once for each combination; sweep_dir=FOLDER resumes a sweep
  hydra/launcher=joblib                  several runs of a sweep at once (hydra.launcher.n_jobs=2); or submitit_slurm
"""


def launch(job: Job, door: str, base: ConfigReader | None = None, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `job` with the config that the command line describes, then exit.

    The job of train.py is called with (config, run_dir). On ranks above 0, run_dir is None; rank 0 broadcasts the
    folder to them later. The jobs of the other doors are called with (config). `base` reads the config that is stored
    in checkpoint=FILE, if there is one; the overrides of the command line change it. `arguments` is the command line,
    by default sys.argv[1:].
    """
    console.guard()
    process, started, folder = torchrun.Process(), False, None
    try:
        process = torchrun.this_process(os.environ)
        command = Command(door, sys.argv[1:] if arguments is None else arguments, base)
        one_run = "hydra/launcher" not in command.keys  # joblib itself divides the cores between its runs
        os.environ.update(threads.missing_settings(os.environ, count=one_run))  # before torch is imported
        if command.flags.help:
            print(_usage(door), end="")
            sys.exit(console.exit_code(0))
        command.prepare()
        if command.flags.multirun:
            sys.exit(sweep.sweep(job, command))
        composed = command.checked()
        if process.is_local_main:
            print("".join(f"{notice}\n" for notice in composed.notices), end="", file=sys.stderr)
        if command.flags.cfg:
            print(config_yaml(composed.config), end="")
            sys.exit(console.exit_code(0))
        workers = threads.worker_count(composed.config["trainer"]["workers"], process.local_world_size)
        system_errors.ensure_open_files(workers)
        started = True
        if door != "train":
            job(composed.config)
            _exit(console.exit_code(0))
        folder = run_folder.choose(composed) if process.rank == 0 else None
        run_folder.run_in(job, composed.config, folder)
    except UserError as error:
        # Before the job starts, all ranks raise the same error, and one rank on each machine prints it.
        if started or process.is_local_main:
            sentence = names.printable(str(error))
            print(f"rank {process.rank}: {sentence}" if process.rank else sentence, file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if (reason := system_errors.describe(error)) is None:
            raise
        print(names.printable(reason), file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        if process.rank == 0:
            print(f"{stop} {_resume_line(command, folder) if folder else ''}".rstrip(), file=sys.stderr)
        _exit(stop.code)
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C.", file=sys.stderr)
        sys.exit(130)
    _exit(0)


def _resume_line(command: Command, folder: Path) -> str:
    """Return a line with the command that resumes a run: the command that started it, plus run_dir= and resume=auto."""
    added = {"run_dir": f"run_dir={folder}", "resume": "resume=auto"}
    arguments = [*command.arguments, *(argument for key, argument in added.items() if key not in command.keys)]
    distributed = torchrun.this_process(os.environ).world_size > 1
    words = own_name()
    program = ["torchrun [its options]", *(words[1:] if words[0] == "python" else words)] if distributed else words
    return f"To resume: {program[0]} {names.shell_command([*program[1:], *arguments])}"


def _exit(code: int) -> NoReturn:
    if torchrun.this_process(os.environ).world_size > 1:
        # With several processes, Python's shutdown sometimes aborts in a library's thread ("terminate called without an
        # active exception", torch 2.15 with gloo), and torchrun would report a finished run as failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _usage(door: str) -> str:
    """Return the help text of a door: the choices in each group, the keys in the door's yaml file, and the options."""
    keys = (CONFIGS / f"{door}.yaml").read_text(encoding="utf-8").partition("\n\n")[2]
    sections = {"groups": "\n".join(f"  {group}: {', '.join(choices_of(group))}" for group in GROUPS)}
    sections["keys"] = "\n".join(f"  {line}" for line in keys.splitlines())
    usage = USAGE.format(program=" ".join(own_name(door)), required=REQUIRED_ARGUMENTS[door], **sections)
    return usage + {"train": TRAIN_OPTIONS, "predict": PREDICT_OPTIONS + _prediction_options()}.get(door, "")


def _prediction_options() -> str:
    """Return the help text of the options of prediction.

    It consists of the section task.predict of each model's yaml file that has one, with its comments. An option with
    the same name as a key of predict.py, such as seed, is shown by its full name, task.predict.seed, because its short
    name means the key of predict.py.
    """
    section_pattern = re.compile(r"^task:\n(?:  .*\n)*?  predict:\n((?:    .*\n)+)", re.M)
    door_keys = "|".join(DOOR_KEYS["predict"])
    lines = []
    for file in sorted((CONFIGS / "model").glob("*.yaml")):
        section = section_pattern.search(file.read_text(encoding="utf-8"))
        if section:
            options = re.sub(rf"^    ({door_keys}):", r"    task.predict.\1:", section[1], flags=re.M)
            lines.append(f"  model={file.stem}\n{options}")
    return "".join(lines)
