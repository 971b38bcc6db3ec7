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
    unigram_nats: float | None  # None: train's counts of tokens are unknown
    unigram_correct: int | None


class MaskedTokenMetric:
    """Nats and accuracy per masked token on one split, and the same numbers of a unigram model.

    The unigram model predicts every token by its frequency in train, whatever its surroundings. It has no numbers if
    the frequencies are unknown.

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
        """Compute `nats`, `accuracy` and, if known, `unigram_nats` and `unigram_accuracy`, each per masked token.

        Example: a sample with two masked tokens of probabilities 1/2 (correct) and 1/4 (wrong), and a sample with one
        of probability 1/8 (wrong), have nats = (1 + 2 + 3) ln 2 / 3 = 2 ln 2, and accuracy = 1/3.
        """
        tokens = sum(sample.tokens for sample in self.samples)
        sums = {
            "nats": math.fsum(sample.nats for sample in self.samples),
            "accuracy": sum(sample.correct for sample in self.samples),
        }
        costs = [sample.unigram_nats for sample in self.samples if sample.unigram_nats is not None]
        hits = [sample.unigram_correct for sample in self.samples if sample.unigram_correct is not None]
        if len(costs) == len(hits) == len(self.samples):
            sums |= {"unigram_nats": math.fsum(costs), "unigram_accuracy": sum(hits)}
        return {name: total / tokens if tokens else math.nan for name, total in sums.items()}

    def details(self) -> list[tuple[Any, ...]]:
        """Return a table with a header and two rows: the model, and the unigram model if it has numbers."""
        numbers = self.compute()
        rows: list[tuple[Any, ...]] = [
            ("model", "nats", "accuracy"),
            ("this", numbers["nats"], numbers["accuracy"]),
        ]
        if "unigram_nats" in numbers:
            rows.append(("unigram", numbers["unigram_nats"], numbers["unigram_accuracy"]))
        return rows

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
