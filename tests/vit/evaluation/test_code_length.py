"""Bits per pixel, worked out by hand and against a plain computation."""

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vit.evaluation.code_length import CodeLengthMetric

NAMES = ["ant", "bee"]


def filled(metric: CodeLengthMetric, rows: list[dict[str, Any]], labels: list[int]) -> CodeLengthMetric:
    """The metric after two batches, the second with the last row only."""
    ids = list(range(len(rows)))
    for part in (slice(0, -1), slice(-1, None)):
        metric.update({"ids": ids[part], "labels": torch.tensor(labels[part])}, rows[part])
    metric.gather()
    return metric


def test_equal_probabilities_of_8_colours_are_3_bits() -> None:
    """Two images of 4 pixels and one of 2, each pixel ln 8 nats; three channels divide the bits by three."""
    rows = [{"nats": n * math.log(8), "pixels": n} for n in (4, 4, 2)]
    numbers = filled(CodeLengthMetric(3, NAMES, False, 3), rows, [0, 1, 1]).compute()
    assert numbers == {"bits_per_pixel": pytest.approx(3), "bits_per_dimension": pytest.approx(1)}


def test_a_constant_predictor_has_the_cross_entropy_of_its_frequencies() -> None:
    """A plain computation: the mean over all pixels of -log2 q(colour), for fixed frequencies q."""
    rng = np.random.default_rng(0)
    frequencies = np.array([0.5, 0.25, 0.2, 0.05])
    images = rng.integers(0, 4, (7, 30))
    rows = [{"nats": -float(np.log(frequencies[image]).sum()), "pixels": 30} for image in images]
    expected = float(-np.log2(frequencies)[images].mean())
    numbers = filled(CodeLengthMetric(1, NAMES, False), rows, [0] * 7).compute()
    assert numbers["bits_per_pixel"] == pytest.approx(expected, rel=1e-12)
    assert numbers["bits_per_dimension"] == numbers["bits_per_pixel"]


def test_masked_models_have_a_number_of_another_name_over_masked_pixels() -> None:
    """Bits 2 + 6 over 1 + 3 masked pixels."""
    rows = [{"nats": 2 * math.log(2), "pixels": 1}, {"nats": 6 * math.log(2), "pixels": 3}]
    numbers = filled(CodeLengthMetric(1, NAMES, True), rows, [0, 1]).compute()
    assert numbers == {"bits_per_masked_pixel": pytest.approx(2)}


def test_classes_give_accuracy_and_rows_of_details(tmp_path: Path) -> None:
    rows = [{"nats": math.log(2) * bits, "pixels": 1, "label": label} for bits, label in ((1, 0), (2, 1), (3, 1))]
    metric = filled(CodeLengthMetric(1, NAMES, False), rows, [0, 1, 0])
    assert metric.compute()["top1"] == pytest.approx(2 / 3)
    header, *table = metric.details()
    assert header == ("class", "images", "bits", "top1")
    assert [tuple(row) for row in table] == [("ant", 2, pytest.approx(2), 0.5), ("bee", 1, pytest.approx(2), 1.0)]
    metric.write(tmp_path)
    lines = list(csv.reader((tmp_path / "bits.csv").open()))
    assert lines[0] == ["id", "pixels", "bits_per_pixel", "truth", "predicted"]
    assert lines[3] == ["2", "1", "3", "0", "1"]


def test_a_missing_image_is_noticed() -> None:
    with pytest.raises(AssertionError, match="2 of 3 samples"):
        filled(CodeLengthMetric(1, NAMES, False, 3), [{"nats": 1.0, "pixels": 1}] * 2, [0, 1])
