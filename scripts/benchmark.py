"""Time ours against the peers that users would take instead: `python scripts/benchmark.py detr`.

All contenders do the same work on the same inputs with the same weights, in one process, in turns that are drawn anew
every round; before that their outputs are compared. Reported are each contender's median time, what it gets through in
a second, what part that is of the rate of a large matrix product in the same turns (scripts/benchmarks/flops.py), and
the memory it takes (peak.py); and of each pair the ratio of the medians, with the quartiles of the rounds' own ratios:
below one, the first is faster. With --scaling it shows how cost grows with what is put in; with --against, which ratios
an earlier report's are now.
"""

import argparse
import gc
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder, not the project's

import torch

from common.errors import UserError
from common.machine import device as devices
from scripts.benchmarks import against, machine, peak, report, scaling
from scripts.benchmarks.timing import Disagreement, Row, Setting, measure, with_peaks

SUITES = {
    "detr": "scripts.benchmarks.detr",
    "vit": "scripts.benchmarks.vit",
    "seq2seq": "scripts.benchmarks.seq2seq",
    "coco": "scripts.benchmarks.coco",
}
ROUNDS, WARM_UP = 20, 3
SCALING_ROUNDS, SCALING_WARM_UP = 5, 1  # of many sizes, whose growth is seen beyond the spread
T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for, print it and write it; returns the exit code."""
    options = _options(arguments)
    try:
        earlier = against.read(options.against) if options.against else None
        if options.out and not options.out.resolve().parent.is_dir():
            raise UserError(f"--out {options.out}: there is no folder {options.out.resolve().parent}; make it first.")
        measured = _run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except Disagreement as error:
        print(f"The outputs were compared before times were taken, and differ. {error}", file=sys.stderr)
        return 1
    print(report.text(measured))
    if earlier:
        measured["against"] = against.compare(earlier, measured)
        print(f"\n{against.text(measured['against'], options.against)}")
    if options.out:
        options.out.write_text(json.dumps(measured, indent=1), encoding="utf-8")
        print(f"Every round's times lie in {options.out}.")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n\n")[0], allow_abbrev=False)
    parser.add_argument("suite", choices=[*SUITES, "all"])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    parser.add_argument("--rows", help="which of the suite's rows or scalings, with commas between; by default all")
    parser.add_argument("--scaling", action="store_true", help="instead of the rows, how cost grows with the input")
    parser.add_argument(
        "--rounds", type=int, help=f"times for each contender ({ROUNDS}; {SCALING_ROUNDS} of a scaling)"
    )
    parser.add_argument("--warm-up", type=int, help=f"rounds before these ({WARM_UP}; {SCALING_WARM_UP} of a scaling)")
    parser.add_argument("--threads", type=int, help="on the CPU; by default as many as PyTorch takes")
    parser.add_argument("--compile", action="store_true", help="time torch.compile's versions, too")
    parser.add_argument(
        "--images", type=Path, help="a folder of JPEGs for the input pipeline; by default some are made"
    )
    parser.add_argument("--batch", type=int, help="images or sentences at once in the rows of throughput")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that everything runs")
    parser.add_argument("--out", type=Path, help="a JSON file for the report with every round's times")
    parser.add_argument("--against", type=Path, help="a file of an earlier --out, to see what changed since")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds if options.rounds is not None else SCALING_ROUNDS if options.scaling else ROUNDS
    if options.warm_up is None:
        options.warm_up = SCALING_WARM_UP if options.scaling else WARM_UP
    if (
        options.rounds < 1
        or options.warm_up < 0
        or any(n is not None and n < 1 for n in (options.threads, options.batch))
    ):
        parser.error("--rounds, --threads and --batch are at least 1, --warm-up at least 0")
    return options


def _run(options: argparse.Namespace) -> dict[str, Any]:
    """The report, in plain types."""
    device = devices.select(options.device)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    where = machine.describe(device)
    found: dict[str, Any] = {
        "options": {name: str(value) for name, value in vars(options).items()},
        "machine": where,
        "versions": machine.versions(),
        "warnings": machine.warnings(where),
        "rounds": options.rounds,
        "rows": [],
        "scalings": [],
    }
    for sentence in found["warnings"]:
        print(f"Warning: {sentence}", file=sys.stderr, flush=True)
    chosen = [name for name in SUITES if options.suite in (name, "all")]
    for suite, module in {name: _module(name) for name in chosen}.items():
        if options.scaling:
            for kind in _named(suite, getattr(module, "SCALINGS", {}), options.rows).values():
                rows, grown = _scaling(suite, kind, options, device)
                found["rows"] += rows
                found["scalings"].append(grown)
        else:
            for name, build in _named(suite, module.ROWS, options.rows).items():
                found["rows"].append(_row(f"{suite} {name}", build, options, device))
    return found


def _scaling(
    suite: str, kind: scaling.Scaling, options: argparse.Namespace, device: torch.device
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of all sizes, and how they grow."""
    with _setting(options, device) as setting:
        sizes = kind.of(setting)
    rows = []
    for size in sizes:
        row = _row(f"{suite} {kind.name} {size}", partial(kind.build, size), options, device)
        rows.append({**row, "row": f"{kind.name} {size:,}: {row['row']}"})
    lines = scaling.lines([*zip(sizes, rows, strict=True)])
    return rows, {"suite": suite, "name": kind.name, "lines": lines}


def _row(
    name: str, build: Callable[[Setting], Row], options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """A row's times and its memory, for which it is made anew, since that is seen in first calls."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    with _setting(options, device) as setting:
        _forget(setting)
        measured = measure(build(setting), rounds=options.rounds, warm_up=options.warm_up, device=device)
        _forget(setting)
        return with_peaks(measured, peak.peaks(build, setting))


def _forget(setting: Setting) -> None:
    """Free an earlier row, and let the compiler begin anew: after 8 models of one class it would compile no more."""
    if setting.compile:
        torch.compiler.reset()
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def _setting(options: argparse.Namespace, device: torch.device) -> Iterator[Setting]:
    with tempfile.TemporaryDirectory() as scratch:
        yield Setting(
            device=device,
            tiny=options.tiny,
            compile=options.compile,
            images=options.images,
            scratch=Path(scratch),
            batch=options.batch,
        )


def _module(suite: str) -> ModuleType:
    try:
        return importlib.import_module(SUITES[suite])
    except ModuleNotFoundError as error:
        raise UserError(
            f"The peers of {suite} are not installed ({error.name}); pip install transformers timm."
        ) from error


def _named(suite: str, there: Mapping[str, T], wanted: str | None) -> dict[str, T]:
    """Those of a suite's rows or scalings that --rows names; all by default."""
    names = wanted.split(",") if wanted else [*there]
    if unknown := [name for name in names if name not in there]:
        raise UserError(f"--rows {','.join(unknown)}: {suite} has {', '.join(there)}.")
    return {name: there[name] for name in names}


if __name__ == "__main__":
    sys.exit(main())
