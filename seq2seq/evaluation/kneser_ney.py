"""N-gram models with interpolated modified Kneser-Ney smoothing (Chen and Goodman 1998, TR-10-98, Harvard, section 3).

They are the baseline of language models: a table of counts, without training by gradients.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError

FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)  # where the counts of counts give no discounts; the defaults of KenLM
MAX_ORDER = 20

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


class _Order(NamedTuple):
    """The n-grams of one length n. An n-gram is identified by its context of n - 1 tokens and its last token."""

    keys: Integers  # sorted: (id of the context among the (n-1)-grams) * base + last token; the id is the position here
    counts: Integers  # of each n-gram: its occurrences or, below the highest order, how many tokens precede it
    totals: Integers  # the sum of counts for each context
    left: Floats  # for each context, the probability that discounting sets aside for the next lower order


class KneserNey:
    """A model of order n: the probability of a token given the n - 1 tokens before it.

    The probability is the discounted count of the n-gram divided by the count of its context, plus the mass that
    discounting sets aside times the probability of order n - 1. Below order 1 is the uniform distribution over the
    vocabulary, so every token has a probability above 0. The counts of lower orders are numbers of different tokens
    that precede an n-gram. A text begins with n - 1 begin tokens, which are never predicted.

    Differs: where a text is too small to estimate discounts (a count of counts is 0, or a discount is outside its
    range), `FALLBACK_DISCOUNTS` are used.

    Attributes:
        order: n.
        vocabulary: V.
        discounts: for each order from 1 to n, the discounts of n-grams that occur once, twice, and more often.
    """

    def __init__(self, tokens: NDArray[Any], vocabulary: int, order: int):
        """Count the n-grams of a text: tokens (T,) in 0 to V - 1, V = `vocabulary`.

        Raises UserError for an empty text, and for an order below 1 or above `MAX_ORDER`.
        """
        if not len(tokens) or not 1 <= order <= MAX_ORDER:
            what = f"an order of {order}" if len(tokens) else "a text without tokens"
            raise UserError(f"An n-gram model of {what} cannot be made; give text, and an order from 1 to {MAX_ORDER}.")
        self.vocabulary, self.order = vocabulary, order
        self.discounts: list[tuple[float, float, float]] = []
        self._base = vocabulary + 1  # the begin token is V
        stream = self._stream(tokens)
        ids, keys = self._count_keys(stream)
        counts = self._counts(ids, keys)
        self._orders = [self._smoothed(keys[n], counts[n], len(keys[n - 1]) if n else 1) for n in range(order)]

    def log_probabilities(self, tokens: NDArray[Any]) -> Floats:
        """The log probability in nats of each token of a text, given those before it: (T,) -> (T,)."""
        stream, start = self._stream(tokens), self.order - 1
        result = np.full(len(tokens), 1 / self.vocabulary)
        context = np.zeros(len(stream), np.int64)  # at each position, the id of the (n-1)-gram that ends before it
        for level, order in enumerate(self._orders):
            gram = _find(order.keys, context, stream, self._base)
            rows, grams = np.maximum(context[start:], 0), gram[start:]
            totals = np.where(context[start:] >= 0, order.totals[rows], 0)
            counts = np.where(grams >= 0, order.counts[grams], 0)
            discounted = np.maximum(counts - self._discount(level, counts), 0)
            mixed = discounted / np.maximum(totals, 1) + order.left[rows] * result
            result = np.where(totals > 0, mixed, result)
            context = np.concatenate([[-1], gram[:-1]])
        return np.log(result)

    def _stream(self, tokens: NDArray[Any]) -> Integers:
        """A text with begin tokens before it: (T,) -> (n - 1 + T,)."""
        return np.concatenate([np.full(self.order - 1, self._base - 1), np.asarray(tokens, np.int64)])

    def _count_keys(self, stream: Integers) -> tuple[list[Integers], list[Integers]]:
        """For each order, the id of the n-gram that ends at each position, -1 if there is none, and the sorted keys."""
        all_ids, all_keys = [], []
        context = np.zeros(len(stream), np.int64)
        for _ in range(self.order):
            complete = context >= 0
            keys, inverse = np.unique(context[complete] * self._base + stream[complete], return_inverse=True)
            ids = np.full(len(stream), -1)
            ids[complete] = inverse
            all_ids.append(ids)
            all_keys.append(keys)
            context = np.concatenate([[-1], ids[:-1]])
        return all_ids, all_keys

    def _counts(self, ids: list[Integers], keys: list[Integers]) -> list[Integers]:
        """The count of each n-gram; 0 for one that ends with a begin token."""
        start = self.order - 1  # the position of the first token that is predicted
        counts = [np.bincount(ids[-1][start:], minlength=len(keys[-1]))]
        for longer, shorter, grams in zip(ids[:0:-1], ids[-2::-1], keys[-2::-1], strict=True):
            _, first = np.unique(longer[start:], return_index=True)  # one position of each longer n-gram
            counts.insert(0, np.bincount(shorter[start:][first], minlength=len(grams)))
        return counts

    def _smoothed(self, keys: Integers, counts: Integers, contexts: int) -> _Order:
        """Estimate the discounts of one order, and what they set aside for each of its `contexts`."""
        self.discounts.append(_estimate_discounts(counts))
        context = keys // self._base
        totals = np.bincount(context, counts, contexts).astype(np.int64)
        aside = np.minimum(self._discount(len(self.discounts) - 1, counts), counts)
        left = np.bincount(context, aside, contexts) / np.maximum(totals, 1)
        return _Order(keys, counts, totals, left)

    def _discount(self, level: int, counts: Integers) -> Floats:
        table = np.array([0.0, *self.discounts[level]])
        return table[np.minimum(counts, 3)]


def _find(keys: Integers, context: Integers, last: Integers, base: int) -> Integers:
    """The positions in `keys` of n-grams with these contexts and last tokens; -1 for an n-gram that is not there."""
    wanted = context * base + last
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where((context >= 0) & (keys[places] == wanted), places, -1)


def _estimate_discounts(counts: Integers) -> tuple[float, float, float]:
    """The discounts of n-grams with counts 1, 2 and at least 3 (Chen and Goodman 1998, section 3).

    n1 to n4 are the numbers of n-grams with these counts, and Y = n1 / (n1 + 2 n2). The discount of count k is
    k - (k + 1) Y n(k+1) / n(k).
    """
    n = [int(np.count_nonzero(counts == k)) for k in range(5)]
    if 0 in n[1:]:
        return FALLBACK_DISCOUNTS
    y = n[1] / (n[1] + 2 * n[2])
    first, second, third = (k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3))
    if not (0 < first <= 1 and 0 < second <= 2 and 0 < third <= 3):
        return FALLBACK_DISCOUNTS
    return first, second, third
