"""Mean and standard deviation of the metrics of runs that differ only in their seed."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]  # column -> value, for one run


class Group(NamedTuple):
    """Runs whose configs differ only in the seed. Keys that do not change results are not in these configs."""

    config: dict[str, Any]  # the config of the first run: dotted key -> value
    seeds: list[Any]  # the seed of each run
    rows: list[Row]  # the row of each run in the table of runs

    def finished(self) -> dict[Any, list[Row]]:
        """Return the rows of finished runs by seed; only these are averaged."""
        rows: dict[Any, list[Row]] = {}
        for seed, row in zip(self.seeds, self.rows, strict=True):
            if row["state"] == "done":
                rows.setdefault(seed, []).append(row)
        return rows

    def values(self, metric: str) -> list[float]:
        """Return the metric's value for each seed; runs with the same seed are repetitions, and count as their mean.

        Missing values, NaN and infinity are left out.
        """
        by_seed = [[row[metric] for row in rows if _is_number(row.get(metric))] for rows in self.finished().values()]
        return [statistics.fmean(values) for values in by_seed if values]

    def mean(self, metric: str) -> float | None:
        """Return the mean of `values`, or None if there are none."""
        values = self.values(metric)
        return statistics.fmean(values) if values else None

    def cell(self, metric: str) -> str:
        """Format a metric as "mean ± standard deviation".

        The standard deviation is left out if there is a single value. If only some of the finished seeds have a value,
        the text ends with the number of values, as in "(2 of 3)". If no finished seed has a value, the text is "-".
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

    The columns are n (the number of seeds with a finished run, such as "2 of 3" if a seed has none), all seeds, with
    the number of runs of a repeated one, and the config keys and metrics among `columns`.
    """
    metrics = [column for column in columns if "/" in column]
    keys = [column for column in columns if column != "seed" and any(column in group.config for group in groups)]
    table = [["n", "seeds", *keys, *metrics]]
    for group in groups:
        n, runs = len(group.finished()), Counter(group.seeds)
        count = str(n) if n == len(runs) else f"{n} of {len(runs)}"
        seeds = [f"{seed} ({runs[seed]} runs)" if runs[seed] > 1 else f"{seed}" for seed in sorted(runs, key=str)]
        first = [_text(group.config.get(key)) for key in keys]
        table.append([count, ",".join(seeds), *first, *map(group.cell, metrics)])
    return table


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
