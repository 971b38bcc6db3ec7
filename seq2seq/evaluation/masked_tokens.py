"""Metrics of a masked language model: nats per masked token and accuracy, and the same of a unigram model."""

import csv
import math
from pathlib import Path
from typing import Any, NamedTuple

from common.machine.distributed import gather_samples, is_main
from common.task import Answer, Batch


class MaskedSample(NamedTuple):
    """The values that the metric stores for each sample: sums over its masked tokens."""

    id: Any
    tokens: int
    nats: float
    correct: int
    unigram_nats: float
    unigram_correct: int


class MaskedTokenMetric:
    """Nats and accuracy per masked token on one split, and the same numbers of a unigram model.

    The unigram model predicts every token by its frequency in train, whatever its surroundings.

    Args:
        expected: number of samples in the split; `gather` checks that none is missing. None = no check.
    """

    def __init__(self, expected: int | None = None):
        self.expected = expected
        self.samples: list[MaskedSample] = []

    def update(self, batch: Batch, answers: list[Answer]) -> None:
        """Add the samples of a batch; an answer has the fields of `MaskedSample` except `id`."""
        self.samples += [
            MaskedSample(id, **{name: answer[name] for name in MaskedSample._fields[1:]})
            for id, answer in zip(batch["ids"], answers, strict=True)
        ]

    def restrict(self, count: int) -> None:
        """Expect only `count` samples of the split, for evaluation on a part of it."""
        self.expected = count

    def gather(self) -> None:
        """Gather the values of all ranks on every rank, sorted by id."""
        self.samples = gather_samples(self.samples, self.expected)

    def compute(self) -> dict[str, float]:
        """Compute `nats`, `accuracy`, `unigram_nats` and `unigram_accuracy`, each per masked token.

        Example: a sample with two masked tokens of probabilities 1/2 (correct) and 1/4 (wrong), and a sample with one
        of probability 1/8 (wrong), have nats = (1 + 2 + 3) ln 2 / 3 = 2 ln 2, and accuracy = 1/3.
        """
        tokens = sum(sample.tokens for sample in self.samples)
        sums = {
            "nats": math.fsum(sample.nats for sample in self.samples),
            "accuracy": sum(sample.correct for sample in self.samples),
            "unigram_nats": math.fsum(sample.unigram_nats for sample in self.samples),
            "unigram_accuracy": sum(sample.unigram_correct for sample in self.samples),
        }
        return {name: total / tokens if tokens else math.nan for name, total in sums.items()}

    def details(self) -> list[tuple[Any, ...]]:
        """Return a table with a header and two rows: the model, and the unigram model."""
        numbers = self.compute()
        return [
            ("model", "nats", "accuracy"),
            ("this", numbers["nats"], numbers["accuracy"]),
            ("unigram", numbers["unigram_nats"], numbers["unigram_accuracy"]),
        ]

    def write(self, folder: Path) -> None:
        """Write `masked.csv` with a row for each sample: the fields of `MaskedSample`. Only rank 0 writes."""
        if not is_main():
            return
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "masked.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(MaskedSample._fields)
            for sample in self.samples:
                table.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in sample])
