"""Time ours against the peers that users would take instead: `python scripts/benchmark.py detr`.

All contenders do the same work on the same inputs with the same weights, in one process, in turns that are drawn anew
every round; before that their outputs are compared. Reported is the ratio of their median times, with the quartiles of
the rounds' own ratios: below one, the first is faster.
"""

import argparse
import importlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder, not the project's

import torch

from common import device as devices
from common.errors import UserError
from common.log import table
from scripts.benchmarks.timing import Disagreement, Setting, measure

SUITES = {
    "detr": "scripts.benchmarks.detr",
    "vit": "scripts.benchmarks.vit",
    "seq2seq": "scripts.benchmarks.seq2seq",
}
PACKAGES = ("torch", "torchvision", "transformers", "timm", "ctranslate2", "pillow", "scipy", "numpy")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for, print it and write it; returns the exit code."""
    options = _options(arguments)
    try:
        report = _run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except Disagreement as error:
        print(f"The outputs were compared before times were taken, and differ. {error}", file=sys.stderr)
        return 1
    print(text(report))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1), encoding="utf-8")
        print(f"Every round's times lie in {options.out}.")
    return 0


def text(report: dict[str, Any]) -> str:
    """A report as it is printed: where it was measured, and a line for each ratio."""
    machine, versions = report["machine"], report["versions"]
    lines: list[Sequence[Any]] = [("work", "one", "ms", "other", "ms", "ratio", "quartiles")]
    for row in report["rows"]:
        for ratio in row["ratios"]:
            numbers = [f"{ratio[key]:.{places}f}" for key, places in (("one_ms", 1), ("other_ms", 1), ("ratio", 3))]
            low, high = ratio["quartiles"]
            other = ratio["other"] + (f", fastest of {len(ratio['among'])}" if len(ratio["among"]) > 1 else "")
            lines.append((row["row"], ratio["one"], numbers[0], other, numbers[1], numbers[2], f"{low:.3f}-{high:.3f}"))
    where = [f"{name}: {value}" for name, value in machine.items()]
    where.append("versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    where += [f"outputs compared: {row['row']}: {row['agreement']}" for row in report["rows"]]
    for row in report["rows"]:
        where += [
            f"{row['row']}: {name} {rate['flops_per_s'] / 1e12:.2f} TFLOP/s, {rate['of_limit']:.2f} of the limit"
            for name, rate in row["rates"].items()
        ]
        where += [f"{row['row']}: {name} {amount}" for name, amount in row.get("amounts", {}).items()]
    return "\n".join([*where, table(f"medians of {report['rounds']} rounds, in turn", lines)])


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n\n")[0], allow_abbrev=False)
    parser.add_argument("suite", choices=[*SUITES, "all"])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    parser.add_argument("--rows", help="which of the suite's rows, with commas between; all of them by default")
    parser.add_argument("--rounds", type=int, default=20, help="how often each contender is timed")
    parser.add_argument("--warm-up", type=int, default=3, help="rounds before these")
    parser.add_argument("--threads", type=int, help="on the CPU; by default as many as PyTorch takes")
    parser.add_argument("--compile", action="store_true", help="time torch.compile's versions, too")
    parser.add_argument(
        "--images", type=Path, help="a folder of JPEGs for the input pipeline; by default some are made"
    )
    parser.add_argument("--batch", type=int, help="images or sentences at once in the rows of throughput")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that everything runs")
    parser.add_argument("--out", type=Path, help="a JSON file for the report with every round's times")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.warm_up < 0 or (options.threads or 1) < 1:
        parser.error("--rounds and --threads are at least 1, --warm-up at least 0")
    return options


def _run(options: argparse.Namespace) -> dict[str, Any]:
    device = devices.choose(options.device)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    report: dict[str, Any] = {
        "options": {name: str(value) for name, value in vars(options).items()},
        "machine": _machine(device),
        "versions": _versions(),
        "rounds": options.rounds,
        "rows": [],
    }
    for name, module in SUITES.items():
        if options.suite not in (name, "all"):
            continue
        rows = _rows(name, module, options.rows)
        for row, build in rows.items():
            print(f"{name} {row} ...", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory() as scratch:
                setting = Setting(
                    device=device,
                    tiny=options.tiny,
                    compile=options.compile,
                    images=options.images,
                    scratch=Path(scratch),
                    batch=options.batch,
                )
                work = build(setting)
                measured = measure(work, rounds=options.rounds, warm_up=options.warm_up, device=device)
                measured |= _amounts(getattr(work, "amounts", {}), measured["seconds"])
            report["rows"].append(measured)
    return report


def _amounts(amounts: Mapping[str, tuple[float, str]], seconds: dict[str, list[float]]) -> dict[str, Any]:
    """What a row's contenders get through in a second, in its own units; nothing for a row that counts nothing."""
    rates = {name: f"{amount / median(seconds[name]):,.1f} {unit} a second" for name, (amount, unit) in amounts.items()}
    return {"amounts": rates} if rates else {}


def _rows(suite: str, module: str, wanted: str | None) -> dict[str, Any]:
    try:
        rows = importlib.import_module(module).ROWS
    except ModuleNotFoundError as error:
        raise UserError(
            f"The peers of {suite} are not installed ({error.name}); pip install transformers timm."
        ) from error
    names = wanted.split(",") if wanted else [*rows]
    if unknown := [name for name in names if name not in rows]:
        raise UserError(f"--rows {','.join(unknown)}: {suite} has {', '.join(rows)}.")
    return {name: rows[name] for name in names}


def _machine(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge the numbers; the load says whether the machine was idle when it began."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    said = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    flags = [flag for flag in INSTRUCTIONS if flag in said.get("flags", "").split()]
    return {
        "cpu": " ".join([said.get("model name", platform.processor() or platform.machine()), *flags]),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": devices.describe(device),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
