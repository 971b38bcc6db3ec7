import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from common.errors import UserError
from vit.evaluation import neighbours
from vit.evaluation.neighbours import NeighbourClassifier


def scene(samples: int = 200, queries: int = 60, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Overlapping clusters of vectors of unequal norms: features (200, 6), labels (200,), queries (60, 6)."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, 6, generator=generator)
    labels = torch.randint(0, classes, (samples,), generator=generator)
    features = centres[labels] + 1.5 * torch.randn(samples, 6, generator=generator)
    query_features = centres.repeat(queries // classes, 1) + 1.5 * torch.randn(queries, 6, generator=generator)
    return features * torch.rand(samples, 1, generator=generator).add(0.1), labels, query_features * 7


def voted_in_loops(features: torch.Tensor, labels: torch.Tensor, query: torch.Tensor, k: int) -> int:
    """The definition of the vote, sample by sample, in float64."""
    nearest = []
    for feature, label in zip(features.double(), labels.tolist(), strict=True):
        cosine = float(feature @ query.double()) / float(feature.norm() * query.double().norm())
        nearest.append((cosine, label))
    votes: dict[int, float] = defaultdict(float)
    for cosine, label in sorted(nearest, reverse=True)[:k]:
        votes[label] += math.exp(cosine / 0.07)
    return max(votes, key=lambda label: votes[label])


@pytest.mark.parametrize("k", [1, 5, 20, 200])
def test_votes_are_those_of_plain_loops(k):
    features, labels, queries = scene()
    expected = [voted_in_loops(features, labels, query, k) for query in queries]
    assert len({*expected}) == 4
    assert NeighbourClassifier(features, labels, 4).classify(queries, k).tolist() == expected


@pytest.mark.parametrize("k", [1, 20])
def test_votes_are_those_of_sklearn(k):
    features, labels, queries = scene()
    peer = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    peer.fit(features.double().numpy(), labels.numpy())
    assert (
        NeighbourClassifier(features, labels, 4).classify(queries, k).tolist()
        == peer.predict(queries.double().numpy()).tolist()
    )


def test_a_near_neighbour_outvotes_two_far_ones():
    """Similarities 1, 0.9 and 0.9: e^(1 / 0.07) is 4.2 times e^(0.9 / 0.07); a plain majority would say 1."""
    far = [0.9, math.sqrt(1 - 0.81)]
    classifier = NeighbourClassifier(torch.tensor([[1.0, 0.0], far, far]), torch.tensor([0, 1, 1]), 2)
    assert classifier.classify(torch.tensor([[3.0, 0.0]]), 3).tolist() == [0]
    assert classifier.classify(torch.tensor([far]), 3).tolist() == [1]


@pytest.mark.parametrize("entries", [1, 450])
def test_chunks_change_nothing(monkeypatch, entries):
    features, labels, queries = scene()
    whole = NeighbourClassifier(features, labels, 4).classify(queries, 20)
    monkeypatch.setattr(neighbours, "MAX_MATRIX_ENTRIES", entries)
    assert torch.equal(NeighbourClassifier(features, labels, 4).classify(queries, 20), whole)


def test_the_largest_matrix_is_bounded(monkeypatch):
    """450 entries: 2 of 60 queries at once for 200 samples, and 1 for 400 classes, where the votes are larger."""
    features, labels, queries = scene()
    monkeypatch.setattr(neighbours, "MAX_MATRIX_ENTRIES", 450)
    for classes, length in ((4, 2), (400, 1)):
        classifier, lengths = NeighbourClassifier(features, labels, classes), []

        def classify(part: torch.Tensor, k: int, lengths: list[int] = lengths) -> torch.Tensor:
            lengths.append(len(part))
            return torch.zeros(len(part))

        monkeypatch.setattr(classifier, "_classify_chunk", classify)
        classifier.classify(queries, 20)
        assert lengths == [length] * (60 // length)


def test_autocast_and_half_precision_features_change_nothing():
    features, labels, queries = scene()
    classifier = NeighbourClassifier(features, labels, 4)
    expected = classifier.classify(queries, 20)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(classifier.classify(queries, 20), expected)
    features, queries = features.bfloat16(), queries.bfloat16()
    expected = NeighbourClassifier(features.float(), labels, 4).classify(queries.float(), 20)
    assert torch.equal(NeighbourClassifier(features, labels, 4).classify(queries, 20), expected)


def test_fewer_samples_than_k_all_vote():
    classifier = NeighbourClassifier(torch.eye(3), torch.tensor([2, 0, 2]), 3)
    assert classifier.classify(torch.tensor([[1.0, 1.0, 1.0]]), 20).tolist() == [2]


def test_equal_votes_go_to_the_first_class():
    classifier = NeighbourClassifier(torch.eye(2), torch.tensor([4, 3]), 5)
    assert classifier.classify(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), 2).tolist() == [3, 3]


def test_a_query_that_is_not_finite_gets_no_class_and_changes_no_other_query():
    features, labels, queries = scene()
    classifier = NeighbourClassifier(features, labels, 4)
    expected = classifier.classify(queries, 20)
    queries[3, 1], queries[5, 0] = torch.nan, torch.inf
    expected[[3, 5]] = -1
    assert torch.equal(classifier.classify(queries, 20), expected)


def test_training_features_that_are_not_finite_are_an_error():
    with pytest.raises(UserError, match="not finite"):
        NeighbourClassifier(torch.tensor([[1.0, torch.nan]]), torch.tensor([0]), 1)


def test_no_queries_get_no_classes():
    votes = NeighbourClassifier(torch.eye(2), torch.tensor([0, 1]), 2).classify(torch.zeros(0, 2), 1)
    assert votes.shape == (0,) and votes.dtype == torch.int64
