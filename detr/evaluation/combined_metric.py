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
    """The values of all `metrics`, which have different names. The table of details is that of the first metric."""

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
        """Return the first metric's table."""
        return self.metrics[0].details()

    def write(self, folder: Path) -> None:
        """Write the files of all metrics to `folder`."""
        for metric in self.metrics:
            metric.write(folder)
