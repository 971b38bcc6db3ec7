"""Compare a benchmark's report with an earlier one: changed ratios, new and removed pairs, and differing conditions.

A pair is a contender and its reference; its ratio is that of their median times. Times are not compared, because they
depend on the machine and its load. Ratios are compared, because contender and reference are timed in turn, so the load
affects both. A ratio counts as changed if its interquartile ranges in the two reports do not overlap.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files.table import table

Pair = tuple[str, str, str]  # the row, the contender, and the reference (or all references, joined by "or")
# The load is left out, because each report warns of a high load.
MACHINE_FIELDS = ("cpu", "cores", "threads", "device", "system")
IGNORED_OPTIONS = ("out", "against", "suite", "rows")  # options that do not change the numbers of a row


def read(path: Path) -> dict[str, Any]:
    """Read a report that --out wrote; raises UserError if `path` cannot be read or lacks values that are compared."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        for name in ("machine", "versions", "options"):
            dict(report[name])
        for ratio in _pairs(report).values():
            low, high = ratio["quartiles"]
            float(ratio["ratio"]), float(low), float(high)
    except OSError as error:
        raise UserError(f"--against {path} cannot be read ({error.strerror}); give a file that --out wrote.") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"--against {path} is not a benchmark report ({reason}); give a file that --out wrote."
        ) from error
    return dict(report)


def compare(earlier: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """Compare two reports; returns the differences in plain types.

    machine, versions, options: name -> [earlier, current] for each value that differs.
    pairs: a dict for each pair in both reports. It holds the ratio and its quartiles in the earlier report (`then`) and
        in the current one (`now`), and the `change` of the contender against the reference: "faster", "slower", or ""
        for a ratio that did not change.
    new: the pairs that only the current report has.
    gone: the pairs that only the earlier report has.
    """
    earlier_pairs, current_pairs = _pairs(earlier), _pairs(current)
    options = [name for name in current["options"] if name not in IGNORED_OPTIONS]
    return {
        "machine": _differing(earlier["machine"], current["machine"], MACHINE_FIELDS),
        "versions": _differing(
            earlier["versions"], current["versions"], {**earlier["versions"], **current["versions"]}
        ),
        "options": _differing(earlier["options"], current["options"], options),
        "pairs": [
            _compare_pair(key, earlier_pairs[key], current_pairs[key]) for key in current_pairs if key in earlier_pairs
        ],
        "new": [list(key) for key in current_pairs if key not in earlier_pairs],
        "gone": [list(key) for key in earlier_pairs if key not in current_pairs],
    }


def text(comparison: Mapping[str, Any], path: Path) -> str:
    """Format a comparison for printing; `path` is the file of the earlier report."""
    lines = []
    for kind, sentence in (("machine", "Warning: another machine"), ("versions", "Warning: other versions")):
        if comparison[kind]:
            lines.append(f"{sentence}: {_changes(comparison[kind])}.")
    if comparison["options"]:
        lines.append(f"Other options: {_changes(comparison['options'])}.")
    rows: list[tuple[str, ...]] = [
        ("work", "contender", "reference", "then", "quartiles", "now", "quartiles", "now/then", "")
    ]
    for pair in comparison["pairs"]:
        cells = [cell for side in ("then", "now") for cell in _ratio_cells(pair[side])]
        change = f"{pair['now']['ratio'] / pair['then']['ratio']:.3f}"
        rows.append((pair["row"], pair["one"], pair["other"], *cells, change, pair["change"]))
    lines.append(table(f"against {path}", rows))
    lines += [*_unmatched("new", comparison), *_unmatched("gone", comparison)]
    return "\n".join(lines)


def _unmatched(kind: str, comparison: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each row with pairs of `kind`, "new" or "gone".

    The line lists these pairs if other pairs of the row are in both reports; otherwise it names only the row.
    """
    pairs, shared = comparison[kind], {pair["row"] for pair in comparison["pairs"]}
    for name in dict.fromkeys(row for row, _, _ in pairs):
        ratios = ", ".join(f"{contender} over {reference}" for row, contender, reference in pairs if row == name)
        yield f"{kind}: {name}: {ratios}" if name in shared else f"{kind}: {name}"


def _pairs(report: Mapping[str, Any]) -> dict[Pair, dict[str, Any]]:
    return {
        (str(row["row"]), str(ratio["one"]), " or ".join(ratio["among"])): ratio
        for row in report["rows"]
        for ratio in row["ratios"]
    }


def _differing(earlier: Mapping[str, Any], current: Mapping[str, Any], names: Iterable[str]) -> dict[str, list[Any]]:
    return {name: [earlier.get(name), current.get(name)] for name in names if earlier.get(name) != current.get(name)}


def _compare_pair(key: Pair, earlier: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    change = ""
    if current["quartiles"][1] < earlier["quartiles"][0]:
        change = "faster"
    elif current["quartiles"][0] > earlier["quartiles"][1]:
        change = "slower"
    row, contender, reference = key
    ratios = {
        name: {"ratio": ratio["ratio"], "quartiles": ratio["quartiles"]}
        for name, ratio in (("then", earlier), ("now", current))
    }
    return {"row": row, "one": contender, "other": reference, **ratios, "change": change}


def _ratio_cells(ratio: Mapping[str, Any]) -> Iterator[str]:
    low, high = ratio["quartiles"]
    yield f"{ratio['ratio']:.3f}"
    yield f"{low:.3f}-{high:.3f}"


def _changes(changes: Mapping[str, list[Any]]) -> str:
    return ", ".join(f"{name} {_value(before)} -> {_value(after)}" for name, (before, after) in changes.items())


def _value(value: Any) -> str:
    return "none" if value is None else str(value)
