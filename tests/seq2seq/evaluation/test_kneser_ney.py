"""Kneser-Ney smoothing against a plain computation from its definition, and distributions that sum to 1."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common.errors import UserError
from seq2seq.evaluation.kneser_ney import FALLBACK_DISCOUNTS, KneserNey

VOCABULARY = 8
ORDERS = pytest.mark.parametrize("order", [1, 2, 3, 5])


def texts() -> tuple[NDArray[Any], NDArray[Any]]:
    """A skewed text of 6 of the 8 tokens, and one of all 8."""
    rng = np.random.default_rng(0)
    return rng.choice(6, 300, p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.05]), rng.integers(0, VOCABULARY, 40)


class Plain:
    """The definition, with dicts: counts of n-grams, of what precedes them, and a recursion over orders."""

    def __init__(self, tokens: list[int], order: int, discounts: list[tuple[float, float, float]]):
        stream = [-1] * (order - 1) + tokens
        ends = range(order - 1, len(stream))
        self.order, self.discounts = order, discounts
        self.counts = [Counter(tuple(stream[i - order + 1 : i + 1]) for i in ends)]  # by order, from 1 on
        for n in range(order - 1, 0, -1):
            longer = {tuple(stream[i - n : i + 1]) for i in ends}
            self.counts.insert(0, Counter(gram[1:] for gram in longer))

    def discount(self, n: int, count: int) -> float:
        return min(count, self.discounts[n - 1][min(count, 3) - 1]) if count else 0.0

    def probability(self, context: tuple[int, ...], token: int, n: int) -> float:
        if n == 0:
            return 1 / VOCABULARY
        context = context[len(context) - (n - 1) :]
        following = {gram[-1]: count for gram, count in self.counts[n - 1].items() if gram[:-1] == context}
        lower = self.probability(context, token, n - 1)
        if not following:
            return lower
        total, count = sum(following.values()), following.get(token, 0)
        left = sum(self.discount(n, each) for each in following.values())
        return (count - self.discount(n, count) + left * lower) / total

    def log_probabilities(self, tokens: list[int]) -> list[float]:
        stream, n = [-1] * (self.order - 1) + tokens, self.order
        ends = range(n - 1, len(stream))
        return [math.log(self.probability(tuple(stream[i - n + 1 : i]), stream[i], n)) for i in ends]


@ORDERS
def test_probabilities_are_those_of_the_definition(order: int) -> None:
    train, test = texts()
    model = KneserNey(train, VOCABULARY, order)
    plain = Plain(train.tolist(), order, model.discounts)
    np.testing.assert_allclose(model.log_probabilities(test), plain.log_probabilities(test.tolist()), rtol=1e-12)
    np.testing.assert_allclose(model.log_probabilities(train), plain.log_probabilities(train.tolist()), rtol=1e-12)


@ORDERS
def test_probabilities_sum_to_one_after_seen_and_unseen_contexts(order: int) -> None:
    train, test = texts()
    model = KneserNey(train, VOCABULARY, order)
    for context in (train[:9], test[:9], np.array([7] * 6), train[-5:], np.array([], np.int64)):
        rows = [model.log_probabilities(np.append(context, token))[-1] for token in range(VOCABULARY)]
        assert math.fsum(np.exp(rows)) == pytest.approx(1, abs=1e-12) and min(rows) > -math.inf


def test_discounts_are_those_of_the_paper() -> None:
    """Worked out by hand for one order: 5 tokens occur once, 3 twice, 2 three times and 1 four times, so Y = 5 / 11.

    D1 = 1 - 2 Y 3/5 = 1 - 6/11, D2 = 2 - 3 Y 2/3 = 2 - 10/11, D3 = 3 - 4 Y 1/2 = 3 - 10/11.
    """
    counts = [1] * 5 + [2] * 3 + [3] * 2 + [4]
    tokens = np.repeat(np.arange(len(counts)), counts)
    assert KneserNey(tokens, 11, 1).discounts == [pytest.approx((5 / 11, 12 / 11, 23 / 11))]
    assert KneserNey(np.array([0, 1, 1]), 2, 1).discounts == [FALLBACK_DISCOUNTS]


def test_a_longer_context_predicts_a_regular_text_better() -> None:
    rng = np.random.default_rng(1)
    tokens = np.zeros(3000, np.int64)
    for i in range(2, len(tokens)):  # each token follows from the two before it, but for a tenth that is random
        tokens[i] = (tokens[i - 1] + 2 * tokens[i - 2] + 1) % 5 if rng.random() < 0.9 else rng.integers(5)
    bits = [-KneserNey(tokens[:2000], 5, n).log_probabilities(tokens[2000:]).mean() / math.log(2) for n in (1, 2, 3)]
    assert bits[0] > bits[1] > bits[2] and bits[2] < 1.1 and bits[0] > 2


def test_an_empty_text_and_an_impossible_order_are_refused() -> None:
    for tokens, order in ((np.array([], np.int64), 2), (np.array([1]), 0), (np.array([1]), 21)):
        with pytest.raises(UserError, match="n-gram model"):
            KneserNey(tokens, 3, order)
