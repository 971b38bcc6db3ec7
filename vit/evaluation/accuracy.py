"""From a classifier's answers to its numbers: every sample of a split once, over all ranks, counted at once."""

import csv
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.errors import UserError
from common.machine.distributed import gather_samples, is_main
from common.report.pictures import write_picture
from common.task import Answer, Batch
from vit.evaluation import pictures

DRAWN = 2000  # classes up to which a confusion matrix is drawn; it has as many pixels as its square


class Judged(NamedTuple):
    """What is kept of one sample: a few numbers, never the probabilities of all classes."""

    sample: Any  # its id
    truth: int
    predicted: int  # -1 where an answer is not a number
    place: int  # of the truth among the classes, from 0; the number of classes where an answer is not a number
    loss: float  # negative log probability of the truth in nats
    probability: float  # of the predicted class
    nearest: int | None  # what the nearest neighbours vote for, -1 where the features are not finite


class ClassificationMetric:
    """Class probabilities of one split, every sample exactly once over all ranks, to accuracies.

    Classes of equal probability come in order of their index: of two classes that share the highest one, the first is
    predicted, and the second is right in top-2. A sample with a log probability that is NaN has no predicted class: it
    is wrong in every accuracy, absent from the confusion matrix, and makes the loss NaN where it is the truth's.

    Args:
        classes: the names, by index.
        expected: the number of samples in the split, to be sure that none is missing; None where it is not known.
    """

    def __init__(self, classes: list[str], expected: int | None = None) -> None:
        self.classes = classes
        self.expected = expected
        self.seen: list[Judged] = []
        self.gathered = False

    def update(self, batch: Batch, answers: list[Answer]) -> None:
        """Take in "log_probabilities" (K,) float, in nats, and if there "nearest" (a class index) of each sample.

        `batch` holds "ids" and the true "labels" (B,) int64. Raises UserError for a label that is no class.
        """
        truth = batch["labels"].cpu()  # (B,)
        check_labels(batch["ids"], truth, len(self.classes))
        logs = torch.stack([answer["log_probabilities"] for answer in answers]).cpu().double()  # (B, K)
        assert logs.shape == (len(truth), len(self.classes)), (logs.shape, len(self.classes))
        of_truth = logs.gather(1, truth[:, None])  # (B, 1)
        broken = logs.isnan().any(1)
        predicted = logs.argmax(1).masked_fill(broken, -1)  # the first of equals
        place = _place(logs, truth).masked_fill(broken, len(self.classes))
        columns = (truth, predicted, place, 0 - of_truth[:, 0], logs.amax(1).exp())
        nearest = [answer.get("nearest") for answer in answers]
        rows = zip(batch["ids"], *(column.tolist() for column in columns), nearest, strict=True)
        self.seen.extend(Judged(*row) for row in rows)

    def gather(self) -> None:
        """Join the ranks' samples on all ranks, by rising id; every sample must have been seen, and only once."""
        self.seen = gather_samples(self.seen, self.expected)
        self.gathered = True

    def compute(self) -> dict[str, float]:
        """`top1`, `top5` (with more than 5 classes), `loss` in nats, and `knn_top1` when neighbours have voted.

        Three samples of three classes: probabilities 0.5 0.25 0.25 for a truth of 0 (right), 0.25 0.5 0.25 for a truth
        of 2 (wrong), 0.25 0.25 0.5 for a truth of 2 (right) give top1 = 2/3 and loss = (ln 2 + ln 4 + ln 2) / 3.
        """
        assert self.gathered, "gather() comes before compute()"
        assert self.seen, "a split without samples has no accuracy"
        count = len(self.seen)
        numbers = {"top1": sum(judged.place < 1 for judged in self.seen) / count}
        if len(self.classes) > 5:
            numbers["top5"] = sum(judged.place < 5 for judged in self.seen) / count
        numbers["loss"] = math.fsum(judged.loss for judged in self.seen) / count
        voted = sum(judged.nearest is not None for judged in self.seen)
        assert voted in (0, count), f"neighbours have voted on {voted} of {count} samples"
        if voted:
            numbers["knn_top1"] = sum(judged.nearest == judged.truth for judged in self.seen) / count
        return numbers

    def confusion(self) -> Tensor:
        """How many samples of each true class (row) were taken for each class (column): int64 (K, K)."""
        counts = torch.zeros(len(self.classes), len(self.classes), dtype=torch.int64)
        for (truth, predicted), times in self._pairs().items():
            counts[truth, predicted] = times
        return counts

    def details(self) -> list[tuple[Any, ...]]:
        """Name, images and accuracy of each class; the other class it is most often taken for, and how often.

        A class without images has an accuracy of NaN. Of classes that it is equally often taken for, the first counts.
        """
        pairs = self._pairs()
        images = Counter(judged.truth for judged in self.seen)
        mistakes: dict[int, list[tuple[int, int]]] = {}  # of each class: (how often, minus the class it is taken for)
        for (truth, predicted), times in pairs.items():
            if truth != predicted:
                mistakes.setdefault(truth, []).append((times, -predicted))
        rows: list[tuple[Any, ...]] = [("class", "images", "top1", "taken_for", "times")]
        for label, name in enumerate(self.classes):
            top1 = pairs[label, label] / images[label] if images[label] else math.nan
            times, other = max(mistakes.get(label, [(0, 0)]))
            rows.append((name, images[label], top1, self.classes[-other] if times else "", times))
        return rows

    def _pairs(self) -> Counter[tuple[int, int]]:
        assert self.gathered, "gather() comes before the counts of each class"
        return Counter((judged.truth, judged.predicted) for judged in self.seen if judged.predicted >= 0)

    def write(self, folder: Path) -> None:
        """Write `predictions.csv`, a line for each sample, and up to `DRAWN` classes their `confusion.png`.

        Columns: id, truth and predicted (names; empty where there is no predicted class), probability (of the
        predicted class), probability_of_truth.
        """
        assert self.gathered, "gather() comes before write()"
        if not is_main():
            return
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "predictions.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(("id", "truth", "predicted", "probability", "probability_of_truth"))
            for judged in self.seen:
                predicted = self.classes[judged.predicted] if judged.predicted >= 0 else ""
                probabilities = (f"{judged.probability:.6g}", f"{math.exp(-judged.loss):.6g}")
                table.writerow((judged.sample, self.classes[judged.truth], predicted, *probabilities))
        if len(self.classes) <= DRAWN:
            write_picture(pictures.confusion(self.confusion(), self.classes), folder / "confusion.png")


def check_labels(ids: Sequence[Any], labels: Tensor, classes: int, whose: str = "sample") -> None:
    """Raise UserError for the first of the labels (B,) that is no class, naming the sample by its id."""
    wrong = ((labels < 0) | (labels >= classes)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise UserError(
            f"{whose} {ids[first]}: its label is {int(labels[first])}, and the classes are numbered from 0 to "
            f"{classes - 1}; correct the label, or leave the sample out."
        )


def _place(logs: Tensor, truth: Tensor) -> Tensor:
    """How many classes come before the truth (B,), of log probabilities (B, K): equals in order of their index."""
    of_truth = logs.gather(1, truth[:, None])  # (B, 1)
    earlier = torch.arange(logs.shape[1]) < truth[:, None]  # (B, K)
    return ((logs > of_truth) | ((logs == of_truth) & earlier)).sum(1)
