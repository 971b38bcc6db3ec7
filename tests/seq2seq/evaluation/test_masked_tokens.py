"""The numbers of a masked language model, worked out by hand."""

import math

import pytest

from seq2seq.evaluation.masked_tokens import MaskedTokenMetric


def answer(tokens: int, nats: float, correct: int, unigram_nats: float = 0.0, unigram_correct: int = 0) -> dict:
    names = ("tokens", "nats", "correct", "unigram_nats", "unigram_correct")
    return dict(zip(names, (tokens, nats, correct, unigram_nats, unigram_correct), strict=True))


def test_numbers_are_means_over_masked_tokens_and_not_over_samples(tmp_path):
    """The example of `compute`: probabilities 1/2 and 1/4 in one sample, 1/8 in another."""
    metric = MaskedTokenMetric(2)
    metric.update({"ids": [1]}, [answer(1, 3 * math.log(2), 0, 4.0, 1)])
    metric.update({"ids": [0]}, [answer(2, 3 * math.log(2), 1, 5.0, 0)])
    metric.gather()
    numbers = metric.compute()
    assert numbers["nats"] == pytest.approx(2 * math.log(2)) and numbers["accuracy"] == pytest.approx(1 / 3)
    assert numbers["unigram_nats"] == pytest.approx(3.0) and numbers["unigram_accuracy"] == pytest.approx(1 / 3)
    assert metric.details()[1] == ("this", numbers["nats"], numbers["accuracy"])
    metric.write(tmp_path)
    rows = (tmp_path / "masked.csv").read_text().splitlines()
    assert rows[0].startswith("id,tokens,nats") and rows[1].startswith("0,2,2.07944,1")


def test_a_missing_sample_is_noticed_and_a_part_is_permitted():
    metric = MaskedTokenMetric(2)
    metric.update({"ids": [0]}, [answer(1, 1.0, 0)])
    with pytest.raises(AssertionError):
        metric.gather()
    metric.restrict(1)
    metric.gather()
    assert metric.compute()["nats"] == 1.0
