"""Prove that a run which is killed and continued ends bit for bit where an unbroken one ends, on a config of yours.

    python scripts/verify_resume.py model=detr
    python scripts/verify_resume.py model=vit_b16 data.root=photos --steps 200 --kills 10

It takes the command line of train.py. One run trains without a break. A second one kills itself (SIGKILL) at random
steps, in an update, in an evaluation or while it writes a checkpoint, and is continued with the same line each time.
Then every tensor of all checkpoints and every line of metrics.jsonl are compared. Exit code 0: all are equal.
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

import torch

import common.train.trainer
import train
from common.cli import main as cli
from common.cli.jobs import run_script
from common.config.compose import configure
from common.errors import Stopped, UserError
from common.files import checkpoint
from common.files.retention import CheckpointFolder
from common.train.step import Stepper

ROOT = Path(__file__).resolve().parents[1]  # where train.py lies
PLACES = ("before the update", "after the update", "in an evaluation", "while it wrote a checkpoint")


class Death(NamedTuple):
    """When a run kills itself: at the first `place` it comes to at this step or later."""

    step: int
    place: str


def main() -> int:
    """Train twice and compare; the exit code."""
    options = _options()
    folder = Path(options.folder or tempfile.mkdtemp(prefix="verify_resume_"))
    try:
        if any((folder / name).exists() for name in ("whole", "killed")):
            raise UserError(f"--folder {folder} holds runs already; name another folder.")
        line, steps = _line(options)
        deaths = _deaths(options.kills, steps, options.seed)
        if _train(line, folder / "whole"):
            raise UserError(f"the unbroken run failed; {folder}/whole.txt says why.")
        kills = [death for death in deaths if _die(line, folder, death)]
        if not kills:
            raise UserError("the run was not killed once, which proves nothing; give more --steps or --kills.")
        if _train(line, folder / "killed"):
            raise UserError(f"the killed run could not be continued; {folder}/killed.txt says why.")
        report = compare(folder / "whole", folder / "killed")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.code
    print("\n".join(report.differences) or f"bit-equal: {report.said}, after {len(kills)} kills")
    if not report.differences and not options.folder:
        shutil.rmtree(folder)
    return 1 if report.differences else 0


class Report(NamedTuple):
    """What differs between two runs, and what was compared."""

    differences: list[str]
    said: str


def compare(one: Path, other: Path) -> Report:
    """Two finished runs: the last checkpoint, best.pt, metrics.jsonl and results.json; all of it must be equal."""
    differences: list[str] = []
    tensors = 0
    for name in sorted({path.name for run in (one, other) for path in (run / "checkpoints").glob("*.pt")}):
        files = [run / "checkpoints" / name for run in (one, other)]
        missing = [file for file in files if not file.exists()]
        if missing:
            differences.append(f"only one run has {next(file for file in files if file.exists())}")
            continue
        contents = [{**checkpoint.load(file), "config": None} for file in files]  # which names the run's own folder
        differences += [f"{name}{where}" for where in unequal(*contents)]
        tensors += count_tensors(contents[0])
    lines = [(run / "metrics.jsonl").read_text(encoding="utf-8").splitlines() for run in (one, other)]
    if lines[0] != lines[1]:
        pairs = zip(*lines, strict=False)
        first = next((number for number, (a, b) in enumerate(pairs) if a != b), min(map(len, lines)))
        differences.append(
            f"metrics.jsonl: {len(lines[0])} and {len(lines[1])} lines, unequal from line {first + 1} on"
        )
    results = [json.loads((run / "results.json").read_text(encoding="utf-8")) for run in (one, other)]
    if results[0] != results[1]:
        differences.append(f"results.json: {results[0]} and {results[1]}")
    count = len(CheckpointFolder(one / "checkpoints", writes=False).steps())
    said = f"{tensors} tensors in {count} checkpoints and best.pt"
    return Report(differences, f"{said}, and {len(lines[0])} lines of metrics.jsonl")


def unequal(one: Any, other: Any, where: str = "") -> list[str]:
    """The places in which two contents differ in any bit."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [place for key in one for place in unequal(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple) and type(one) is type(other) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [place for number, pair in pairs for place in unequal(*pair, f"{where}/{number}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        return [] if same and one.numpy(force=True).tobytes() == other.numpy(force=True).tobytes() else [where]
    return [] if type(one) is type(other) and (one == other or one != one) else [where]


def count_tensors(content: Any) -> int:
    """How many tensors a checkpoint holds."""
    if isinstance(content, dict | list | tuple):
        return sum(map(count_tensors, content.values() if isinstance(content, dict) else content))
    return int(isinstance(content, torch.Tensor))


def _options() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("overrides", nargs="+", help="what train.py takes: model=NAME key=value ...")
    parser.add_argument("--steps", type=int, default=40, help="length of the runs; 0 is the config's own (default 40)")
    parser.add_argument("--kills", type=int, default=5, help="how often the second run is killed (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the random steps (default 0)")
    parser.add_argument("--folder", help="where both runs are kept; otherwise they go when all is equal")
    return parser.parse_intermixed_args()


def _line(options: argparse.Namespace) -> tuple[list[str], int]:
    """train.py's arguments but for the folder, and the number of steps.

    A short run gets checkpoints and evaluations inside, where the command line does not say when.
    """
    overrides, given = list(options.overrides), {word.partition("=")[0] for word in options.overrides}
    for key in ("run_dir", "resume"):
        if key in given:
            raise UserError(f"{key}= is chosen here; give --folder to keep the runs.")
    config = configure("train", overrides)
    if torch.cuda.is_available() and config["trainer"]["device"] in ("auto", "cuda"):
        overrides += [] if "trainer.deterministic" in given else ["trainer.deterministic=true"]
    steps = options.steps
    if not steps:
        if config["trainer"]["steps"] is None:
            raise UserError("--steps 0 needs a config with trainer.steps; give the number of steps.")
        return overrides, config["trainer"]["steps"]
    short = {"trainer.epochs": "null", "trainer.steps": str(steps), "trainer.save_every": str(max(1, steps // 7)),
             "trainer.eval_every": str(max(1, steps // 3)), "trainer.log_every": str(max(1, steps // 11))}  # fmt: skip
    return overrides + [f"{key}={value}" for key, value in short.items() if key not in given], steps


def _deaths(kills: int, steps: int, seed: int) -> list[Death]:
    draw = random.Random(seed)
    at = sorted(draw.randrange(steps) for _ in range(kills))
    places = draw.sample(PLACES, len(PLACES))
    return [Death(step, places[number % len(places)]) for number, step in enumerate(at)]


def _die(line: list[str], folder: Path, death: Death) -> bool:
    """Whether the run could be killed there: after its last step, say, it comes to its end before another update."""
    code = _train(line, folder / "killed", death)
    if code == 0:
        print(f"not killed {death.place}, after {death.step} steps: there was none any more", flush=True)
        return False
    if code != -signal.SIGKILL:
        how = f"was to be killed {death.place} and ended with code {code}"
        raise UserError(f"the run {how}; {folder}/killed.txt says why.")
    steps = CheckpointFolder(folder / "killed" / "checkpoints", writes=False).steps()
    place = f"step {steps[-1]}" if steps else "the start"
    print(f"killed {death.place}, after {death.step} steps or at the next chance; goes on from {place}", flush=True)
    return True


def _train(line: list[str], run: Path, death: Death | None = None) -> int:
    """Train in a process of its own, whose words go to a file beside the run's folder; its exit code."""
    run.parent.mkdir(parents=True, exist_ok=True)
    arguments = [*line, f"run_dir={run}", "resume=auto"]
    doom = ["--death", str(death.step), death.place] if death else []
    code, signals = run_script(
        Path(__file__) if death else ROOT / "train.py", [*doom, *arguments], run.with_suffix(".txt")
    )
    if signals:
        raise Stopped(signals, f"in {run}")
    return code


def _train_until(step: str, place: str, *arguments: str) -> NoReturn:
    _doom(Death(int(step), place))
    sys.argv[0] = "train.py"
    cli.launch(train.train, "train", None, arguments)


def _doom(death: Death) -> None:
    """Put the death into this process's trainer."""
    now = -1

    def die_at(place: str) -> None:
        if place == death.place and now >= death.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def step(real: Callable[..., Any], stepper: Stepper, batches: Any, number: int) -> Any:
        nonlocal now
        now = number
        die_at("before the update")
        parts = real(stepper, batches, number)
        die_at("after the update")
        return parts

    def evaluate(real: Callable[..., Any], task: Any, *arguments: Any, **options: Any) -> Any:
        die_at("in an evaluation")
        return real(task, *arguments, **options)

    def save(real: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        die_at("while it wrote a checkpoint")  # the bytes are there, the name is not

    Stepper.__call__ = _wrapped(step, Stepper.__call__)  # type: ignore[method-assign]
    common.train.trainer.evaluate = partial(evaluate, common.train.trainer.evaluate)
    torch.save = partial(save, torch.save)


def _wrapped(outer: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
    """A function, which unlike `partial` becomes a method."""

    def call(*arguments: Any) -> Any:
        return outer(real, *arguments)

    return call


if __name__ == "__main__":
    if sys.argv[1:2] == ["--death"]:  # as it calls itself
        _train_until(*sys.argv[2:])
    sys.exit(main())
