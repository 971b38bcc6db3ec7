"""A report against an earlier one: which ratios changed, what is new and what has gone, and whether it is fair.

Times of two runs tell little: another machine, another load. The ratio of two contenders that took turns tells more,
and is what is compared. It has changed when its quartiles and the earlier ones have nothing in common.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files.table import table

Pair = tuple[str, str, str]  # the work, one contender, and the other (or among whom the fastest is the other)
WHERE = ("cpu", "cores", "threads", "device", "system")  # of a machine; its load has a warning of its own
EACH_TIME = ("out", "against", "suite", "rows")  # options that change no row's numbers


def read(path: Path) -> dict[str, Any]:
    """The report in a file that --out wrote; raises UserError when it is anything else."""
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
        what = f"{type(error).__name__}: {error}"
        raise UserError(
            f"--against {path} is no report of a benchmark ({what}); give a file that --out wrote."
        ) from error
    return dict(report)


def compare(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What changed, in plain types.

    machine, versions, options: name -> [then, now] of what differs.
    pairs: of both reports, their ratios and quartiles then and now, and the change: "faster", "slower" or "".
    new, gone: the pairs of only one of them.
    """
    before, after = _pairs(then), _pairs(now)
    common = {name: (then["options"].get(name), value) for name, value in now["options"].items()}
    return {
        "machine": _different(then["machine"], now["machine"], WHERE),
        "versions": _different(then["versions"], now["versions"], {**then["versions"], **now["versions"]}),
        "options": {name: [*both] for name, both in common.items() if name not in EACH_TIME and both[0] != both[1]},
        "pairs": [_pair(key, before[key], after[key]) for key in after if key in before],
        "new": [list(key) for key in after if key not in before],
        "gone": [list(key) for key in before if key not in after],
    }


def text(compared: Mapping[str, Any], path: Path) -> str:
    """The comparison as it is printed."""
    lines = []
    for kind, sentence in (("machine", "Warning: another machine"), ("versions", "Warning: other versions")):
        if compared[kind]:
            lines.append(f"{sentence}: {_changes(compared[kind])}.")
    if compared["options"]:
        lines.append(f"Other options: {_changes(compared['options'])}.")
    rows: list[tuple[str, ...]] = [("work", "one", "other", "then", "quartiles", "now", "quartiles", "now/then", "")]
    for pair in compared["pairs"]:
        sides = [text for side in ("then", "now") for text in _side(pair[side])]
        change = f"{pair['now']['ratio'] / pair['then']['ratio']:.3f}"
        rows.append((pair["row"], pair["one"], pair["other"], *sides, change, pair["change"]))
    lines.append(table(f"against {path}", rows))
    lines += [*_grouped("new", compared["new"], compared), *_grouped("gone", compared["gone"], compared)]
    return "\n".join(lines)


def _grouped(what: str, pairs: list[list[str]], compared: Mapping[str, Any]) -> Iterator[str]:
    """A line for each work: its name alone when all of it is new, or gone."""
    stayed = {pair["row"] for pair in compared["pairs"]}
    for work in dict.fromkeys(row for row, _, _ in pairs):
        named = ", ".join(f"{one} over {other}" for row, one, other in pairs if row == work)
        yield f"{what}: {work}: {named}" if work in stayed else f"{what}: {work}"


def _pairs(report: Mapping[str, Any]) -> dict[Pair, dict[str, Any]]:
    return {
        (str(row["row"]), str(ratio["one"]), " or ".join(ratio["among"])): ratio
        for row in report["rows"]
        for ratio in row["ratios"]
    }


def _different(then: Mapping[str, Any], now: Mapping[str, Any], names: Any) -> dict[str, list[Any]]:
    return {name: [then.get(name), now.get(name)] for name in names if then.get(name) != now.get(name)}


def _pair(key: Pair, then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    change = ""
    if now["quartiles"][1] < then["quartiles"][0]:
        change = "faster"
    elif now["quartiles"][0] > then["quartiles"][1]:
        change = "slower"
    row, one, other = key
    sides = {
        name: {"ratio": side["ratio"], "quartiles": side["quartiles"]} for name, side in (("then", then), ("now", now))
    }
    return {"row": row, "one": one, "other": other, **sides, "change": change}


def _side(side: Mapping[str, Any]) -> Iterator[str]:
    low, high = side["quartiles"]
    yield f"{side['ratio']:.3f}"
    yield f"{low:.3f}-{high:.3f}"


def _changes(changes: Mapping[str, list[Any]]) -> str:
    return ", ".join(f"{name} {_said(then)} -> {_said(now)}" for name, (then, now) in changes.items())


def _said(value: Any) -> str:
    return "none" if value is None else str(value)
