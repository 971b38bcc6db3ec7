"""Sweeps (`-m`): one run for each combination, by any of Hydra's launchers, in a folder that can be gone on with."""

import contextlib
import itertools
import json
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

from common.cli.jobs import StopFileContext, SweepJob, clear_status, signals_to_stop_file, status_of
from common.config.check import check, did_you_mean
from common.config.compose import CONFIGS, GROUPS, Command, Composed, quoted
from common.config.diff import fingerprint, flatten
from common.errors import Stopped, UserError
from common.files import run_folder
from common.files.run_folder import Job
from common.files.table import table

OPTIONAL_LAUNCHERS = ("joblib", "submitit_local", "submitit_slurm")  # launchers that pip installs apart
MAX_NAME_LENGTH = 80  # characters of a folder's name before the hash
RESERVED_KEYS = (
    "hydra.sweep.",
    "hydra.sweeper",
    "hydra/sweeper",
    "hydra.mode",
)  # of Hydra's keys, those that are chosen here


class Combination(NamedTuple):
    """One run of a sweep: what its command line would say, its config's fingerprint, and its folder's name."""

    overrides: list[str]
    fingerprint: str
    name: str
    sweep_dir: str | None


def sweep(job: Job, command: Command) -> int:
    """Run `job` for every combination that is not done yet; the exit code.

    Every combination is checked before the first one runs. Each run has a folder of its own in the sweep's, and starts,
    goes on, or is done there already: the same line with sweep_dir=FOLDER goes on with the whole. One that fails does
    not stop the others; what became of each is read from the disk, since it may have run anywhere.
    """
    _refuse_what_does_not_go_together(command)
    combinations = _distinct(_combinations(command))
    sweep_dir = combinations[0].sweep_dir
    folder = Path(sweep_dir) if sweep_dir else run_folder.create_timestamped(Path("runs", "sweeps"))
    runs = [_folder(folder, combination) for combination in combinations]
    todo = [(combination, run) for combination, run in zip(combinations, runs, strict=True) if not _results(run)]
    print(f"{len(combinations)} runs in {folder}, {len(combinations) - len(todo)} of them done before.", flush=True)
    to_go_on = f"To go on: python {shlex.join(_line(command, folder))}"
    for _, run in todo:
        clear_status(run)
    lines = [[*combination.overrides, "resume=auto", f"run_dir={quoted(str(run))}"] for combination, run in todo]
    try:
        if lines:
            _launch(job, command, folder, lines)
    except Exception as error:  # of a launcher: the runs' own never get here
        reason = str(error).partition("\n")[0]  # submitit adds a whole log
        print(f"The launcher failed: {type(error).__name__}: {reason}", file=sys.stderr)
    except BaseException:
        print(to_go_on, file=sys.stderr)
        raise
    code = _report(folder, runs)
    if code:
        print(to_go_on, file=sys.stderr)
    return code


def _refuse_what_does_not_go_together(command: Command) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("-m does not work under torchrun; start one torchrun for each setting.")
    if command.door != "train":
        raise UserError(f"-m sweeps are for train.py; call {command.door}.py once for each setting.")
    if {"run_dir", "resume"} & command.keys:
        raise UserError("run_dir= and resume= name one run; a sweep has sweep_dir=, with a folder in it for each run.")
    ours = next((key for key in sorted(command.keys) if key.startswith(RESERVED_KEYS)), None)
    if ours:
        raise UserError(f"{ours}: a sweep is a grid in the folder sweep_dir=FOLDER; scripts/search.py searches.")


def _combinations(command: Command) -> Iterator[Combination]:
    """Every combination, composed and checked; raises UserError.

    A folder's name tells what is swept (detr-seed_1-lr_0.0002), but for values that make no good name.
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
    notices: set[str] = set()
    for overrides in itertools.product(*values):
        composed = command.compose([*settings, *overrides])
        check(composed.config, composed.config.get("trust") or [])
        print("".join(f"{notice}\n" for notice in composed.notices if notice not in notices), end="", file=sys.stderr)
        notices.update(composed.notices)
        sweep_dir = composed.config["sweep_dir"]
        yield Combination(list(overrides), fingerprint(composed.config), _name(composed, swept), sweep_dir)


def _distinct(combinations: Iterator[Combination]) -> list[Combination]:
    """Each run once, whatever the number of its combinations: values that make no other run give the same."""
    distinct: dict[str, Combination] = {}
    for number, combination in enumerate(combinations, 1):
        first = distinct.setdefault(combination.fingerprint, combination)
        if first is not combination:
            same = f"{shlex.join(combination.overrides)} and {shlex.join(first.overrides)}"
            print(f"Combination {number} is done once, with another: {same} are the same run.")
    return list(distinct.values())


def _name(composed: Composed, swept: list[str]) -> str:
    """The readable part of a folder's name: letters, digits and _ . + - only."""
    choices, values = composed.choices, flatten(composed.config)
    parts = [choices.get("experiment") or choices.get("model") or "run"]
    for key in swept:
        group = key in GROUPS
        value = str(choices.get(key) if group else values.get(key))
        if re.fullmatch(r"[\w.+-]+", value) and value not in parts:
            parts.append(value if group else f"{key.rpartition('.')[2]}_{value}")
    return re.sub(r"[^\w.+-]+", "_", "-".join(parts))[:MAX_NAME_LENGTH]


def _folder(sweep: Path, combination: Combination) -> Path:
    """The folder of a combination: one that is there for it, whatever was swept then, or a new one."""
    there = sorted(sweep.glob(f"*-{combination.fingerprint}"))
    return there[0] if there else sweep / f"{combination.name}-{combination.fingerprint}"


def _compose_settings(command: Command, settings: list[str]) -> DictConfig:
    """The config of no run yet, for Hydra's own part of it with the launcher; raises UserError."""
    try:
        with command.initialised():
            engine = GlobalHydra.instance().hydra
            assert engine is not None
            return engine.compose_config(command.config_name, settings, run_mode=RunMode.MULTIRUN)
    except MissingConfigException as error:
        name = str(error.missing_cfg_file)
        known, launcher = error.options or [], name.removeprefix("hydra/launcher/")
        if launcher in OPTIONAL_LAUNCHERS and launcher not in known:
            raise UserError(f'hydra/launcher={launcher} is not installed: pip install -e ".[sweeps]".') from error
        raise UserError(f"{name}: there is none{did_you_mean(launcher, known)}") from error
    except HydraException as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UserError(f"{reason}.") from error


def _launch(job: Job, command: Command, folder: Path, lines: list[list[str]]) -> None:
    """Hand the runs to the launcher that the command line chose, and wait for it.

    Hydra's launchers take any list of runs; its sweeper would make all combinations again, also those that are done.
    """
    ours = {"sweep.dir": quoted(str(folder)), "sweep.subdir": ".", "output_subdir": "null"}
    settings = ["hydra/job_logging=none", *(f"hydra.{key}={value}" for key, value in ours.items())]
    settings += [text for text in command.overrides if text.lstrip("+~").startswith("hydra")]
    config = _compose_settings(command, settings)
    target = str(OmegaConf.select(config, "hydra.launcher._target_"))
    here, beside = "basic_launcher" in target, "joblib" in target
    halts: StopFileContext = signals_to_stop_file(folder) if beside else contextlib.nullcontext((None, []))
    with halts as (halt, received), command.initialised(), _importable_elsewhere():
        engine = GlobalHydra.instance().hydra
        assert engine is not None
        context = HydraContext(config_loader=engine.config_loader, callbacks=_Callbacks(config))  # type: ignore[arg-type]
        task = SweepJob(job, here=here, halt=halt)
        launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=config)
        launcher.launch(lines, initial_job_idx=0)
    if received:
        raise Stopped(received, f"with what is done and begun in {folder}")


class _Callbacks(Callback):
    """What the command line asks for by hydra.callbacks, called for each run."""

    def __init__(self, config: DictConfig):
        self.all = [instantiate(callback) for callback in (config.hydra.callbacks or {}).values()]

    def on_job_start(self, config: DictConfig, **more: Any) -> None:
        for callback in self.all:
            callback.on_job_start(config=config, **more)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **more: Any) -> None:
        for callback in self.all:
            callback.on_job_end(config=config, job_return=job_return, **more)


@contextlib.contextmanager
def _importable_elsewhere() -> Iterator[None]:
    """Let processes that a launcher starts import the project and what lies beside the command."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CONFIGS.parent), os.getcwd(), before]))
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _line(command: Command, folder: Path) -> list[str]:
    more = [] if "sweep_dir" in command.keys else [f"sweep_dir={folder}"]
    return [sys.argv[0], *command.arguments, *more]


def _report(sweep: Path, runs: list[Path]) -> int:
    """Say what became of each run; the exit code: 0 all are done, 2 some had mistakes of the user, 1 otherwise."""
    rows, failures, codes = [], [], set()
    goals = {str(results.get("goal")) for run in runs if (results := _results(run))}
    for run in runs:
        results, note = _results(run), status_of(run)
        if results:
            value = results.get(str(results.get("goal")))
            rows.append((run.name, "done", float("nan") if value is None else float(value)))
            continue
        rows.append((run.name, note.state, float("nan")))
        failures.append(f"{run}: {note.why}")
        codes.add(2 if note.state == "refused" else 1)
    print(table(f"\n{sweep}", [("run", "state", goals.pop() if len(goals) == 1 else "goal"), *rows]), flush=True)
    if failures:
        print("\n".join([*failures, f"{len(failures)} of the runs in {sweep} are not done."]), file=sys.stderr)
    return max(codes - {2}, default=max(codes, default=0))


def _results(run: Path) -> dict[str, Any]:
    """The numbers of a run that is finished; nothing for others, those with half a file included."""
    try:
        return dict(json.loads((run / "results.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
