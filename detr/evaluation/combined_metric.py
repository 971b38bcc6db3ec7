"""Several metrics of the same answers as one, such as COCO's metrics of masks and the panoptic quality."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from common.task import Answer, Batch, Metric


class RestrictableMetric(Metric, Protocol):
    """A metric that can be computed on a part of a split."""

    def restrict(self, count: int) -> None:
        """Expect the answers to only `count` samples of the split."""


class CombinedMetric:
    """The values of all `metrics`, which have different names.

    The first column of their tables of details names what a row is about, such as a class.
    """

    def __init__(self, metrics: Sequence[RestrictableMetric]) -> None:
        self.metrics = metrics

    def update(self, batch: Batch, answers: list[Answer]) -> None:
        """Add one batch of this rank to each metric."""
        for metric in self.metrics:
            metric.update(batch, answers)

    def restrict(self, count: int) -> None:
        """Expect the answers to only `count` samples of the split."""
        for metric in self.metrics:
            metric.restrict(count)

    def gather(self) -> None:
        """Gather the answers of all ranks."""
        for metric in self.metrics:
            metric.gather()

    def compute(self) -> dict[str, float]:
        """Return the values of all metrics by name."""
        return {name: value for metric in self.metrics for name, value in metric.compute().items()}

    def details(self) -> Sequence[Sequence[Any]]:
        """Return the rows and the columns of all tables; where a table lacks a row, its columns are empty."""
        tables = [[tuple(row) for row in metric.details()] for metric in self.metrics]
        joined = [(tables[0][0][0], *(name for table in tables for name in table[0][1:]))]
        cells = [{row[0]: row[1:] for row in table[1:]} for table in tables]
        for name in dict.fromkeys(name for rows in cells for name in rows):
            columns = (rows.get(name, ("",) * (len(t[0]) - 1)) for rows, t in zip(cells, tables, strict=True))
            joined.append((name, *(cell for column in columns for cell in column)))
        return joined

    def write(self, folder: Path) -> None:
        """Write the files of all metrics to `folder`."""
        for metric in self.metrics:
            metric.write(folder)
