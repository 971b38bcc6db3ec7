"""What word2vec predicts of a word: the two approximations of a softmax over the vocabulary.

Both replace the prediction of a word by binary decisions, each with a row of the model's output table: R rows for each
word, with the labels 1 or 0. Mikolov et al. 2013 (arXiv 1310.4546), section 2.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.types import NonNegativeFloat, Positive


class Targets(NamedTuple):
    """The binary decisions for N words: R rows of the output table for each."""

    rows: Tensor  # int64 (N, R)
    labels: Tensor  # float32 (N, R), 1 or 0
    active: Tensor  # bool (N, R); False for padding, and for a negative example that is the word itself


@dataclass(frozen=True, kw_only=True)
class WordLossOptions:
    """Which word is predicted from which, how it is predicted, and how many words are updated at once."""

    architecture: Literal["cbow", "skip_gram"]
    output: Literal["negative_sampling", "hierarchical_softmax"]
    negatives: Positive  # for negative_sampling: the number K of negative examples
    exponent: NonNegativeFloat  # for negative_sampling: negatives are sampled in proportion to count ** exponent
    block: Positive  # maximum number of words that are updated at once


class WordTargets(Protocol):
    """One of the two approximations, for a given vocabulary."""

    shared: ClassVar[bool]  # whether neighbouring words share the rows that were sampled for them

    def __call__(self, words: Tensor, generator: torch.Generator) -> Targets:
        """Return the decisions for words (N,)."""

    def most_frequent_row(self, shares: NDArray[np.float64]) -> float:
        """Return how many decisions on one word use the most frequent row, on average.

        `shares` (V,) are the words' shares of the text.
        """

    def decisions(self, shares: NDArray[np.float64]) -> float:
        """Return the average number of decisions on a word."""


class NegativeSampling:
    """A word is distinguished from K words that are sampled in proportion to count ** exponent (0.75 in word2vec.c).

    A sampled word that is the word itself is inactive, as in word2vec.c. Section 2.2.
    """

    shared: ClassVar[bool] = True

    def __init__(self, counts: NDArray[np.int64], negatives: int, exponent: float):
        shares = counts.astype(np.float64) ** exponent
        self.noise = shares / shares.sum()
        self.cumulative = torch.from_numpy(np.cumsum(self.noise))
        self.negatives = negatives

    def __call__(self, words: Tensor, generator: torch.Generator) -> Targets:
        """Sample the negatives of words (N,); R = K + 1, and row 0 is the word itself."""
        uniform = torch.rand(len(words), self.negatives, generator=generator, dtype=torch.float64)
        sampled = torch.searchsorted(self.cumulative, uniform, right=True)
        sampled.clamp_(max=len(self.cumulative) - 1)  # the last sum may be rounded to less than 1
        rows = torch.cat([words[:, None], sampled], dim=1)
        labels = torch.zeros(rows.shape)
        labels[:, 0] = 1
        active = rows != words[:, None]
        active[:, 0] = True
        return Targets(rows, labels, active)

    def most_frequent_row(self, shares: NDArray[np.float64]) -> float:
        """The share of a word, and its expected number among the K negatives, for the most frequent word."""
        return float((shares + self.negatives * self.noise).max())

    def decisions(self, shares: NDArray[np.float64]) -> float:
        """K + 1."""
        return self.negatives + 1.0


class HierarchicalSoftmax:
    """A word is the sequence of decisions on the path from the root of a Huffman tree to the word's leaf.

    Row n of the output table belongs to inner node n of the tree, and the label is 1 - the bit of the code, as in
    word2vec.c. Section 2.1.
    """

    shared: ClassVar[bool] = False

    def __init__(self, counts: NDArray[np.int64]):
        codes, nodes, lengths = huffman_codes(counts)
        self.rows = torch.from_numpy(nodes)
        self.labels = torch.from_numpy(1 - codes).float()
        self.active = torch.arange(self.rows.shape[1]) < torch.from_numpy(lengths)[:, None]

    def __call__(self, words: Tensor, generator: torch.Generator) -> Targets:
        """Return the paths of words (N,); R is the length of the longest of them."""
        active = self.active[words]
        longest = int(active.sum(1).max()) if len(words) else 0
        return Targets(self.rows[words, :longest], self.labels[words, :longest], active[:, :longest])

    def most_frequent_row(self, shares: NDArray[np.float64]) -> float:
        """1: every path begins at the root."""
        return 1.0

    def decisions(self, shares: NDArray[np.float64]) -> float:
        """The average length of a code."""
        return float(self.active.sum(1).double().numpy() @ shares)


def word_targets(options: WordLossOptions, counts: NDArray[np.int64]) -> WordTargets:
    """Make the approximation that `options` name, for words with these counts (V,), the most frequent first."""
    if options.output == "hierarchical_softmax":
        return HierarchicalSoftmax(counts)
    return NegativeSampling(counts, options.negatives, options.exponent)


def huffman_codes(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the codes of V words in a Huffman tree, as word2vec.c builds it.

    `counts` (V,), V >= 2, are in descending order. Returns the bits of each word's code from the root on (V, L), the
    inner nodes at which these bits decide (V, L), and the lengths of the codes (V,); L is the longest length, and
    entries beyond a word's length are 0. Inner nodes are numbered from 0 to V - 2, the root, in the order in which they
    are joined. Of the two nodes that are joined, the one with the smaller count gets bit 0.
    """
    parents, bits = _huffman_tree(counts)
    root, current = len(parents), np.arange(len(counts))
    path: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []  # (bits, parents), from the leaves upwards
    while (current < root).any():
        below = np.minimum(current, root - 1)
        inside = current < root
        path.append((np.where(inside, bits[below], 0), np.where(inside, parents[below], root)))
        current = path[-1][1]
    upward_nodes = np.stack([nodes for _, nodes in path], axis=1)  # (V, L)
    upward_bits = np.stack([bits for bits, _ in path], axis=1)
    lengths = 1 + np.count_nonzero(upward_nodes[:, :-1] < root, axis=1)
    steps = lengths[:, None] - 1 - np.arange(len(path))  # (V, L): from the root downwards
    inside = steps >= 0
    steps = np.maximum(steps, 0)
    codes = np.where(inside, np.take_along_axis(upward_bits, steps, 1), 0)
    nodes = np.where(inside, np.take_along_axis(upward_nodes, steps, 1) - len(counts), 0)
    return codes, nodes, lengths


def _huffman_tree(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the parent and the bit of each node except the root: (2 V - 2,); the leaves come first.

    The words are sorted by count and inner nodes are made in ascending order of theirs, so the smallest node is the
    next of either sequence. If counts are equal, the inner node is taken first, as in word2vec.c.
    """
    size = len(counts)
    weights = [*counts.tolist(), *[0] * (size - 1)]
    parents, bits = np.empty(2 * size - 2, np.int64), np.zeros(2 * size - 2, np.int64)
    leaf, inner = size - 1, size  # the smallest nodes that have no parent yet

    for node in range(size, 2 * size - 1):
        smallest = []
        for _ in range(2):
            if leaf >= 0 and (inner >= node or weights[leaf] < weights[inner]):
                smallest.append(leaf)
                leaf -= 1
            else:
                smallest.append(inner)
                inner += 1
        weights[node] = weights[smallest[0]] + weights[smallest[1]]
        parents[smallest] = node
        bits[smallest[1]] = 1
    return parents, bits
