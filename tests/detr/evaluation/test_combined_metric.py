"""Two metrics of the same answers give all their numbers and files."""

from pathlib import Path
from typing import Any

from detr.evaluation.combined_metric import CombinedMetric


class Counting:
    """A metric that counts what it receives."""

    def __init__(self, name: str) -> None:
        self.name, self.calls = name, list[Any]()

    def update(self, batch: dict[str, Any], answers: list[Any]) -> None:
        self.calls.append(("update", batch["ids"], answers))

    def restrict(self, count: int) -> None:
        self.calls.append(("restrict", count))

    def gather(self) -> None:
        self.calls.append(("gather",))

    def compute(self) -> dict[str, float]:
        return {self.name: float(len(self.calls))}

    def details(self) -> list[tuple[Any, ...]]:
        return [("name", self.name, "n"), ("cat", 1, 2), ("dog" if self.name == "AP" else "sky", 3, 4)]

    def write(self, folder: Path) -> None:
        (folder / self.name).touch()


def test_every_metric_receives_every_call(tmp_path: Path):
    parts = [Counting("AP"), Counting("PQ")]
    metric = CombinedMetric(parts)
    metric.restrict(1)
    metric.update({"ids": [7]}, [{"boxes": []}])
    metric.gather()
    assert parts[0].calls == parts[1].calls == [("restrict", 1), ("update", [7], [{"boxes": []}]), ("gather",)]
    assert metric.compute() == {"AP": 3.0, "PQ": 3.0}
    header = ("name", "AP", "n", "PQ", "n")
    assert metric.details() == [header, ("cat", 1, 2, 1, 2), ("dog", 3, 4, "", ""), ("sky", "", "", 3, 4)]
    metric.write(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"AP", "PQ"}
