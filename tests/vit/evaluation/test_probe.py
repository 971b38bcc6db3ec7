"""Linear probes: separable features, the choice of the penalty on val, and few labels."""

import numpy as np
import pytest

from common.errors import UserError
from vit.evaluation.probe import few_per_class, fit_probe

RNG = np.random.default_rng(0)


def clusters(count: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    labels = RNG.integers(0, 3, count)
    return scale * np.eye(3)[labels] + RNG.normal(0, 0.05 * scale, (count, 3)), labels


def test_separable_classes_are_learnt_at_any_scale_of_the_features() -> None:
    for scale in (1e-4, 1.0, 1e4):
        result = fit_probe(clusters(90, scale), clusters(30, scale), clusters(30, scale), [1.0])
        assert result == (1.0, 1.0, 1.0)


def test_noise_is_not_learnt() -> None:
    splits = [(RNG.normal(size=(n, 4)), RNG.integers(0, 2, n)) for n in (60, 200, 200)]
    assert fit_probe(*splits, [1.0]).test < 0.65


def test_the_penalty_is_chosen_on_val() -> None:
    """Train's labels are right in val and reversed in test: the choice must follow val, whatever test says."""
    train, val = clusters(60), clusters(60)
    test = (val[0], (val[1] + 1) % 3)
    result = fit_probe(train, val, test, [1e-9, 1.0])  # with 1e-9, the most frequent class is predicted
    assert result.strength == 1.0 and result.val == 1.0 and result.test == 0.0


def test_few_labels_are_as_many_of_each_class_and_fixed_by_the_seed() -> None:
    labels = np.array([0] * 50 + [1] * 3 + [2] * 20)
    rows = few_per_class(labels, 5, seed=1)
    assert np.bincount(labels[rows]).tolist() == [5, 3, 5] and (np.diff(rows) > 0).all()
    assert np.array_equal(rows, few_per_class(labels, 5, seed=1))
    assert not np.array_equal(rows, few_per_class(labels, 5, seed=2))


def test_features_that_are_not_finite_are_refused() -> None:
    train, val = clusters(30), clusters(30)
    with pytest.raises(UserError, match="not finite"):
        fit_probe(train, val, (val[0] * np.nan, val[1]), [1.0])
