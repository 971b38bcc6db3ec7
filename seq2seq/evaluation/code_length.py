"""The code length of a text under a language model: perplexity, and bits per token, character and byte."""

import csv
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from common.machine.distributed import gather_samples, is_main
from common.task import Answer, Batch
from seq2seq.data.protocol import TextAmounts


class CodedWindow(NamedTuple):
    """The values that the metric stores for each window of a text."""

    id: Any
    nats: float  # minus the log probability of the targets that count
    tokens: int  # the number of these targets


class CodeLengthMetric:
    """The code length of one split, each token of which is predicted once.

    Bits per token, and perplexity, depend on the tokenizer. Bits per character and per byte are the total of all tokens
    divided by the length of the text, so they can be compared between tokenizers. All of them depend on the context
    from which tokens are predicted, which `stride` and `block` state.

    If only a part of the split is evaluated, or train without the tokens outside blocks, the numbers of characters and
    bytes are those of the whole split, reduced by the fraction of its tokens that were evaluated.

    Args:
        amounts: the numbers of tokens, characters and bytes of the split.
        block: the maximum number of tokens from which a token is predicted.
        stride: how many tokens the next window begins later; a token is predicted from at least block - stride tokens.
        expected: number of windows in the split; `gather` checks that none is missing. None = no check.
    """

    def __init__(self, amounts: TextAmounts, block: int, stride: int, expected: int | None = None) -> None:
        self.amounts, self.block, self.stride, self.expected = amounts, block, stride, expected
        self.windows: list[CodedWindow] = []

    def update(self, batch: Batch, answers: list[Answer]) -> None:
        """Add the windows of a batch; an answer has "nats" and "tokens"."""
        self.windows += [CodedWindow(i, a["nats"], a["tokens"]) for i, a in zip(batch["ids"], answers, strict=True)]

    def restrict(self, count: int) -> None:
        """Expect only `count` windows of the split, for evaluation on a part of it."""
        self.expected = count

    def gather(self) -> None:
        """Gather the values of all ranks on every rank, sorted by id."""
        self.windows = gather_samples(self.windows, self.expected)

    def compute(self) -> dict[str, float]:
        """Compute `loss` (nats per token), `perplexity`, and bits per token, per character and per byte.

        Example: "für" has 3 characters and 4 bytes. A model with an entry for each of 8 characters, all of the same
        probability, needs 3 bits per token and per character, and 9 / 4 bits per byte.
        """
        tokens = sum(window.tokens for window in self.windows)
        nats = math.fsum(window.nats for window in self.windows) / tokens if tokens else math.nan
        bits = nats / math.log(2)
        return {
            "loss": nats,
            "perplexity": math.exp(nats) if nats < 700 else math.inf if nats == nats else math.nan,
            "bits_per_token": bits,
            "bits_per_character": bits * self.amounts.tokens / self.amounts.characters,
            "bits_per_byte": bits * self.amounts.tokens / self.amounts.bytes_,
        }

    def details(self) -> list[tuple[Any, ...]]:
        """Return a table of the numbers of `compute`, the amounts of text, and the context."""
        return [("name", "value"), *self._facts().items()]

    def write(self, folder: Path) -> None:
        """Write `scores.json`, with the rows of `details`, and `windows.csv`, with a row for each window.

        The columns of a window are its id, the number of its tokens that count, and their bits. Only rank 0 writes.
        """
        if not is_main():
            return
        folder.mkdir(parents=True, exist_ok=True)
        facts = {name: value if math.isfinite(value) else None for name, value in self._facts().items()}
        (folder / "scores.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        with (folder / "windows.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(("id", "tokens", "bits"))
            table.writerows((w.id, w.tokens, f"{w.nats / math.log(2):.6g}") for w in self.windows)

    def _facts(self) -> dict[str, float]:
        amounts = self.amounts
        counts = {"tokens": amounts.tokens, "characters": amounts.characters, "bytes": amounts.bytes_}
        evaluated = {"evaluated_tokens": sum(window.tokens for window in self.windows)}
        context = {"unknown_tokens": amounts.unknown, "block": self.block, "stride": self.stride}
        return {**self.compute(), **counts, **evaluated, **context}
