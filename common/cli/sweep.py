"""Sweeps (`-m`): one run for each combination of values, started by one of Hydra's launchers.

A sweep that was interrupted can be resumed.
"""

import contextlib
import itertools
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import HydraException, MissingConfigException
from hydra.experimental.callback import Callback
from hydra.types import HydraContext, RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from common.cli.command import own_name
from common.cli.jobs import StopFileContext, SweepJob, clear_status, signals_to_stop_file, status_of
from common.config import yaml_files
from common.config.check import check, did_you_mean
from common.config.compose import CONFIGS, GROUPS, Command, Composed
from common.config.diff import fingerprint, flatten
from common.config.foreign import hydra_settings
from common.config.paths import quoted
from common.errors import Stopped, UserError
from common.files import run_folder
from common.files.names import shell_command
from common.files.records import goal_value, read_record
from common.files.run_folder import Job
from common.files.table import table
from common.machine import torchrun

OPTIONAL_LAUNCHERS = ("joblib", "submitit_local", "submitit_slurm")  # installed by the extra `sweeps`
MAX_NAME_LENGTH = 80  # maximum number of characters in a folder's name before the fingerprint
RESERVED_KEYS = ("hydra.sweep.", "hydra.sweeper", "hydra/sweeper", "hydra.mode")  # Hydra's keys that a user may not set


class Combination(NamedTuple):
    """One run of a sweep: a combination of values.

    `overrides` sets these values. `fingerprint` is a hash of the run's config (common/config/diff.py). `name` is the
    readable part of the name of the run's folder. `sweep_dir` is the value of the key sweep_dir; None if it is not set.
    """

    overrides: list[str]
    fingerprint: str
    name: str
    sweep_dir: str | None


def sweep(job: Job, command: Command) -> int:
    """Run `job` for every combination of values, except for combinations that are done; returns the exit code.

    All combinations are checked before the first run. Each run has a folder of its own in the sweep's folder. A run
    that is done is skipped; a run that was interrupted is resumed. So the same command with sweep_dir=FOLDER resumes
    the sweep. A run that fails does not stop the others. Results are read from the disk, because runs may take place on
    other machines. `_report` describes the exit code.
    """
    _refuse_conflicting_options(command)
    combinations = _distinct(_combinations(command))
    sweep_dir = combinations[0].sweep_dir
    folder = Path(sweep_dir) if sweep_dir else run_folder.create_timestamped(Path("runs", "sweeps"))
    runs = [_folder(folder, combination) for combination in combinations]
    todo = [(combination, run) for combination, run in zip(combinations, runs, strict=True) if not _results(run)]
    print(f"{len(combinations)} runs in {folder}, {len(combinations) - len(todo)} of them already done.", flush=True)
    resume_line = f"To resume: {shell_command(_line(command, folder))}"
    for _, run in todo:
        clear_status(run)
    # The file of --config-name may hold other values of these two keys. They are ignored, because only the command line
    # may set these keys. So each run gets the defaults as overrides.
    defaults = {"trust": "trust=[]", "check_memory": "++check_memory=true"}
    added = ["resume=auto", *(line for key, line in defaults.items() if key not in command.keys)]
    lines = [[*combination.overrides, *added, f"run_dir={quoted(str(run))}"] for combination, run in todo]
    try:
        if lines:
            _launch(job, command, folder, lines)
    except Exception as error:  # an error of the launcher; `SweepJob` catches those of runs
        reason = str(error).partition("\n")[0]  # submitit appends a whole log to its message
        print(f"The launcher failed: {type(error).__name__}: {reason}", file=sys.stderr)
    except BaseException:
        print(resume_line, file=sys.stderr)
        raise
    code = _report(folder, runs)
    if code:
        print(resume_line, file=sys.stderr)
    return code


def _refuse_conflicting_options(command: Command) -> None:
    if torchrun.this_process(os.environ).world_size > 1:
        raise UserError("-m does not work under torchrun; start one torchrun for each setting.")
    if command.door != "train":
        raise UserError(f"-m sweeps are for train.py; call {command.door}.py once for each setting.")
    if {"run_dir", "resume"} & command.keys:
        raise UserError("run_dir= and resume= name one run; a sweep has sweep_dir=, with a folder in it for each run.")
    reserved = next((key for key in sorted(command.keys) if key.startswith(RESERVED_KEYS)), None)
    if reserved:
        raise UserError(f"{reserved}: a sweep is always a grid in sweep_dir=FOLDER; use scripts/search.py to search.")
    if "hydra/launcher" in command.keys and Path("hydra_plugins").exists():
        raise UserError(
            "hydra_plugins in the working folder would be executed by the launcher's processes; start the sweep in "
            "another folder, or delete hydra_plugins if it is not yours."
        )


def _combinations(command: Command) -> Iterator[Combination]:
    """Compose and check the config of every combination of values, and yield the combinations.

    Raises UserError at the first mistake. The readable part of the name of a run's folder consists of the
    experiment or model and the swept keys and values, as in detr-seed_1-lr_0.0002. If a value contains other characters
    than letters, digits and _ . + -, its key and value are left out of the name.
    """
    settings, values, swept = [], [], []
    for override in command.parse(command.overrides):
        key, text = override.key_or_group, override.input_line or ""
        if override.is_sweep_override() and (key.startswith("hydra") or not override.is_discrete_sweep()):
            raise UserError(f"{text}: expected single values, as in key=a,b; scripts/search.py takes ranges (a..b).")
        if key.startswith("hydra"):
            settings.append(text)
            continue
        choices = list(override.sweep_string_iterator()) if override.is_sweep_override() else []
        swept += [key] if len(choices) > 1 else []
        values.append([f"{override.get_key_element()}={choice}" for choice in choices] or [text])
    _compose_settings(command, settings)
    own_settings = _own_settings(settings)
    notices: set[str] = set()
    for overrides in itertools.product(*values):
        composed = command.compose([*settings, *overrides])
        _refuse_foreign_settings(composed.settings, own_settings, command)
        check(composed.config, composed.config.get("trust") or [])
        print("".join(f"{notice}\n" for notice in composed.notices if notice not in notices), end="", file=sys.stderr)
        notices.update(composed.notices)
        sweep_dir = composed.config["sweep_dir"]
        yield Combination(list(overrides), fingerprint(composed.config), _name(composed, swept), sweep_dir)


def _own_settings(settings: list[str]) -> dict[str, Any]:
    """Compose Hydra's settings from the overrides `settings` alone, without the files of --config-dir."""
    typed = [text for text in settings if not text.startswith("hydra.searchpath=")]
    return hydra_settings(_compose_settings(Command("train", []), typed))


def _refuse_foreign_settings(settings: dict[str, Any], own: dict[str, Any], command: Command) -> None:
    """Raise UserError if the files of --config-dir change Hydra's settings.

    Some of these settings name classes that Hydra constructs, so a file of another person could execute code.
    `settings` are composed with the files, `own` without them.
    """
    changed = sorted(key for key in {**settings, **own} if settings.get(key) != own.get(key))
    if changed:
        raise UserError(
            f"--config-dir {command.flags.config_dir}: its files set hydra.{changed[0]}, but Hydra's settings come "
            "from the command line alone; remove them from these files."
        )


def _distinct(combinations: Iterator[Combination]) -> list[Combination]:
    """Return the combinations without those that have the fingerprint of an earlier one.

    A line is printed for each combination that is left out.
    """
    distinct: dict[str, Combination] = {}
    for number, combination in enumerate(combinations, 1):
        first = distinct.setdefault(combination.fingerprint, combination)
        if first is not combination:
            pair = f"{shlex.join(combination.overrides)} and {shlex.join(first.overrides)}"
            print(f"Combination {number} is left out, because it repeats an earlier one: {pair} are the same run.")
    return list(distinct.values())


def _name(composed: Composed, swept: list[str]) -> str:
    """Return the readable part of the name of a run's folder. It contains only letters, digits and _ . + -."""
    choices, values = composed.choices, flatten(composed.config)
    parts = [choices.get("experiment") or choices.get("model") or "run"]
    for key in swept:
        is_group = key in GROUPS
        value = str(choices.get(key) if is_group else values.get(key))
        if re.fullmatch(r"[\w.+-]+", value) and value not in parts:
            parts.append(value if is_group else f"{key.rpartition('.')[2]}_{value}")
    return re.sub(r"[^\w.+-]+", "_", "-".join(parts))[:MAX_NAME_LENGTH]


def _folder(sweep: Path, combination: Combination) -> Path:
    """Return the path of a combination's folder.

    It is an existing folder whose name ends with the combination's fingerprint, or else a new path.
    """
    existing = sorted(sweep.glob(f"*-{combination.fingerprint}"))
    return existing[0] if existing else sweep / f"{combination.name}-{combination.fingerprint}"


def _compose_settings(command: Command, settings: list[str]) -> DictConfig:
    """Compose the config with `settings`, which are overrides of Hydra's own keys, such as hydra/launcher.

    Raises UserError for a setting that does not exist or has a wrong value, and for a launcher that is not installed.
    """
    try:
        with command.initialised():
            engine = GlobalHydra.instance().hydra
            assert engine is not None
            return engine.compose_config(command.config_name, settings, run_mode=RunMode.MULTIRUN)
    except MissingConfigException as error:
        name = str(error.missing_cfg_file)
        available, launcher = error.options or [], name.removeprefix("hydra/launcher/")
        if launcher in OPTIONAL_LAUNCHERS and launcher not in available:
            package = f"hydra-{launcher.partition('_')[0]}-launcher"
            raise UserError(f"hydra/launcher={launcher} is not installed: pip install {package}.") from error
        raise UserError(f"{name} does not exist{did_you_mean(launcher, available)}") from error
    except (HydraException, *yaml_files.ERRORS) as error:
        raise UserError(f"{yaml_files.describe(error)}.") from error


def _launch(job: Job, command: Command, folder: Path, lines: list[list[str]]) -> None:
    """Launch the runs with the launcher that the command line chose, and wait until it returns.

    `lines` holds the overrides of each run, and is handed directly to the launcher. Hydra's sweeper is not used,
    because it would launch finished runs again. Raises Stopped if a signal arrived while joblib's runs took place.
    """
    sweep_settings = {"sweep.dir": quoted(str(folder)), "sweep.subdir": ".", "output_subdir": "null"}
    settings = ["hydra/job_logging=none", *(f"hydra.{key}={value}" for key, value in sweep_settings.items())]
    settings += [text for text in command.overrides if text.lstrip("+~").startswith("hydra")]
    config = _compose_settings(command, settings)
    target = str(OmegaConf.select(config, "hydra.launcher._target_"))
    in_sweep_process, in_children = "basic_launcher" in target, "joblib" in target
    context: StopFileContext = signals_to_stop_file(folder) if in_children else contextlib.nullcontext((None, []))
    with context as (stop_file, received), command.initialised(), _importable_elsewhere():
        engine = GlobalHydra.instance().hydra
        assert engine is not None
        hydra = HydraContext(config_loader=engine.config_loader, callbacks=_Callbacks(config))  # type: ignore[arg-type]
        task = SweepJob(
            job, in_sweep_process=in_sweep_process, stop_file=stop_file, working_folder=command.working_folder
        )
        launcher = Plugins.instance().instantiate_launcher(hydra_context=hydra, task_function=task, config=config)
        launcher.launch(lines, initial_job_idx=0)
    if received:
        raise Stopped(received, f"during the sweep in {folder}")


class _Callbacks(Callback):
    """The callbacks that the command line sets by hydra.callbacks.

    Each is called at the start and at the end of each run.
    """

    def __init__(self, config: DictConfig):
        self.all = [instantiate(callback) for callback in (config.hydra.callbacks or {}).values()]

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        for callback in self.all:
            callback.on_job_start(config=config, **kwargs)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        for callback in self.all:
            callback.on_job_end(config=config, job_return=job_return, **kwargs)


@contextlib.contextmanager
def _importable_elsewhere() -> Iterator[None]:
    """Create a context in which a launcher's processes can import the project without the working folder in sys.path.

    It sets environment variables, which these processes inherit: PYTHONPATH contains the project's folder, and
    PYTHONSAFEPATH prevents Python from adding the working folder to sys.path. `SweepJob` adds the working folder in
    these processes if the command line has trust=.
    """
    names = ("PYTHONPATH", "PYTHONSAFEPATH")
    before = {name: os.environ[name] for name in names if name in os.environ}
    paths = [str(CONFIGS.parent), before.get("PYTHONPATH")]
    os.environ |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"}
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]
        os.environ.update(before)


def _line(command: Command, folder: Path) -> list[str]:
    added = [] if "sweep_dir" in command.keys else [f"sweep_dir={folder}"]
    return [*own_name(), *command.arguments, *added]


def _report(sweep: Path, runs: list[Path]) -> int:
    """Print the state of each run; returns 0 if all are done, 2 if every unfinished run was refused, else 1."""
    rows, failures, codes = [], [], set()
    goals = {str(results.get("goal")) for run in runs if (results := _results(run))}
    for run in runs:
        results, status = _results(run), status_of(run)
        if results:
            value = goal_value(results)
            rows.append((run.name, "done", float("nan") if value is None else value))
            continue
        rows.append((run.name, status.state, float("nan")))
        failures.append(f"{run}: {status.why}")
        codes.add(2 if status.state == "refused" else 1)
    print(table(f"\n{sweep}", [("run", "state", goals.pop() if len(goals) == 1 else "goal"), *rows]), flush=True)
    if failures:
        print("\n".join([*failures, f"{len(failures)} of the runs in {sweep} are not done."]), file=sys.stderr)
    return max(codes - {2}, default=max(codes, default=0))


def _results(run: Path) -> dict[str, Any]:
    """Return the results of a finished run; {} if results.json is missing or damaged."""
    with contextlib.suppress(UserError):  # the run itself reports a damaged file
        return read_record(run / "results.json")
    return {}
