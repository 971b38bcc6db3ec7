"""A linear probe: logistic regression on frozen features (Chen et al. 2020, image GPT, section 3.2)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError

MAX_ITERATIONS = 500  # of L-BFGS

Features = NDArray[np.float64]  # (n, C)
Labels = NDArray[np.int64]  # (n,)


class ProbeResult(NamedTuple):
    """The strength C that is best on val (the inverse of the L2 penalty), and the accuracy with it."""

    strength: float
    val: float
    test: float


def fit_probe(
    train: tuple[Features, Labels],
    val: tuple[Features, Labels],
    test: tuple[Features, Labels],
    strengths: Sequence[float],
) -> ProbeResult:
    """Fit logistic regressions by L-BFGS on train, choose among `strengths` on val, and evaluate the best on test.

    Features are standardised by the mean and deviation of train. Of equal accuracies on val, the first of `strengths`
    wins. Raises UserError if a feature is not finite.
    """
    if not all(np.isfinite(features).all() for features, _ in (train, val, test)):
        raise UserError("the features are not finite; the weights are broken, or the precision is too low.")
    from sklearn.linear_model import LogisticRegression  # slow to import
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    best: ProbeResult | None = None
    for strength in strengths:
        regression = LogisticRegression(C=strength, solver="lbfgs", max_iter=MAX_ITERATIONS)
        model = make_pipeline(StandardScaler(), regression).fit(*train)
        result = ProbeResult(strength, float(model.score(*val)), float(model.score(*test)))
        if best is None or result.val > best.val:
            best = result
    assert best is not None, "no strengths"
    return best


def few_per_class(labels: Labels, count: int, seed: int) -> NDArray[np.int64]:
    """Choose at most `count` samples of each class at random; returns their indices, sorted."""
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = [order[labels[order] == label][:count] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))
