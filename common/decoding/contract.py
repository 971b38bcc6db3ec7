"""The interface between decoding and a model, such as a translator or a language model."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from common.errors import UserError


class SpecialIds(NamedTuple):
    """The ids of a vocabulary's special entries; `begin` and `end` may be equal."""

    begin: int  # the only token of the default prompt
    end: int  # the last token of a complete answer (EOS); `Hypothesis.tokens` does not contain it
    never: tuple[int, ...]  # ids that no answer may contain, such as padding


class Decoder(Protocol):
    """A model whose answers can be decoded token by token.

    The decoding state may be of any type. After a state was passed to `reorder`, only the returned state is used.

    A row of the batch is one hypothesis. All unfinished sentences have the same number of rows, and the rows of a
    sentence are adjacent. This holds before and after `reorder`, which removes the rows of finished sentences. So a
    model can store values that depend only on the source once for each sentence.
    """

    def encode(self, source: Tensor, lengths: Tensor) -> Any:
        """The initial state of B rows, from right-padded sources (B, S) int64 and their lengths (B,).

        For a model without a source, such as a language model, S is 0.
        """

    def step(self, state: Any, tokens: Tensor) -> Tensor:
        """Append a token to every row: (R,) int64 -> logits or log probabilities of the next token (R, V).

        The first call passes the prompt: (R,) if it is one token, else (R, N). All later calls pass (R,). The state is
        extended in place. The caller may overwrite the result.
        """

    def reorder(self, state: Any, rows: Tensor) -> Any:
        """Return a state whose row i is the row rows[i] of `state`.

        `rows` (R',) int64 may repeat and omit indices.
        """


class Hypothesis(NamedTuple):
    """A candidate answer."""

    tokens: list[int]  # without prompt and end
    score: float  # log_probability divided by the length penalty
    log_probability: float  # of `tokens` and the end (if there is one), in nats
    ended: bool  # False if the answer was cut at the limit and has no end


def group_by_length(prompts: Sequence[Sequence[int]], device: torch.device) -> Iterator[tuple[list[int], Tensor]]:
    """Group prompts by their length P > 0. Yields each group's indices and tokens (n, P), shortest first."""
    for length in sorted({*map(len, prompts)}):
        assert length, "an empty prompt"
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
        yield rows, torch.tensor([[*prompts[row]] for row in rows], device=device)


def next_logits(model: Decoder, state: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Append tokens (R,) or (R, N) to the rows of `state`, in place.

    Returns the logits of the next token and its log probabilities, both (R, V), in fp32 or fp64.
    """
    logits = model.step(state, tokens.squeeze(1) if tokens.ndim == 2 and tokens.shape[1] == 1 else tokens)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # `log_softmax` is one operation, which takes 0.6 times as long as `logsumexp` on a CPU.
    return logits, logits.log_softmax(-1)


def forbid_tokens(logits: Tensor, tokens: Sequence[int], end: int, must_end: Tensor) -> None:
    """Set the logits (R, V) of forbidden tokens to minus infinity, in place.

    `tokens` are forbidden in all rows. In the rows where `must_end` (R,) is true, all tokens except `end` are
    forbidden. The probabilities of the permitted tokens are not normalised again, so that a hypothesis has the log
    probability that `common.decoding.given.score` computes for it.
    """
    for token in tokens:  # one by one, because a list of indices would be copied to the device
        logits[:, token] = -math.inf
    if must_end.any():
        not_end = torch.arange(logits.shape[1], device=logits.device) != end
        logits.masked_fill_(must_end.to(logits.device)[:, None] & not_end, -math.inf)


def refuse_nan(log_probabilities: Tensor) -> Tensor:
    """Return the log probabilities unchanged; raises UserError if one is NaN."""
    if log_probabilities.isnan().any():
        raise UserError(
            "the model's probabilities are NaN: its weights are broken, or the precision is too low; try "
            "trainer.precision=fp32."
        )
    return log_probabilities


def remove_finished(model: Decoder, state: Any, unfinished: Tensor, device: torch.device) -> tuple[Any, Tensor]:
    """Remove the finished rows from `state`; `unfinished` (R,) is boolean.

    Returns the new state and the indices of the remaining rows (R',) on the CPU. If none remains, the state is
    unchanged.
    """
    rows = unfinished.nonzero()[:, 0]
    if 0 < len(rows) < len(unfinished):
        state = model.reorder(state, rows.to(device))
    return state, rows
