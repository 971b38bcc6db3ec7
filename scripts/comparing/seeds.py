"""Mean and standard deviation of the metrics of runs that differ only in their seed."""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]  # column -> value, for one run


class Group(NamedTuple):
    """Runs whose configs differ only in the seed. Keys that do not change results are not in these configs."""

    config: dict[str, Any]  # the config of the first run: dotted key -> value
    seeds: list[Any]  # the seed of each run
    rows: list[Row]  # the row of each run in the table of runs

    def finished(self) -> list[Row]:
        """Return the rows of finished runs; only these are averaged."""
        return [row for row in self.rows if row["state"] == "done"]

    def values(self, metric: str) -> list[float]:
        """Return the metric's finite values in the finished runs. Missing values, NaN and infinity are left out."""
        values = [row.get(metric) for row in self.finished()]
        return [float(value) for value in values if _is_number(value)]

    def mean(self, metric: str) -> float | None:
        """Return the mean of the metric's finite values, or None if there is none."""
        values = self.values(metric)
        return statistics.fmean(values) if values else None

    def cell(self, metric: str) -> str:
        """Format a metric as "mean ± standard deviation".

        The standard deviation is left out if there is a single value. If only some of the finished runs have a value,
        the text ends with the number of values, as in "(2 of 3)". If no finished run has a value, the text is "-".
        """
        values, count = self.values(metric), len(self.finished())
        if not values:
            return "-"
        text = f"{statistics.fmean(values):.4f}"
        text += f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        return text if len(values) == count else f"{text} ({len(values)} of {count})"


def groups_of(rows: Sequence[Row], configs: Sequence[Row]) -> list[Group]:
    """Group the rows of runs whose configs are equal except for the seed.

    `configs` holds the config of each row: dotted key -> value. The caller leaves out keys that do not change results.
    """
    groups: dict[str, Group] = {}
    for row, config in zip(rows, configs, strict=True):
        key = repr(sorted((name, value) for name, value in config.items() if name != "seed"))
        group = groups.setdefault(key, Group(config, [], []))
        group.seeds.append(config.get("seed"))
        group.rows.append(row)
    return list(groups.values())


def means_table(groups: Sequence[Group], columns: Sequence[str]) -> list[list[str]]:
    """Make the rows of a table with a line for each group; the first row is the header.

    The columns are n (the number of finished runs, such as "2 of 3" if a run is unfinished), the seeds of all runs, and
    the config keys and metrics among `columns`.
    """
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
