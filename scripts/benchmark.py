"""Time our models against their peers in other libraries: `python scripts/benchmark.py detr`.

A contender is one implementation, ours or a peer's. All contenders do the same work on the same inputs with the same
weights in one process, except CTranslate2, which has its own. Their outputs are compared first; then each is timed once
per round, in a random order. The report gives each contender's median time, throughput, peak memory
(scripts/benchmarks/peak.py) and FLOP rate, absolute and as a fraction of the FLOP rate of a large matrix product
(scripts/benchmarks/flops.py). For each pair of a contender and a reference, it gives the ratio of their median times
and the quartiles of the per-round ratios; a ratio below 1 means that the contender is faster. --scaling shows how time
and memory grow with the input; --against compares the ratios with those of an earlier report.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Python adds only the script's own folder

import torch

from common.cli import start
from common.errors import UserError
from common.machine import console
from common.machine import device as devices
from scripts.benchmarks import against, machine, peak, report
from scripts.benchmarks import scaling as scalings
from scripts.benchmarks.timing import MismatchError, Row, Setting, add_peaks, measure

SUITES = {
    "detr": "scripts.benchmarks.detr",
    "deformable": "scripts.benchmarks.deformable",
    "vit": "scripts.benchmarks.vit",
    "swin": "scripts.benchmarks.swin",
    "seq2seq": "scripts.benchmarks.seq2seq",
    "gpt": "scripts.benchmarks.gpt",
    "word2vec": "scripts.benchmarks.word2vec",
    "coco": "scripts.benchmarks.coco",
}
ROUNDS, WARM_UP = 20, 3
SCALING_ROUNDS, SCALING_WARM_UP = 5, 1  # fewer suffice: times differ more between sizes than between rounds
T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks that the command line names, print and write the report; returns the exit code."""
    console.guard()
    options = _options(arguments)
    try:
        earlier = against.read(options.against) if options.against else None
        if options.out and not options.out.resolve().parent.is_dir():
            raise UserError(f"--out {options.out}: there is no folder {options.out.resolve().parent}; create it first.")
        result = _run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except MismatchError as error:
        print(f"The contenders' outputs differ, so nothing was timed. {error}", file=sys.stderr)
        return 1
    print(report.text(result))
    if earlier:
        result["against"] = against.compare(earlier, result)
        print(f"\n{against.text(result['against'], options.against)}")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
        print(f"The times of all rounds are in {options.out}.")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n\n")[0], allow_abbrev=False)
    parser.add_argument("suite", choices=[*SUITES, "all"])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    parser.add_argument("--rows", help="rows (or scalings) of the suite to run, separated by commas (default: all)")
    parser.add_argument(
        "--scaling", action="store_true", help="run the scalings (how cost grows with the input) instead of the rows"
    )
    parser.add_argument("--rounds", type=int, help=f"timed rounds (default {ROUNDS}; {SCALING_ROUNDS} with --scaling)")
    parser.add_argument(
        "--warm-up", type=int, help=f"untimed rounds before those (default {WARM_UP}; {SCALING_WARM_UP} with --scaling)"
    )
    parser.add_argument("--threads", type=int, help="number of CPU threads (default: PyTorch's choice)")
    parser.add_argument("--compile", action="store_true", help="also time the models under torch.compile")
    parser.add_argument(
        "--images", type=Path, help="a folder of JPEGs for the input pipeline (default: synthetic ones)"
    )
    parser.add_argument("--batch", type=int, help="batch size in images or sentences, for rows that do not fix it")
    parser.add_argument("--tiny", action="store_true", help="toy models and inputs, to check that everything runs")
    parser.add_argument("--out", type=Path, help="the JSON file to write, with the report and the times of all rounds")
    parser.add_argument("--against", type=Path, help="compare the ratios with those in this file of an earlier --out")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds if options.rounds is not None else SCALING_ROUNDS if options.scaling else ROUNDS
    if options.warm_up is None:
        options.warm_up = SCALING_WARM_UP if options.scaling else WARM_UP
    if (
        options.rounds < 1
        or options.warm_up < 0
        or any(n is not None and n < 1 for n in (options.threads, options.batch))
    ):
        parser.error("--rounds, --threads and --batch must be at least 1, --warm-up at least 0")
    return options


def _run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmarks that `options` selects, and return the report as plain Python types."""
    device = devices.select(options.device)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    description = machine.describe(device)
    result: dict[str, Any] = {
        "options": {name: str(value) for name, value in vars(options).items()},
        "machine": description,
        "versions": machine.versions(),
        "warnings": machine.warnings(description),
        "rounds": options.rounds,
        "rows": [],
        "scalings": [],
    }
    for sentence in result["warnings"]:
        print(f"Warning: {sentence}", file=sys.stderr, flush=True)
    suites = [name for name in SUITES if options.suite in (name, "all")]
    for suite, module in {name: _import_suite(name) for name in suites}.items():
        if options.scaling:
            for scaling in _select(suite, getattr(module, "SCALINGS", {}), options.rows).values():
                rows, table = _measure_scaling(suite, scaling, options, device)
                result["rows"] += rows
                result["scalings"].append(table)
        else:
            for name, build in _select(suite, module.ROWS, options.rows).items():
                result["rows"].append(_measure_row(f"{suite} {name}", build, options, device))
    return result


def _measure_scaling(
    suite: str, scaling: scalings.Scaling, options: argparse.Namespace, device: torch.device
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure a benchmark for each value of a scaling; returns the measurements, and a table of how cost grows.

    A scaling is one property of the input with several values, such as the image side. Cost is time and memory.
    """
    with _setting(options, device) as setting:
        values = scaling.values_for(setting)
    rows = []
    for value in values:
        row = _measure_row(f"{suite} {scaling.name} {value}", partial(scaling.build, value), options, device)
        rows.append({**row, "row": f"{scaling.name} {value:,}: {row['row']}"})
    lines = scalings.lines([*zip(values, rows, strict=True)])
    return rows, {"suite": suite, "name": scaling.name, "lines": lines}


def _measure_row(
    name: str, build: Callable[[Setting], Row], options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Measure the times and the peak memory of the benchmark that `build` returns.

    To measure peak memory, the benchmark is built again: the peak includes what a contender's first call keeps in
    memory, and the contenders that were timed have already been called.
    """
    print(f"{name} ...", file=sys.stderr, flush=True)
    with _setting(options, device) as setting:
        _release_memory(setting)
        measurement = measure(build(setting), rounds=options.rounds, warm_up=options.warm_up, device=device)
        _release_memory(setting)
        return add_peaks(measurement, peak.measure_peaks(build, setting))


def _release_memory(setting: Setting) -> None:
    """Free the previous benchmark's memory and, if models are compiled, reset torch.compile.

    Without the reset, torch.compile stops compiling after 8 models of one class.
    """
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


def _import_suite(suite: str) -> ModuleType:
    try:
        return importlib.import_module(SUITES[suite])
    except ModuleNotFoundError as error:
        raise UserError(
            f"{suite} needs {error.name}, which is not installed; pip install transformers timm."
        ) from error


def _select(suite: str, available: Mapping[str, T], option: str | None) -> dict[str, T]:
    """Select the rows or scalings that `option` (--rows) names, or all if it is None.

    Raises UserError for an unknown name.
    """
    names = option.split(",") if option else [*available]
    if unknown := [name for name in names if name not in available]:
        raise UserError(f"--rows {','.join(unknown)}: {suite} has only {', '.join(available)}; name some of these.")
    return {name: available[name] for name in names}


if __name__ == "__main__":
    start.script(main)
