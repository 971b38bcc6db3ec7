"""What tests of translators share: sentences, searches, and decoders that compare each step with `forward`."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from common.decoding.contract import Hypothesis
from common.machine.seeds import generator
from seq2seq.tokenizers.bpe import BOS, EOS, PAD
from tests.searching import BEAM as OPTIONS

EXACT = 1e-10  # float64, a few layers with values of size one
ENTRIES = 24  # of the vocabulary
GREEDY = replace(
    OPTIONS, method="greedy", beam=3, penalty="gnmt", alpha=0.6, candidates=1, longest_factor=0.5, longest_extra=5
)
BEAM, SAMPLE = replace(GREEDY, method="beam", candidates=3), replace(GREEDY, method="sample", candidates=2)
SEARCHES = {"greedy": GREEDY, "beam": BEAM, "sample": SAMPLE}


def sentences(lengths: list[int], vocabulary: int = ENTRIES, padding: int = 0) -> tuple[Tensor, Tensor]:
    """Sentences of random words that end with EOS, padded to the longest plus `padding`, and their lengths."""
    rng = generator("sentences", *lengths)
    rows = torch.full((len(lengths), max(lengths) + padding), PAD)
    for row, length in zip(rows, lengths, strict=True):
        row[:length] = torch.randint(4, vocabulary, (length,), generator=rng)
        row[length - 1] = EOS
    return rows, torch.tensor(lengths)


def shifted(target_out: Tensor) -> Tensor:
    """Targets shifted right, with BOS first."""
    return torch.cat([torch.full_like(target_out[:, :1], BOS), target_out[:, :-1]], 1)


def assert_close(actual: list[list[Hypothesis]], expected: list[list[Hypothesis]]) -> None:
    """Check that the hypotheses of each sentence have the same tokens and scores."""
    for pair in zip(actual, expected, strict=True):
        for a, b in zip(*pair, strict=True):
            assert a.tokens == b.tokens
            assert a.score == pytest.approx(b.score, abs=EXACT)


class Uncached:
    """A translator without its decoding state: every step passes all tokens so far through `forward`."""

    def __init__(self, model: Any):
        self.model = model

    def encode(self, source: Tensor, lengths: Tensor) -> list[Tensor]:
        return [source, lengths, source.new_empty(len(source), 0)]

    def step(self, state: list[Tensor], tokens: Tensor) -> Tensor:
        tokens = tokens if tokens.ndim == 2 else tokens[:, None]
        state[2] = torch.cat([state[2], tokens], 1)
        return self.model(*state)[:, -1]

    def reorder(self, state: list[Tensor], rows: Tensor) -> list[Tensor]:
        return [part[rows] for part in state]


class Compared:
    """A translator, compared at every step with itself without its decoding state."""

    def __init__(self, model: Any, tolerance: float):
        self.model, self.uncached, self.tolerance = model, Uncached(model), tolerance
        self.rows: list[int] = []  # of each step

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Any, Any]:
        return self.model.encode(source, lengths), self.uncached.encode(source, lengths)

    def step(self, state: tuple[Any, Any], tokens: Tensor) -> Tensor:
        self.rows.append(len(tokens))
        logits, expected = self.model.step(state[0], tokens), self.uncached.step(state[1], tokens)
        torch.testing.assert_close(logits, expected, rtol=0, atol=self.tolerance)
        return logits

    def reorder(self, state: tuple[Any, Any], rows: Tensor) -> tuple[Any, Any]:
        return self.model.reorder(state[0], rows), self.uncached.reorder(state[1], rows)


@torch.no_grad()
def check_reordering(model: Any, tolerance: float) -> None:
    """Check each step with one to four random hypotheses of each sentence, many with the same parent.

    Some sentences are removed.
    """
    compared, rng = Compared(model, tolerance), generator("hypotheses", 0)
    state, sentence_count, width = compared.encode(*sentences([4, 1, 7, 2, 5])), 5, 1
    rows = torch.full((5,), BOS)
    for n in range(14):
        compared.step(state, rows)
        remaining = torch.arange(sentence_count)
        if n in (3, 6, 7):
            remaining = remaining[torch.randperm(sentence_count, generator=rng)[:-1].sort().values]
        new_width = int(torch.randint(1, 5, (), generator=rng))
        parents = torch.randint(width, (len(remaining), new_width), generator=rng)
        state = compared.reorder(state, (remaining[:, None] * width + parents).flatten())
        sentence_count, width = len(remaining), new_width
        rows = torch.randint(3, ENTRIES, (sentence_count * width,), generator=rng)
    assert sentence_count == 2 and {*compared.rows} > {5}
