r"""Search for good values of keys with Optuna: each trial is a run of train.py in a folder of its own.

    python scripts/search.py model=vit optimizer.lr=1e-4..1e-2 model.layers=2..6 optimizer.name=adamw,adam \
        trainer.steps=200 --trials 20 --study searches/vit

It takes the command line of train.py. a..b is a range: of whole numbers where both ends are written so, else of any
numbers, on a logarithmic scale where both are above 0 and the end is 10 times the start or more. a,b is a choice. All
else goes to every trial as it is.

What is searched for is the task's goal on val (AP, top1, bleu). The same line goes on after a stop or a kill: the trial
that was under way first, from its last checkpoint; it then tries the same values as a search that was never stopped. A
larger --trials searches on. FOLDER/study.db is an Optuna study in SQLite, FOLDER/trial_0003 is the run of trial 3, and
FOLDER/trial_0003.txt what it said. `scripts/compare.py FOLDER` shows all of them.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder, not the project's

from common.cli.jobs import run_script
from common.config.check import build
from common.config.compose import Command, configure
from common.config.diff import CHANGEABLE_KEYS
from common.errors import Stopped, UserError
from common.files.lock import lock

try:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.trial import TrialState
except ImportError:
    sys.exit('Optuna is not installed: pip install -e ".[sweeps]".')

ROOT = Path(__file__).resolve().parents[1]  # where train.py lies
DECADE = 10  # from this ratio of a range's ends on, it is searched on a logarithmic scale
HOPELESS = 3  # failing trials, before any good one, after which the search stops
WAIT = 2.0  # seconds between looks at a run that another process still has
CHOSEN = ("run_dir", "resume", "sweep_dir", "allow_changes")  # keys that are chosen here


class Plan(NamedTuple):
    """A search: what every trial's command line says, what is searched, and for what."""

    fixed: list[str]
    space: dict[str, BaseDistribution]
    goal: str
    direction: str  # maximize or minimize

    def line(self, values: dict[str, Any]) -> list[str]:
        """What train.py is told to run with these values."""
        return [*self.fixed, *(f"{key}={values[key]}" for key in self.space)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Search as the command line says; the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options, rest = _options(given)
    to_go_on = f"To go on: python scripts/search.py {shlex.join(given)}"
    sys.path.append(os.getcwd())  # a user's own package lies where the command is given
    try:
        search = plan(rest)
        options.study.mkdir(parents=True, exist_ok=True)
        with lock(options.study):
            study = _study(options.study, search, options.seed)
            _search(study, search, options)
        return _report(study, search, options.study)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"--study {options.study} cannot be written ({error.strerror}); name another folder.", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(f"{stop} {to_go_on}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print(f"Stopped by Ctrl-C. {to_go_on}", file=sys.stderr)
        return 130


def plan(words: Sequence[str]) -> Plan:
    """What the command line of train.py, with ranges and choices, asks for; raises UserError.

    Each choice and both ends of each range are checked, as far as that can be done before a run.
    """
    ranges = {word: found for word in words if (found := _range(word))}
    space: dict[str, BaseDistribution] = dict(ranges.values())
    command = Command("train", [word for word in words if word not in ranges])
    if command.flags.multirun or command.flags.help or command.flags.cfg:
        raise UserError("-m, --help and --cfg are for train.py; give a search key=a..b and key=a,b alone.")
    chosen = next((key for key in CHOSEN if key in command.keys), None)
    if chosen:
        raise UserError(f"{chosen}= is chosen for each trial; --study names the folder of all.")
    choices = {}
    for word, one in zip(command.flags.overrides, command.parse(command.overrides), strict=True):
        if one.is_sweep_override():
            if not one.is_discrete_sweep():
                raise UserError(f"{word}: expected values or a range, as in key=a,b or key=1..9.")
            values = list(one.sweep_string_iterator())
            choices[word] = space[one.get_key_element()] = CategoricalDistribution(list(dict.fromkeys(values)))
    if not space:
        raise UserError("There is nothing to search: give a range, as optimizer.lr=1e-4..1e-2, or a choice, key=a,b.")
    fixed = [word for word in words if word not in ranges and word not in choices]
    return Plan(fixed, space, *_goal(fixed, space))


def _range(word: str) -> tuple[str, BaseDistribution] | None:
    """A key and its range, from key=a..b; None for another word."""
    key, _, value = word.partition("=")
    ends = value.split("..", 1)
    try:
        low, high = (float(end) for end in ends)
    except ValueError:
        return None
    if not low < high or not math.isfinite(high - low):
        raise UserError(f"{word}: expected a range from a smaller number to a larger one, as {key}=1..9.")
    if all(end.strip().lstrip("+-").isdigit() for end in ends):
        return key, IntDistribution(int(low), int(high))
    return key, FloatDistribution(low, high, log=low > 0 and high / low >= DECADE)


def _goal(fixed: list[str], space: dict[str, BaseDistribution]) -> tuple[str, str]:
    """The name and direction of what is searched for, after a check of the values that can be tried."""
    tried = {key: _corners(distribution) for key, distribution in space.items()}
    first = {key: values[0] for key, values in tried.items()}
    goals = set()
    for key, value in [(key, value) for key, values in tried.items() for value in values]:
        config = configure("train", [*fixed, *(f"{name}={one}" for name, one in {**first, key: value}.items())])
        goal = build(config["task"], data=build(config["data"])).goal  # which its constructor may choose
        goals.add((f"val/{goal.name}", "maximize" if goal.higher_is_better else "minimize"))
    if len(goals) > 1:
        raise UserError(
            f"These trials have several goals ({', '.join(sorted(name for name, _ in goals))}); search one."
        )
    return goals.pop()


def _corners(distribution: BaseDistribution) -> Sequence[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    return distribution.low, distribution.high


def _study(folder: Path, search: Plan, seed: int) -> optuna.Study:
    """The study in a folder, made when missing; raises UserError when it is of another search."""
    if {*str(folder)} & {*"?{}"}:
        raise UserError(f"--study {folder}: Optuna takes no folder with ?, {{ or }} in its name; name another.")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder / 'study.db'}")
    study = optuna.create_study(storage=storage, study_name="search", direction=search.direction, load_if_exists=True)
    fixed = sorted(word for word in search.fixed if word.partition("=")[0].lstrip("+~") not in CHANGEABLE_KEYS)
    asked = {"fixed": fixed, "space": {key: str(space) for key, space in sorted(search.space.items())}, "seed": seed}
    for name, value in asked.items():
        before = study.user_attrs.get(name)
        if before is None:
            study.set_user_attr(name, value)
        elif before != value:
            raise UserError(f"{folder} holds another search: {name} was {before} and is {value}; name another --study.")
    return study


def _search(study: optuna.Study, search: Plan, options: argparse.Namespace) -> None:
    """Run trials until there are as many as asked for; raises Stopped, and UserError when all of the first fail."""
    failures, succeeded = 0, False
    while (trial := _next(study, options.trials)) is not None:
        values = _values(study, trial, search, options.seed)
        folder = options.study / f"trial_{trial.number:04d}"
        said = shlex.join(f"{key}={value}" for key, value in values.items())
        print(f"{folder.name} ({trial.number + 1} of {options.trials}): {said}", flush=True)
        stopped = _train([*search.line(values), f"run_dir={folder}", "resume=auto"], folder)
        value = _result(folder, search.goal)
        if value is not None:
            study.tell(trial, value)
            succeeded = True
            print(f"  {search.goal} {value:.4f}, best {study.best_value:.4f}", flush=True)
        elif stopped is None:
            why = _last_words(folder)
            trial.set_user_attr("why", why)
            study.tell(trial, state=TrialState.FAIL)
            failures += 1
            print(f"  failed: {why}", flush=True)
        if stopped is not None:
            raise stopped
        if failures >= HOPELESS and not succeeded:
            raise UserError(f"The first {HOPELESS} trials failed; mend what they say, or search elsewhere.")


def _next(study: optuna.Study, count: int) -> optuna.Trial | None:
    """A trial that was begun, or else a new one; None when there are `count`."""
    trials = study.get_trials(deepcopy=False)
    begun = [trial for trial in trials if trial.state == TrialState.RUNNING]
    if begun:
        return optuna.Trial(study, begun[0]._trial_id)
    return study.ask() if len(trials) < count else None


def _values(study: optuna.Study, trial: optuna.Trial, search: Plan, seed: int) -> dict[str, Any]:
    """What the trial tries. A trial that was begun keeps what it has.

    Each value has a seed of its own, so that a search draws the same after a kill, wherever that came. Values are
    drawn one by one (Bergstra et al. 2011, section 4), which `multivariate` would do together.
    """
    for key, distribution in search.space.items():
        digest = hashlib.blake2b(f"{seed} {trial.number} {key}".encode(), digest_size=4).digest()
        study.sampler = optuna.samplers.TPESampler(seed=int.from_bytes(digest, "big"), multivariate=False)
        trial._suggest(key, distribution)  # what its suggest_ methods call
    return {key: trial.params[key] for key in search.space}


def _train(line: list[str], folder: Path) -> Stopped | None:
    """Run train.py to its end; gives what stopped it, if it was told to stop.

    A run that a killed search has left behind is waited for.
    """
    while True:
        code, signals = run_script(ROOT / "train.py", line, folder.with_suffix(".txt"))
        if not (code == 2 and " is in use by " in _last_words(folder)):
            break
        print(f"  {folder} is in use by a run that is left from before; waiting for its end", flush=True)
        while _in_use(folder):
            time.sleep(WAIT)
    signals = signals or {130: ["SIGINT"], 143: ["SIGTERM"]}.get(code, [])
    return Stopped(signals, f"in {folder}") if signals else None


def _in_use(folder: Path) -> bool:
    try:
        with lock(folder) if folder.is_dir() else contextlib.nullcontext():
            return False
    except UserError:
        return True


def _result(folder: Path, goal: str) -> float | None:
    """The goal's best value on val of a finished run; None without one that is a number."""
    try:
        value = json.loads((folder / "results.json").read_text(encoding="utf-8")).get(goal)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _last_words(folder: Path) -> str:
    """Why a run has no result: the last line that it said."""
    lines = folder.with_suffix(".txt").read_text("utf-8", "replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "it was killed before it said anything")


def _report(study: optuna.Study, search: Plan, folder: Path) -> int:
    """Say which trial is the best, and the line that runs it again; the exit code."""
    trials = study.get_trials(deepcopy=False)
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if not done:
        print(f"None of the {len(trials)} trials in {folder} has a result.", file=sys.stderr)
        return 1
    best = study.best_trial
    print(f"{len(trials)} trials, {len(trials) - len(done)} of them failed; the best is trial_{best.number:04d}:")
    print("\n".join(f"  {key}={value}" for key, value in best.params.items()))
    print(f"  {search.goal} {best.value:.4f}")
    print(f"again     python train.py {shlex.join(search.line(best.params))}")
    print(f"compare   python scripts/compare.py {shlex.quote(str(folder))}")
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
    parser.add_argument("--trials", type=int, required=True, help="how many in all, those that are done included")
    parser.add_argument("--study", type=Path, required=True, metavar="FOLDER", help="where the search lies")
    parser.add_argument("--seed", type=int, default=0, help="of the search; the runs have their own, seed= (default 0)")
    return parser.parse_known_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
