"""Negative sampling against its distribution; Huffman codes against gensim's and against the optimum."""

import heapq
from typing import Any

import numpy as np
import pytest
import torch

from common.machine.seeds import generator
from seq2seq.criterion.word_targets import (
    HierarchicalSoftmax,
    NegativeSampling,
    WordLossOptions,
    huffman_codes,
    word_targets,
)

COUNTS = np.array([400, 200, 90, 17, 5, 3])


def test_negatives_are_sampled_in_proportion_to_their_counts_to_the_power() -> None:
    words = torch.full((40_000,), 5)
    rows = NegativeSampling(COUNTS, 5, 0.75)(words, generator(0)).rows
    assert torch.equal(rows[:, 0], words)
    expected = COUNTS**0.75 / (COUNTS**0.75).sum()
    shares = torch.bincount(rows[:, 1:].flatten(), minlength=6) / 200_000
    # five standard deviations of a share of 200,000 draws are at most 0.0056
    assert shares.tolist() == pytest.approx(expected.tolist(), abs=0.006)


def test_a_negative_that_is_the_word_itself_is_inactive() -> None:
    words = torch.arange(6).repeat(50)
    rows, labels, active = NegativeSampling(COUNTS, 5, 0.75)(words, generator(0))
    assert active[:, 0].all() and torch.equal(active[:, 1:], rows[:, 1:] != words[:, None])
    assert not active.all() and labels.tolist() == [[1, 0, 0, 0, 0, 0]] * 300


def test_negatives_depend_on_the_generator_alone() -> None:
    sampling = NegativeSampling(COUNTS, 5, 0.75)
    first, again, other = (sampling(torch.arange(6), generator(seed)).rows for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def random_counts(size: int, seed: int = 0) -> np.ndarray:
    """Counts so large that no two nodes of the tree have the same."""
    return np.sort((np.random.default_rng(seed).pareto(0.8, size) * 1e9).astype(np.int64) + 1)[::-1].copy()


@pytest.mark.parametrize("size", [2, 3, 10, 300])
def test_codes_and_nodes_equal_gensims(size: int) -> None:
    word2vec: Any = pytest.importorskip("gensim.models.word2vec")
    counts = random_counts(size)
    model = word2vec.Word2Vec(hs=1, negative=0, vector_size=2, min_count=1, sample=0)
    model.build_vocab_from_freq({f"w{i}": int(count) for i, count in enumerate(counts)})
    codes, nodes, lengths = huffman_codes(counts)
    assert len({*lengths.tolist()}) > 1 or size == 2
    for i in range(size):
        assert codes[i, : lengths[i]].tolist() == model.wv.get_vecattr(f"w{i}", "code").tolist()
        assert nodes[i, : lengths[i]].tolist() == model.wv.get_vecattr(f"w{i}", "point").tolist()


@pytest.mark.parametrize("counts", [COUNTS, np.ones(37, np.int64), random_counts(500, seed=1)])
def test_codes_are_free_of_prefixes_and_as_short_as_possible(counts: np.ndarray) -> None:
    """The total length of the best code is the sum of all joined counts (Huffman 1952)."""
    codes, nodes, lengths = huffman_codes(counts)
    texts = ["".join(map(str, code[:length])) for code, length in zip(codes, lengths, strict=True)]
    assert not any(b.startswith(a) for a, b in zip(sorted(texts), sorted(texts)[1:], strict=False))
    heap, total = counts.tolist(), 0
    heapq.heapify(heap)
    while len(heap) > 1:
        joined = heapq.heappop(heap) + heapq.heappop(heap)
        total += joined
        heapq.heappush(heap, joined)
    assert int((lengths * counts).sum()) == total
    assert (nodes[:, 0] == len(counts) - 2).all(), "every path begins at the root"
    assert {*nodes[np.arange(codes.shape[1]) < lengths[:, None]].tolist()} == {*range(len(counts) - 1)}


def test_the_paths_of_all_words_share_one_distribution() -> None:
    """With any output vectors, the probabilities of all words sum to 1, as sigmoid(x) + sigmoid(-x) = 1."""
    targets = HierarchicalSoftmax(COUNTS)(torch.arange(6), generator(0))
    logits = torch.randn(5, dtype=torch.float64, generator=generator(1))[targets.rows]
    decided = torch.where(targets.labels == 1, logits, -logits).sigmoid()
    probabilities = torch.where(targets.active, decided, 1.0).prod(1)
    assert float(probabilities.sum()) == pytest.approx(1.0, abs=1e-12) and probabilities.min() > 0


def test_rows_beyond_the_longest_path_are_not_returned() -> None:
    softmax = HierarchicalSoftmax(COUNTS)
    assert softmax(torch.tensor([0, 1]), generator(0)).rows.shape == (2, 2)
    assert softmax(torch.tensor([0, 5]), generator(0)).rows.shape == (2, 5)
    assert softmax(torch.tensor([], dtype=torch.int64), generator(0)).rows.shape == (0, 0)


def test_frequencies_of_rows_are_those_of_samples() -> None:
    shares = COUNTS / COUNTS.sum()
    sampling = NegativeSampling(COUNTS, 5, 0.75)
    words = torch.multinomial(torch.from_numpy(shares), 60_000, replacement=True, generator=generator(0))
    rows = sampling(words, generator(1)).rows
    assert sampling.most_frequent_row(shares) == pytest.approx(float((rows == 0).sum()) / 60_000, rel=0.01)
    softmax = HierarchicalSoftmax(COUNTS)
    targets = softmax(words, generator(0))
    assert softmax.decisions(shares) == pytest.approx(float(targets.active.sum()) / 60_000, rel=0.01)
    assert softmax.most_frequent_row(shares) == float(((targets.rows == 4) & targets.active).sum()) / 60_000


@pytest.mark.parametrize(
    ("output", "kind"), [("negative_sampling", NegativeSampling), ("hierarchical_softmax", HierarchicalSoftmax)]
)
def test_options_choose_the_approximation(output: Any, kind: type) -> None:
    options = WordLossOptions(architecture="cbow", output=output, negatives=3, exponent=0.75, block=16)
    assert isinstance(word_targets(options, COUNTS), kind)
