"""Top-1 and top-5 accuracy and the loss of a classifier on one split, over the samples of all ranks."""

import csv
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.errors import UserError
from common.files.names import escape
from common.machine.distributed import gather_samples, is_main
from common.report.pictures import write_picture
from common.task import Answer, Batch
from vit.evaluation import pictures

MAX_DRAWN_CLASSES = 2000  # a confusion matrix of more classes, with 2 x 2 pixels per cell, would be too large a picture


class ScoredSample(NamedTuple):
    """The values that the metric stores for each sample, instead of the probabilities of all classes."""

    id: Any
    truth: int  # index of the true class
    predicted: int  # index of the predicted class; -1 if a log probability is NaN
    classes_ahead: int  # number of classes ranked before the true one; K (all) if a log probability is NaN
    loss: float  # negative log probability of the true class in nats
    probability: float  # probability of the predicted class
    nearest: int | None  # class that nearest neighbours predict; -1 if features are not finite, None if not computed


class ClassificationMetric:
    """The accuracies and the loss on one split, computed from class probabilities over the samples of all ranks.

    Classes of equal probability are ranked by index: if two classes share the highest probability, the one with the
    lower index is predicted. A sample with a NaN among its log probabilities has no predicted class: it counts as wrong
    in top1 and top5 and is absent from the confusion matrix. Its loss is NaN if the log probability of its true class
    is NaN.

    Args:
        classes: names of the classes, by index.
        expected: number of samples in the split; `gather` checks that none is missing. None = no check.
    """

    def __init__(self, classes: list[str], expected: int | None = None) -> None:
        self.classes = classes
        self.expected = expected
        self.samples: list[ScoredSample] = []
        self.gathered = False

    def update(self, batch: Batch, answers: list[Answer]) -> None:
        """Add the samples of a batch.

        Each answer has "log_probabilities" (K,) in nats, and may have "nearest", a class index. `batch` holds "ids" and
        the true "labels" (B,) int64. Raises UserError for a label outside the classes.
        """
        truth = batch["labels"].cpu()  # (B,)
        check_labels(batch["ids"], truth, len(self.classes))
        logs = torch.stack([answer["log_probabilities"] for answer in answers]).cpu().double()  # (B, K)
        assert logs.shape == (len(truth), len(self.classes)), (logs.shape, len(self.classes))
        of_truth = logs.gather(1, truth[:, None])  # (B, 1)
        has_nan = logs.isnan().any(1)
        predicted = logs.argmax(1).masked_fill(has_nan, -1)  # argmax returns the first of equal values
        ahead = _classes_ahead(logs, truth).masked_fill(has_nan, len(self.classes))
        columns = (truth, predicted, ahead, 0 - of_truth[:, 0], logs.amax(1).exp())
        nearest = [answer.get("nearest") for answer in answers]
        rows = zip(batch["ids"], *(column.tolist() for column in columns), nearest, strict=True)
        self.samples.extend(ScoredSample(*row) for row in rows)

    def restrict(self, count: int) -> None:
        """Expect only `count` samples of the split, for evaluation on a part of it."""
        self.expected = count

    def gather(self) -> None:
        """Gather the samples of all ranks on every rank, sorted by id; each sample must occur exactly once."""
        self.samples = gather_samples(self.samples, self.expected)
        self.gathered = True

    def compute(self) -> dict[str, float]:
        """Compute `top1`, `top5` (for more than 5 classes), `loss` in nats, and `knn_top1` if answers have "nearest".

        All are means over the samples. Example with three classes and three samples: probabilities 0.5 0.25 0.25 with
        true class 0 (correct), 0.25 0.5 0.25 with true class 2 (wrong), and 0.25 0.25 0.5 with true class 2 (correct).
        Then top1 = 2/3 and loss = (ln 2 + ln 4 + ln 2) / 3.
        """
        assert self.gathered, "call gather() before compute()"
        assert self.samples, "a split without samples has no accuracy"
        count = len(self.samples)
        numbers = {"top1": sum(sample.classes_ahead < 1 for sample in self.samples) / count}
        if len(self.classes) > 5:
            numbers["top5"] = sum(sample.classes_ahead < 5 for sample in self.samples) / count
        numbers["loss"] = math.fsum(sample.loss for sample in self.samples) / count
        with_nearest = sum(sample.nearest is not None for sample in self.samples)
        assert with_nearest in (0, count), f"{with_nearest} of {count} samples have a class by nearest neighbours"
        if with_nearest:
            numbers["knn_top1"] = sum(sample.nearest == sample.truth for sample in self.samples) / count
        return numbers

    def confusion_matrix(self) -> Tensor:
        """Count the samples of each pair of true class (row) and predicted class (column): int64 (K, K)."""
        counts = torch.zeros(len(self.classes), len(self.classes), dtype=torch.int64)
        for (truth, predicted), times in self._pairs().items():
            counts[truth, predicted] = times
        return counts

    def details(self) -> list[tuple[Any, ...]]:
        """Return a table with a header and a row for each class.

        A row has the class's name, its number of images, its accuracy, the class that is most often predicted by
        mistake, and the number of these mistakes. The accuracy of a class without images is NaN. Of equally frequent
        mistakes, the one with the lowest class index is listed.
        """
        pairs = self._pairs()
        images = Counter(sample.truth for sample in self.samples)
        mistakes: dict[int, list[tuple[int, int]]] = {}  # truth -> (times, minus the predicted class)
        for (truth, predicted), times in pairs.items():
            if truth != predicted:
                mistakes.setdefault(truth, []).append((times, -predicted))
        rows: list[tuple[Any, ...]] = [("class", "images", "top1", "taken_for", "times")]
        for label, name in enumerate(self.classes):
            top1 = pairs[label, label] / images[label] if images[label] else math.nan
            times, negative = max(mistakes.get(label, [(0, 0)]))
            rows.append((name, images[label], top1, self.classes[-negative] if times else "", times))
        return rows

    def _pairs(self) -> Counter[tuple[int, int]]:
        assert self.gathered, "call gather() before counting classes"
        return Counter((sample.truth, sample.predicted) for sample in self.samples if sample.predicted >= 0)

    def write(self, folder: Path) -> None:
        """Write `predictions.csv`, with a row for each sample, and `confusion.png` for up to MAX_DRAWN_CLASSES classes.

        The columns of the table are id, truth and predicted (names of classes), probability (of the predicted class),
        and probability_of_truth. If no class is predicted, `predicted` is empty. Names that are not UTF-8 are escaped
        (common/files/names.py). Only rank 0 writes.
        """
        assert self.gathered, "call gather() before write()"
        if not is_main():
            return
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "predictions.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(("id", "truth", "predicted", "probability", "probability_of_truth"))
            for sample in self.samples:
                truth = escape(self.classes[sample.truth])
                predicted = escape(self.classes[sample.predicted]) if sample.predicted >= 0 else ""
                probabilities = (f"{sample.probability:.6g}", f"{math.exp(-sample.loss):.6g}")
                table.writerow((escape(str(sample.id)), truth, predicted, *probabilities))
        if len(self.classes) <= MAX_DRAWN_CLASSES:
            picture = pictures.draw_confusion_matrix(self.confusion_matrix(), self.classes)
            write_picture(picture, folder / "confusion.png")


def check_labels(ids: Sequence[Any], labels: Tensor, classes: int, what: str = "sample") -> None:
    """Raise UserError if any of the labels (B,) is not from 0 to `classes` - 1.

    The message names the first such sample by `what` and its id.
    """
    wrong = ((labels < 0) | (labels >= classes)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise UserError(
            f"{what} {ids[first]}: its label is {int(labels[first])}, and the classes are numbered from 0 to "
            f"{classes - 1}; correct the label, or leave the sample out."
        )


def _classes_ahead(logs: Tensor, truth: Tensor) -> Tensor:
    """Count the classes that are ranked before the true class: logs (B, K), truth (B,) -> int64 (B,).

    Classes are ranked by log probability, and by index where log probabilities are equal.
    """
    of_truth = logs.gather(1, truth[:, None])  # (B, 1)
    earlier = torch.arange(logs.shape[1]) < truth[:, None]  # (B, K)
    return ((logs > of_truth) | ((logs == of_truth) & earlier)).sum(1)
