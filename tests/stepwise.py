"""Decoders that compare the step-by-step computation of a translator with `forward` at every step of a search."""

from typing import Any

import torch
from torch import Tensor


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
