"""Accuracy and F1 of a classifier of texts: worked out by hand, and against scikit-learn."""

import math

import pytest
import torch

from common.machine.seeds import generator
from seq2seq.evaluation.text_classes import TextClassMetric


def metric_of(truth: list[int], scores: torch.Tensor, names: list[str]) -> TextClassMetric:
    metric = TextClassMetric(names, len(truth))
    logs = scores.log_softmax(1)
    answers = [{"log_probabilities": row, "label": int(row.argmax()), "share": float(row.max().exp())} for row in logs]
    metric.update({"ids": [*range(len(truth))], "labels": torch.tensor(truth)}, answers)
    metric.gather()
    return metric


def test_numbers_are_those_of_the_example():
    """True classes a a b, predictions a b b with probability 1/2 each: f1 is 2/3 for both, the loss ln 2."""
    metric = metric_of([0, 0, 1], torch.tensor([[0.0, -1e-9], [-1e-9, 0.0], [-1e-9, 0.0]]).double(), ["a", "b"])
    numbers = metric.compute()
    assert numbers["accuracy"] == numbers["f1_macro"] == pytest.approx(2 / 3)
    assert numbers["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metric.details()[1] == ("a", 2, 1.0, 0.5, pytest.approx(2 / 3))


def test_numbers_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = generator("classes")
    truth = torch.randint(4, (200,), generator=rng).tolist()
    scores = torch.randn(200, 5, generator=rng)  # the fifth class is predicted but never true
    predicted = scores.argmax(1).tolist()
    numbers = metric_of(truth, scores, list("abcde")).compute()
    assert numbers["accuracy"] == pytest.approx(metrics.accuracy_score(truth, predicted))
    assert numbers["f1_macro"] == pytest.approx(metrics.f1_score(truth, predicted, average="macro"))
    assert numbers["loss"] == pytest.approx(
        metrics.log_loss(truth, scores.double().softmax(1), labels=[*range(5)]), rel=1e-5
    )


def test_a_class_that_is_neither_true_nor_predicted_is_not_counted(tmp_path):
    metric = metric_of([0, 0], torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), ["a", "b", "c"])
    assert metric.compute()["f1_macro"] == 1.0 and math.isnan(metric.details()[2][4])
    metric.write(tmp_path)
    assert (tmp_path / "predictions.csv").read_text().splitlines()[1] == "0,a,a,0.576117"
