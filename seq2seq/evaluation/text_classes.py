"""Accuracy and F1 of a classifier of texts on one split, over the samples of all ranks."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.machine.distributed import gather_samples, is_main
from common.task import Answer, Batch


class ClassifiedText(NamedTuple):
    """The values that the metric stores for each text."""

    id: Any
    truth: int  # index of the true class
    predicted: int  # index of the predicted class
    share: float  # the probability of the predicted class
    loss: float  # minus the log probability of the true class, in nats


class TextClassMetric:
    """Accuracy, macro F1 and loss on one split.

    The F1 of a class is the harmonic mean of precision and recall, 2 tp / (2 tp + fp + fn). Macro F1 is the mean over
    the classes that occur in the split or are predicted, so that a rare class counts as much as a frequent one.

    Args:
        classes: names of the classes, by index.
        expected: number of texts in the split; `gather` checks that none is missing. None = no check.
    """

    def __init__(self, classes: Sequence[str], expected: int | None = None):
        self.classes, self.expected = list(classes), expected
        self.samples: list[ClassifiedText] = []

    def update(self, batch: Batch, answers: list[Answer]) -> None:
        """Add the texts of a batch; answers have "label", "share" and "log_probabilities" (K,) in nats."""
        for id, truth, answer in zip(batch["ids"], batch["labels"].tolist(), answers, strict=True):
            loss = 0.0 - float(answer["log_probabilities"][truth])
            self.samples.append(ClassifiedText(id, truth, answer["label"], answer["share"], loss))

    def restrict(self, count: int) -> None:
        """Expect only `count` texts of the split, for evaluation on a part of it."""
        self.expected = count

    def gather(self) -> None:
        """Gather the values of all ranks on every rank, sorted by id."""
        self.samples = gather_samples(self.samples, self.expected)

    def compute(self) -> dict[str, float]:
        """Compute `accuracy`, `f1_macro` and `loss`.

        Example with true classes a a b and predictions a b b: the F1 of a is 2 / (2 + 0 + 1), and so is that of b, so
        both accuracy and macro F1 are 2/3.
        """
        count = len(self.samples)
        if not count:
            return {}
        scores = [f1 for _, _, _, f1 in self._of_classes() if not math.isnan(f1)]
        return {
            "accuracy": sum(sample.predicted == sample.truth for sample in self.samples) / count,
            "f1_macro": math.fsum(scores) / len(scores),
            "loss": math.fsum(sample.loss for sample in self.samples) / count,
        }

    def details(self) -> list[tuple[Any, ...]]:
        """Return a table with a header and a row for each class: its number of texts, precision, recall and F1."""
        rows = ((name, *row) for name, row in zip(self.classes, self._of_classes(), strict=True))
        return [("class", "texts", "precision", "recall", "f1"), *rows]

    def write(self, folder: Path) -> None:
        """Write `predictions.csv` with a row for each text: id, truth and predicted (names), share. Only rank 0."""
        if not is_main():
            return
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "predictions.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(("id", "truth", "predicted", "share"))
            for sample in self.samples:
                names = self.classes[sample.truth], self.classes[sample.predicted]
                table.writerow((sample.id, *names, f"{sample.share:.6g}"))

    def _of_classes(self) -> list[tuple[int, float, float, float]]:
        """Number of texts, precision, recall and F1 of each class; NaN for a number that is not defined."""
        rows = []
        for label in range(len(self.classes)):
            hits = sum(sample.truth == sample.predicted == label for sample in self.samples)
            true = sum(sample.truth == label for sample in self.samples)
            predicted = sum(sample.predicted == label for sample in self.samples)
            rows.append((true, _ratio(hits, predicted), _ratio(hits, true), _ratio(2 * hits, true + predicted)))
        return rows


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
