"""Mean and standard deviation of runs that differ by their seed only."""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]  # column -> value, for one run


class Group(NamedTuple):
    """Runs whose configs differ by the seed only."""

    config: dict[str, Any]  # of the first run
    seeds: list[Any]
    rows: list[Row]

    def finished(self) -> list[Row]:
        """The rows of finished runs; only these are averaged."""
        return [row for row in self.rows if row["state"] == "done"]

    def values(self, metric: str) -> list[float]:
        """The metric's values in the finished runs, without missing ones and NaN."""
        values = [row.get(metric) for row in self.finished()]
        return [float(value) for value in values if _is_number(value)]

    def mean(self, metric: str) -> float | None:
        """The metric's mean, or None without a value."""
        values = self.values(metric)
        return statistics.fmean(values) if values else None

    def cell(self, metric: str) -> str:
        """The metric as "mean ± standard deviation", with its own number of values if some runs have none."""
        values, count = self.values(metric), len(self.finished())
        if not values:
            return "-"
        text = f"{statistics.fmean(values):.4f}"
        text += f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        return text if len(values) == count else f"{text} ({len(values)} of {count})"


def groups_of(rows: Sequence[Row], configs: Sequence[Row]) -> list[Group]:
    """Group rows by their configs (full key -> value), in which keys that change no result are left out."""
    groups: dict[str, Group] = {}
    for row, config in zip(rows, configs, strict=True):
        key = repr(sorted((name, value) for name, value in config.items() if name != "seed"))
        group = groups.setdefault(key, Group(config, [], []))
        group.seeds.append(config.get("seed"))
        group.rows.append(row)
    return list(groups.values())


def means_table(groups: Sequence[Group], columns: Sequence[str]) -> list[list[str]]:
    """The rows of a table of the groups, the header first: n, seeds, differing keys, and each metric in `columns`."""
    metrics = [column for column in columns if "/" in column]
    keys = [column for column in columns if column != "seed" and any(column in group.config for group in groups)]
    table = [["n", "seeds", *keys, *metrics]]
    for group in groups:
        n, runs = len(group.finished()), len(group.rows)
        count = str(n) if n == runs else f"{n} of {runs}"
        first = [_text(group.config.get(key)) for key in keys]
        table.append([count, ",".join(map(str, sorted(group.seeds, key=str))), *first, *map(group.cell, metrics)])
    return table


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
