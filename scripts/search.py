r"""Search for good values of config keys with Optuna; each trial is a run of train.py in its own folder.

    python scripts/search.py model=vit optimizer.lr=1e-4..1e-2 model.layers=2..6 optimizer.name=adamw,adam \
        trainer.steps=200 --trials 20 --study searches/vit

The arguments are those of train.py, but a value may be a range or a choice. key=a..b is a range. If both ends are
written as integers, it is a range of integers, otherwise a range of floats. Floats are sampled on a logarithmic scale
if the start of the range is above 0 and its end is at least 10 times the start. key=a,b is a choice of values. All
other arguments are passed to every trial unchanged.

The objective is the metric on val by which the task selects its best checkpoint (AP, top1, bleu). After a signal or a
kill, the same command resumes the search. The interrupted trial is resumed first, from its last checkpoint. Further
trials then get the values that they would have got in an uninterrupted search. A larger --trials extends a search.

--study is the folder of the search. In it, study.db is an Optuna study in SQLite, trial_0003 is the folder of the run
of trial 3, and trial_0003.txt holds what this run printed. `scripts/compare.py FOLDER` shows the trials in this folder.
Trials that ended with an error in their config or data before their first checkpoint are not shown.
"""

import argparse
import contextlib
import hashlib
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Python adds only the script's own folder

from common.cli import start
from common.cli.command import to_run
from common.cli.jobs import run_script
from common.config.check import build
from common.config.compose import Command, configure
from common.config.diff import CHANGEABLE_KEYS
from common.errors import Stopped, UserError
from common.files import names
from common.files.lock import lock
from common.files.records import read_record
from common.machine import console

try:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.exceptions import StorageInternalError
    from optuna.trial import TrialState
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import OperationalError
except ImportError:
    print("Optuna is not installed; install it (pip install optuna).", file=sys.stderr)
    sys.exit(2)

DATABASE = "study.db"  # in the folder of the search
ROOT = Path(__file__).resolve().parents[1]  # the folder of train.py
LOG_SCALE_RATIO = 10  # a range of floats above 0 is logarithmic if its end is at least this many times its start
# A search stops when this many trials have failed since its last start or resumption, if no trial of the study has ever
# succeeded.
MAX_INITIAL_FAILURES = 3
POLL_SECONDS = 2.0  # time between two checks of whether another process still uses a run's folder
Direction = Literal["minimize", "maximize"]
RESERVED_KEYS = ("run_dir", "resume", "sweep_dir", "allow_changes")  # users may not give these keys


class Plan(NamedTuple):
    """A search: the arguments that all trials share, the search space, and the objective."""

    fixed: list[str]  # arguments of train.py
    space: dict[str, BaseDistribution]  # config key -> choice or range
    goal: str  # the name of the metric that is the objective, such as val/AP
    direction: Direction

    def arguments(self, values: dict[str, Any]) -> list[str]:
        """Return the arguments of train.py for a trial with these values."""
        return [*self.fixed, *(f"{key}={values[key]}" for key in self.space)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or resume the search that the command line describes; returns the exit code."""
    console.guard()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options, train_arguments = _options(arguments)
    advice = f"To resume: {to_run('scripts/search.py')} {names.shell_command(arguments)}"
    try:
        if options.trials < 1:
            raise UserError(f"--trials {options.trials}: expected a whole number from 1.")
        search = plan(train_arguments)
        options.study.mkdir(parents=True, exist_ok=True)
        with lock(options.study):
            study = _open_study(options.study, search, options.seed)
            _run_trials(study, search, options)
        return _report(study, search, options.study)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"--study {options.study} cannot be written ({error.strerror}); name another folder.", file=sys.stderr)
        return 2
    except (OperationalError, StorageInternalError) as error:
        reason = f"{options.study / DATABASE} cannot be read or written ({_first_cause(error)})"
        print(f"{reason}; make room. {advice}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(f"{stop} {advice}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print(f"Stopped by Ctrl-C. {advice}", file=sys.stderr)
        return 130


def _first_cause(error: BaseException) -> BaseException:
    """Return the first exception in the chain of causes of `error`: SQLite's own error, whose message has one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def plan(arguments: Sequence[str]) -> Plan:
    """Parse arguments of train.py that contain ranges and choices.

    Raises UserError for invalid arguments. To check the arguments, a config is composed for each value of a choice and
    for both ends of each range, and the data and the task are built from each config.
    """
    ranges = {word: pair for word in arguments if (pair := _range(word))}
    space: dict[str, BaseDistribution] = dict(ranges.values())
    command = Command("train", [word for word in arguments if word not in ranges], sweep=True)
    if command.flags.multirun or command.flags.help or command.flags.cfg:
        raise UserError("-m, --help and --cfg are for train.py; a search takes key=value, key=a..b and key=a,b only.")
    reserved = next((key for key in RESERVED_KEYS if key in command.keys), None)
    if reserved:
        raise UserError(f"{reserved}= cannot be set for a search; leave it out, and give --study for the folder.")
    choices = {}
    for word, override in zip(command.flags.overrides, command.parse(command.overrides), strict=True):
        if override.is_sweep_override():
            if not override.is_discrete_sweep():
                raise UserError(f"{word}: expected values or a range, as in key=a,b or key=1..9.")
            values = list(override.sweep_string_iterator())
            choices[word] = space[override.get_key_element()] = CategoricalDistribution(list(dict.fromkeys(values)))
    if not space:
        raise UserError(
            "There is nothing to search: give a range, such as optimizer.lr=1e-4..1e-2, or a choice, key=a,b."
        )
    fixed = [word for word in arguments if word not in ranges and word not in choices]
    return Plan(fixed, space, *_goal(fixed, space))


def _range(word: str) -> tuple[str, BaseDistribution] | None:
    """Parse an argument key=a..b into the key and its range; returns None for an argument of another form.

    Raises UserError if a is not smaller than b, or if b - a is not finite.
    """
    key, _, value = word.partition("=")
    ends = value.split("..", 1)
    try:
        low, high = (float(end) for end in ends)
    except ValueError:
        return None
    if not low < high or not math.isfinite(high - low):
        raise UserError(f"{word}: expected a range from a smaller number to a larger one, such as {key}=1..9.")
    if all(end.strip().lstrip("+-").isdigit() for end in ends):
        return key, IntDistribution(int(low), int(high))
    return key, FloatDistribution(low, high, log=low > 0 and high / low >= LOG_SCALE_RATIO)


def _goal(fixed: list[str], space: dict[str, BaseDistribution]) -> tuple[str, Direction]:
    """Return the name and the direction of the objective.

    Raises UserError if the config is invalid with one of the values of `_values_to_check`, or if these values lead to
    different objectives.
    """
    candidates = {key: _values_to_check(distribution) for key, distribution in space.items()}
    first = {key: values[0] for key, values in candidates.items()}
    goals: set[tuple[str, Direction]] = set()
    for key, value in [(key, value) for key, values in candidates.items() for value in values]:
        config = configure("train", [*fixed, *(f"{name}={setting}" for name, setting in {**first, key: value}.items())])
        goal = build(config["task"], data=build(config["data"])).goal  # the task's constructor may choose the goal
        goals.add((f"val/{goal.name}", "maximize" if goal.higher_is_better else "minimize"))
    if len(goals) > 1:
        raise UserError(
            f"These trials have different goals ({', '.join(sorted(name for name, _ in goals))}), so they cannot be "
            "compared; search only keys that do not change the goal."
        )
    return goals.pop()


def _values_to_check(distribution: BaseDistribution) -> Sequence[Any]:
    """Return the values of a distribution that are checked before training: all choices, or both ends of a range."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    return distribution.low, distribution.high


def _open_study(folder: Path, search: Plan, seed: int) -> optuna.Study:
    """Open or create the study in a folder.

    Raises UserError if the study belongs to another search, or if Optuna does not accept the name of the folder.
    """
    if {*str(folder)} & {*"?{}"}:
        raise UserError(f"--study {folder}: Optuna accepts no folder with ?, {{ or }} in its name; name another.")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(_database_url(folder / DATABASE))
    study = optuna.create_study(storage=storage, study_name="search", direction=search.direction, load_if_exists=True)
    fixed = sorted(word for word in search.fixed if word.partition("=")[0].lstrip("+~") not in CHANGEABLE_KEYS)
    attributes = {
        "fixed": fixed,
        "space": {key: str(space) for key, space in sorted(search.space.items())},
        "seed": seed,
    }
    for name, value in attributes.items():
        stored = study.user_attrs.get(name)
        if stored is None:
            study.set_user_attr(name, value)
        elif stored != value:
            raise UserError(f"{folder} holds another search: {name} was {stored} and is {value}; name another --study.")
    return study


def _database_url(file: Path) -> str:
    """Return the URL with which SQLAlchemy opens a SQLite file; raises UserError if there is no such URL.

    From version 2.1 on, SQLAlchemy decodes escapes such as %41 in URLs. The % of such an escape in the file's name must
    therefore be quoted.
    """
    if names.escape(str(file)) == str(file):  # SQLite accepts only names in UTF-8
        for path in (str(file), quote(str(file))):
            if make_url(url := f"sqlite:///{path}").database == str(file):
                return url
    raise UserError(f"--study {file.parent}: Optuna accepts no folder with this name; name another.")


def _run_trials(study: optuna.Study, search: Plan, options: argparse.Namespace) -> None:
    """Run trials until the study has `options.trials` of them.

    Raises Stopped if a signal stopped a trial, and UserError if MAX_INITIAL_FAILURES trials of this call have failed
    and no trial of the study has succeeded.
    """
    failures = 0
    succeeded = any(trial.state == TrialState.COMPLETE for trial in study.get_trials(deepcopy=False))
    while (trial := _next_trial(study, options.trials)) is not None:
        values = _suggest(study, trial, search, options.seed)
        folder = options.study / f"trial_{trial.number:04d}"
        keys = names.shell_command(f"{key}={value}" for key, value in values.items())
        print(f"{folder.name} ({trial.number + 1} of {options.trials}): {keys}", flush=True)
        stopped = _train([*search.arguments(values), f"run_dir={folder}", "resume=auto"], folder)
        value = _result(folder, search.goal)
        if value is not None:
            study.tell(trial, value)
            succeeded = True
            print(f"  {search.goal} {value:.4f}, best {study.best_value:.4f}", flush=True)
        elif stopped is None:
            reason = _last_line(folder)
            trial.set_user_attr("why", reason)
            study.tell(trial, state=TrialState.FAIL)
            failures += 1
            print(f"  failed: {reason}", flush=True)
        if stopped is not None:
            raise stopped
        if failures >= MAX_INITIAL_FAILURES and not succeeded:
            raise UserError(
                f"{failures} trials failed, and none has succeeded; fix their errors, or search other values."
            )


def _next_trial(study: optuna.Study, count: int) -> optuna.Trial | None:
    """Return an interrupted trial if there is one, otherwise a new trial; None if there are already `count` trials."""
    trials = study.get_trials(deepcopy=False)
    interrupted = [trial for trial in trials if trial.state == TrialState.RUNNING]
    if interrupted:
        return optuna.Trial(study, interrupted[0]._trial_id)
    return study.ask() if len(trials) < count else None


def _suggest(study: optuna.Study, trial: optuna.Trial, search: Plan, seed: int) -> dict[str, Any]:
    """Sample the trial's values; an interrupted trial keeps the values that it already has.

    Each value has its own seed, so a search that is killed at any point samples the same values when it is resumed.
    Keys are sampled independently (Bergstra et al. 2011, section 4). With `multivariate=True`, they would be sampled
    jointly.
    """
    for key, distribution in search.space.items():
        digest = hashlib.blake2b(f"{seed} {trial.number} {key}".encode(), digest_size=4).digest()
        study.sampler = optuna.samplers.TPESampler(seed=int.from_bytes(digest, "big"), multivariate=False)
        trial._suggest(key, distribution)  # Optuna's public suggest_ methods call this one
    return {key: trial.params[key] for key in search.space}


def _train(arguments: list[str], folder: Path) -> Stopped | None:
    """Run train.py until it ends; returns a Stopped if a signal ended it, otherwise None.

    If the run of an earlier, killed search still uses `folder`, this function waits until that run ends, and then runs
    train.py.
    """
    while True:
        code, signals = run_script(ROOT / "train.py", arguments, folder.with_suffix(".txt"))
        if not (code == 2 and " is in use by " in _last_line(folder)):
            break
        print(f"  {folder} is in use by the run of an earlier search; waiting for its end", flush=True)
        while _in_use(folder):
            time.sleep(POLL_SECONDS)
    signals = signals or {130: ["SIGINT"], 143: ["SIGTERM"]}.get(code, [])
    return Stopped(signals, f"in {folder}") if signals else None


def _in_use(folder: Path) -> bool:
    try:
        with lock(folder) if folder.is_dir() else contextlib.nullcontext():
            return False
    except UserError:
        return True


def _result(folder: Path, goal: str) -> float | None:
    """Return the best value of `goal` on val, or None if the run is unfinished or the value is not finite."""
    try:
        value = read_record(folder / "results.json").get(goal)
    except UserError:
        return None
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _last_line(folder: Path) -> str:
    """Return the last line that a run printed. If the run failed, this line says why.

    If the run printed nothing, a text that says so is returned.
    """
    lines = folder.with_suffix(".txt").read_text("utf-8", "replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "it was killed before it printed anything")


def _report(study: optuna.Study, search: Plan, folder: Path) -> int:
    """Print the best trial and the command that repeats it; returns the exit code, 1 if no trial has a result."""
    trials = study.get_trials(deepcopy=False)
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if not done:
        print(f"None of the {len(trials)} trials in {folder} has a result.", file=sys.stderr)
        return 1
    best = study.best_trial
    print(f"{len(trials)} trials, {len(trials) - len(done)} of them failed; the best is trial_{best.number:04d}:")
    print("\n".join(f"  {key}={value}" for key, value in best.params.items()))
    print(f"  {search.goal} {best.value:.4f}")
    print(f"again     {to_run('train.py')} {names.shell_command(search.arguments(best.params))}")
    print(f"compare   {to_run('scripts/compare.py')} {names.shell_command([str(folder)])}")
    return 0


def _options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        usage="%(prog)s model=NAME key=a..b key=a,b key=value ... --trials N --study FOLDER [--seed N]",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--trials", type=int, required=True, help="number of trials in total, including finished ones")
    parser.add_argument("--study", type=Path, required=True, metavar="FOLDER", help="the folder of the search")
    parser.add_argument("--seed", type=int, default=0, help="seed of the search (default 0), not of its runs")
    return parser.parse_known_args(arguments)


if __name__ == "__main__":
    start.script(main)
