"""What decoding asks of a model, and what it answers: translators, language models and image GPT share it."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from common.errors import UserError


class SpecialIds(NamedTuple):
    """The entries of a vocabulary that decoding must know; `begin` and `end` may be one and the same."""

    begin: int  # the prompt of a row that has no other
    end: int  # ends an answer, and is no part of it
    never: tuple[int, ...]  # those that no answer holds, such as padding


class Decoder(Protocol):
    """The three methods of a model that can be decoded. A state is the model's own, and used once.

    Sentences are in the batch with equally many rows each (one, or one for each hypothesis of a beam), those of one
    sentence side by side, before and after `reorder`: what belongs to a source need not be stored for every row.
    """

    def encode(self, source: Tensor, lengths: Tensor) -> Any:
        """The state of B rows with no token yet, from sources (B, S) int64 right-padded and their lengths (B,).

        A model without a source, such as a language model, gets S = 0.
        """

    def step(self, state: Any, tokens: Tensor) -> Tensor:
        """Append a token to every row, (R,) int64 -> logits or log probabilities of the next (R, V).

        The first call gives the prompt: (R,) where it is one token, else (R, N); all later calls give (R,). The state
        is extended in place. The result belongs to the caller, who writes into it.
        """

    def reorder(self, state: Any, rows: Tensor) -> Any:
        """The state of these rows, (R',) int64: some repeated, some left out."""


class Hypothesis(NamedTuple):
    """One answer."""

    tokens: list[int]  # without prompt and end
    score: float  # log_probability over the length penalty
    log_probability: float  # of its tokens, the end included, in nats
    ended: bool  # False where it was cut at the limit


def group_by_length(prompts: Sequence[Sequence[int]], device: torch.device) -> Iterator[tuple[list[int], Tensor]]:
    """Groups of prompts of one length P > 0, the shortest first: the numbers of their rows, and tokens (rows, P)."""
    for length in sorted({*map(len, prompts)}):
        assert length, "an empty prompt"
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
        yield rows, torch.tensor([[*prompts[row]] for row in rows], device=device)


def next_logits(model: Decoder, state: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Step by tokens (R,) or (R, N) -> logits of the next (R, V), at least fp32, and their normaliser (R, 1)."""
    logits = model.step(state, tokens.squeeze(1) if tokens.ndim == 2 and tokens.shape[1] == 1 else tokens)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits, logits.logsumexp(-1, keepdim=True)


def forbid_tokens(logits: Tensor, tokens: Sequence[int], end: int, must_end: Tensor) -> None:
    """Forbid, in logits (R, V), some tokens everywhere, and all but `end` in the rows that `must_end` (R,).

    Nothing is normalised again, so a hypothesis has the log probability that scoring it gives.
    """
    for token in tokens:  # the list as an index would have to be copied to the device
        logits[:, token] = -math.inf
    if must_end.any():
        others = torch.arange(logits.shape[1], device=logits.device) != end
        logits.masked_fill_(must_end.to(logits.device)[:, None] & others, -math.inf)


def refuse_nan(logs: Tensor) -> Tensor:
    """The log probabilities themselves; raises UserError where one is NaN."""
    if logs.isnan().any():
        raise UserError(
            "the model's probabilities are not numbers; its weights are broken, or the precision is too low (try "
            "trainer.precision=fp32)."
        )
    return logs


def remove_finished(model: Decoder, state: Any, stays: Tensor, device: torch.device) -> tuple[Any, Tensor]:
    """The state without the rows that do not stay (R,), and the numbers of those that do (on the CPU)."""
    rows = stays.nonzero()[:, 0]
    if 0 < len(rows) < len(stays):
        state = model.reorder(state, rows.to(device))
    return state, rows
