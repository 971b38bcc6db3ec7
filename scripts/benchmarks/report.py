"""Format a benchmark's report for printing."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.files.table import table

Line = Sequence[Any]
PEAK_COLUMN = "peak MiB beside weights"


def text(report: Mapping[str, Any]) -> str:
    """Format a report: the machine, the differences between outputs, and tables of contenders, ratios and scalings.

    `report` is the dict that scripts/benchmark.py writes to the file that --out names.
    """
    header = [f"{name}: {value}" for name, value in report["machine"].items()]
    header.append("versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    header += [f"Warning: {sentence}" for sentence in report.get("warnings", [])]
    header += [f"outputs compared: {row['row']}: {row['agreement']}" for row in report["rows"]]
    rounds = f"medians of {report['rounds']} rounds, in turn"
    tables = [_contenders(report["rows"], rounds), _ratios(report["rows"], rounds)]
    tables += [_scaling(scaling, rounds) for scaling in report.get("scalings", [])]
    return "\n\n".join(["\n".join(header), *tables])


def _contenders(rows: Sequence[Mapping[str, Any]], rounds: str) -> str:
    lines: list[Line] = [("work", "contender", "ms", "quartiles", "throughput", "model FLOPs", PEAK_COLUMN)]
    for row in rows:
        for name, times in row["times"].items():
            amount, rate = row["amounts"].get(name), row["rates"].get(name)
            low, high = times["quartiles"]
            lines.append(
                (
                    row["row"],
                    name,
                    f"{times['median']:.1f}",
                    f"{low:.1f}-{high:.1f}",
                    f"{amount['a_second']:,.1f} {amount['unit']} per second" if amount else "",
                    _rate(name, rate) if rate else "",
                    _mib(row["peak_mib"].get(name)),
                )
            )
    return table(rounds, lines)


def _rate(name: str, rate: Mapping[str, float]) -> str:
    flops = f"{rate['flops_per_s'] / 1e12:.2f} TFLOP/s"
    return (
        flops
        if name.startswith("matrix product")
        else f"{flops}, {rate['of_matrix_rate']:.2f} of the measured matrix rate"
    )


def _ratios(rows: Sequence[Mapping[str, Any]], rounds: str) -> str:
    lines: list[Line] = [("work", "contender", "ms", "reference", "ms", "ratio", "quartiles", "memory")]
    for row in rows:
        for ratio in row["ratios"]:
            numbers = [f"{ratio[key]:.{digits}f}" for key, digits in (("one_ms", 1), ("other_ms", 1), ("ratio", 3))]
            low, high = ratio["quartiles"]
            reference = ratio["other"] + (f", fastest of {len(ratio['among'])}" if len(ratio["among"]) > 1 else "")
            memory = "" if ratio["memory"] is None else f"{ratio['memory']:.2f}"
            spread = f"{low:.3f}-{high:.3f}"
            lines.append((row["row"], ratio["one"], numbers[0], reference, numbers[1], numbers[2], spread, memory))
    return table(f"contender over reference: below 1 the contender is faster, or needs less memory; {rounds}", lines)


def _scaling(scaling: Mapping[str, Any], rounds: str) -> str:
    lines: list[Line] = [("contender", scaling["name"], "ms", "per", "ms", "growth", PEAK_COLUMN)]
    for line in scaling["lines"]:
        growth = "" if line["growth"] is None else f"{line['growth']:.2f}"
        ms, ms_per_unit = f"{line['ms']:.1f}", f"{line['ms_per_unit']:.3f}"
        mib = _mib(line["peak_mib"])
        lines.append((line["contender"], f"{line['size']:,}", ms, line["unit"], ms_per_unit, growth, mib))
    title = f"{scaling['suite']}: time grows with {scaling['name']} to the power `growth`; {rounds}"
    return table(title, lines)


def _mib(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
