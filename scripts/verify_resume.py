"""Train a config twice, kill and resume the second run, and check that both runs have bit-identical results.

    python scripts/verify_resume.py model=detr
    python scripts/verify_resume.py model=vit_b16 data.root=photos --steps 200 --kills 10

The arguments are those of train.py (except run_dir= and resume=) and the options of this script. One run trains without
interruption. A second run kills itself (SIGKILL) at random steps: before or after an update, in an evaluation, or while
it writes a checkpoint. After each kill, the run is resumed with the same arguments. Then all values in the checkpoints
(except the config), every line of metrics.jsonl, and results.json are compared. The exit code is 0 if all are equal, 1
if not, 2 if nothing can be compared, 130 after Ctrl-C, and 143 after another signal.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.machine import console, threads

os.environ.update(threads.missing_settings(os.environ))  # before torch is imported

import torch

import common.train.trainer
import train
from common.cli import main as cli
from common.cli import start
from common.cli.jobs import run_script
from common.config.compose import configure
from common.errors import Stopped, UserError
from common.files import checkpoint
from common.files.retention import CheckpointFolder
from common.train.step import Stepper

ROOT = Path(__file__).resolve().parents[1]  # the folder of train.py
# The points of a run at which it can kill itself.
MOMENTS = ("before the update", "after the update", "in an evaluation", "while it wrote a checkpoint")


class Kill(NamedTuple):
    """The time at which a run kills itself: when `moment` (one of MOMENTS) first occurs in step `step` or later."""

    step: int  # counted from 0
    moment: str


def main() -> int:
    """Train the two runs and compare them; returns the exit code."""
    console.guard()
    options = _options()
    folder = Path(options.folder or tempfile.mkdtemp(prefix="verify_resume_"))
    try:
        if any((folder / name).exists() for name in ("whole", "killed")):
            raise UserError(f"--folder {folder} holds runs already; name another folder.")
        overrides, steps = _run_overrides(options)
        kills = _sample_kills(options.kills, steps, options.seed)
        if _train(overrides, folder / "whole"):
            raise UserError(f"the uninterrupted run failed; {folder}/whole.txt says why.")
        count = sum(_train_and_kill(overrides, folder, kill) for kill in kills)
        if not count:
            raise UserError("the run was never killed, which proves nothing; give more --steps or --kills.")
        if _train(overrides, folder / "killed"):
            raise UserError(f"the killed run could not be resumed; {folder}/killed.txt says why.")
        report = compare(folder / "whole", folder / "killed")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.code
    print("\n".join(report.differences) or f"bit-equal: {report.summary}, after {count} kills")
    if not report.differences and not options.folder:
        shutil.rmtree(folder)
    return 1 if report.differences else 0


class Report(NamedTuple):
    """A text for each difference between two runs, and a summary of what was compared."""

    differences: list[str]
    summary: str


def compare(first: Path, second: Path) -> Report:
    """Compare the checkpoints, metrics.jsonl and results.json of two finished runs."""
    differences: list[str] = []
    tensors = 0
    for name in sorted({path.name for run in (first, second) for path in (run / "checkpoints").glob("*.pt")}):
        files = [run / "checkpoints" / name for run in (first, second)]
        missing = [file for file in files if not file.exists()]
        if missing:
            differences.append(f"only one run has {next(file for file in files if file.exists())}")
            continue
        one, other = ({**checkpoint.load(file), "config": None} for file in files)  # the runs' run_dir differs
        differences += [f"{name}{path}" for path in unequal_paths(one, other)]
        tensors += count_tensors(one)
    lines = [(run / "metrics.jsonl").read_text(encoding="utf-8").splitlines() for run in (first, second)]
    if lines[0] != lines[1]:
        pairs = zip(*lines, strict=False)
        number = next((number for number, (a, b) in enumerate(pairs) if a != b), min(map(len, lines)))
        differences.append(
            f"metrics.jsonl: {len(lines[0])} and {len(lines[1])} lines, which differ from line {number + 1} on"
        )
    results = [json.loads((run / "results.json").read_text(encoding="utf-8")) for run in (first, second)]
    if results[0] != results[1]:
        differences.append(f"results.json: {results[0]} and {results[1]}")
    steps = CheckpointFolder(first / "checkpoints", writes=False).steps()
    summary = f"{tensors} tensors in {len(steps)} checkpoints and best.pt, and {len(lines[0])} lines of metrics.jsonl"
    return Report(differences, summary)


def unequal_paths(a: Any, b: Any, path: str = "") -> list[str]:
    """Return the paths, such as `/optimizer/3`, at which the nested dicts, lists and tuples `a` and `b` differ.

    `path` is the path of `a` and `b` themselves, with which all results begin. Tensors are compared by dtype, shape and
    bits, other values by type and `==`. Two NaNs are equal.
    """
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [inner for key in a for inner in unequal_paths(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple) and type(a) is type(b) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [inner for number, pair in pairs for inner in unequal_paths(*pair, f"{path}/{number}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return [] if same and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes() else [path]
    return [] if type(a) is type(b) and (a == b or a != a) else [path]  # NaN equals NaN


def count_tensors(content: Any) -> int:
    """Return the number of tensors in a checkpoint's nested content."""
    if isinstance(content, dict | list | tuple):
        return sum(map(count_tensors, content.values() if isinstance(content, dict) else content))
    return int(isinstance(content, torch.Tensor))


def _options() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("overrides", nargs="+", help="the command line of train.py: model=NAME key=value ...")
    parser.add_argument("--steps", type=int, default=40, help="steps of each run (default 40); 0: as in the config")
    parser.add_argument("--kills", type=int, default=5, help="number of kills of the second run (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed from which the kills are sampled (default 0)")
    parser.add_argument("--folder", help="the folder for both runs; by default they are deleted if all is equal")
    return parser.parse_intermixed_args()


def _run_overrides(options: argparse.Namespace) -> tuple[list[str], int]:
    """Return the arguments for train.py, except run_dir and resume, and a number of steps.

    Kills are sampled from the steps below this number, which is --steps, or the config's trainer.steps if --steps is 0.
    If --steps is not 0, arguments are added that make both runs train for --steps steps, and save, evaluate and log
    several times. On a GPU, trainer.deterministic=true is added. A key that the command line sets keeps its value.
    Raises UserError if the command line sets run_dir or resume, or if --steps is 0 and the config has no trainer.steps.
    """
    overrides, keys = list(options.overrides), {word.partition("=")[0] for word in options.overrides}
    for key in ("run_dir", "resume"):
        if key in keys:
            raise UserError(f"{key}= is set by this script; give --folder to keep the runs.")
    config = configure("train", overrides)
    if torch.cuda.is_available() and config["trainer"]["device"] in ("auto", "cuda"):
        overrides += [] if "trainer.deterministic" in keys else ["trainer.deterministic=true"]
    steps = options.steps
    if not steps:
        if config["trainer"]["steps"] is None:
            raise UserError("--steps 0 needs a config with trainer.steps; give the number of steps.")
        return overrides, config["trainer"]["steps"]
    short = {"trainer.epochs": "null", "trainer.steps": str(steps), "trainer.save_every": str(max(1, steps // 7)),
             "trainer.eval_every": str(max(1, steps // 3)), "trainer.log_every": str(max(1, steps // 11))}  # fmt: skip
    return overrides + [f"{key}={value}" for key, value in short.items() if key not in keys], steps


def _sample_kills(count: int, steps: int, seed: int) -> list[Kill]:
    """Sample `count` kills at random steps, in ascending order; their moments cycle through the shuffled MOMENTS."""
    rng = random.Random(seed)
    kill_steps = sorted(rng.randrange(steps) for _ in range(count))
    moments = rng.sample(MOMENTS, len(MOMENTS))
    return [Kill(step, moments[number % len(moments)]) for number, step in enumerate(kill_steps)]


def _train_and_kill(overrides: list[str], folder: Path, kill: Kill) -> bool:
    """Start or resume the second run, which kills itself at `kill`; returns whether it was killed.

    The run is not killed if it finishes before `kill`. Raises UserError if the run's process fails without being killed
    by SIGKILL.
    """
    code = _train(overrides, folder / "killed", kill)
    if code == 0:
        print(f"not killed {kill.moment}, after {kill.step} steps: the run ended first", flush=True)
        return False
    if code != -signal.SIGKILL:
        raise UserError(
            f"the run should have been killed {kill.moment} and ended with exit code {code}; "
            f"{folder}/killed.txt says why."
        )
    steps = CheckpointFolder(folder / "killed" / "checkpoints", writes=False).steps()
    start = f"step {steps[-1]}" if steps else "the start"
    print(f"killed {kill.moment}, at step {kill.step} or later; resuming from {start}", flush=True)
    return True


def _train(overrides: list[str], run: Path, kill: Kill | None = None) -> int:
    """Train in a separate process, which kills itself at `kill` if `kill` is given; returns the process's exit code.

    The process's output is appended to a file beside the run's folder: RUN.txt for the folder RUN. Raises Stopped if a
    signal was forwarded to the process.
    """
    run.parent.mkdir(parents=True, exist_ok=True)
    arguments = [*overrides, f"run_dir={run}", "resume=auto"]
    if kill:
        arguments = ["--kill-at", str(kill.step), kill.moment, *arguments]
    code, signals = run_script(Path(__file__) if kill else ROOT / "train.py", arguments, run.with_suffix(".txt"))
    if signals:
        raise Stopped(signals, f"in {run}")
    return code


def _train_until(step: str, moment: str, *arguments: str) -> NoReturn:
    """Run train.py in this process, which kills itself when `moment` first occurs in step `step` or later."""
    _install(Kill(int(step), moment))
    sys.argv[0] = "train.py"
    cli.launch(train.train, "train", None, arguments)


def _install(kill: Kill) -> None:
    """Patch the trainer and torch.save so that this process kills itself at `kill`."""
    current = -1

    def die_at(moment: str) -> None:
        if moment == kill.moment and current >= kill.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def step(original: Callable[..., Any], stepper: Stepper, batches: Any, number: int) -> Any:
        nonlocal current
        current = number
        die_at("before the update")
        parts = original(stepper, batches, number)
        die_at("after the update")
        return parts

    def evaluate(original: Callable[..., Any], task: Any, *arguments: Any, **options: Any) -> Any:
        die_at("in an evaluation")
        return original(task, *arguments, **options)

    def save(original: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        original(*arguments, **options)
        die_at("while it wrote a checkpoint")  # the temporary file is written, but not yet renamed

    Stepper.__call__ = _as_method(step, Stepper.__call__)  # type: ignore[method-assign]
    common.train.trainer.evaluate = partial(evaluate, common.train.trainer.evaluate)  # type: ignore[attr-defined]
    torch.save = partial(save, torch.save)


def _as_method(patch: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that calls `patch(original, ...)` and can replace a method.

    Python passes `self` to a function that is a class attribute, but not to a `partial`.
    """

    def call(*arguments: Any) -> Any:
        return patch(original, *arguments)

    return call


if __name__ == "__main__":
    if sys.argv[1:2] == ["--kill-at"]:  # internal: how _train starts a run that kills itself
        _train_until(*sys.argv[2:])
    start.script(main)
