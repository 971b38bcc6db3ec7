"""Whole words as tokens: how text is split into words, and the vocabulary of word2vec, sorted by count."""

import re
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.types import Positive
from seq2seq.tokenizers.text import Ragged

MAX_SENTENCE = 1000  # words; longer sentences are cut (MAX_SENTENCE_LENGTH of word2vec.c)
LETTERS = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")  # letters and digits, with apostrophes between them


@dataclass(frozen=True, kw_only=True)
class WordOptions:
    """How text is split into words, and which words the vocabulary holds."""

    split: Literal["spaces", "letters"]  # spaces: as word2vec.c does; letters: runs of letters and digits
    lowercase: bool
    min_count: Positive  # words that occur less often in train are left out

    def words(self, text: str) -> list[str]:
        """Split a text into words; punctuation belongs to words with `spaces`, and is left out with `letters`."""
        text = text.lower() if self.lowercase else text
        return text.split() if self.split == "spaces" else LETTERS.findall(text)


class Vocabulary:
    """V words with their numbers of occurrences in train, the most frequent first."""

    def __init__(self, words: Sequence[str], counts: NDArray[np.int64]):
        self.words, self.counts = list(words), np.asarray(counts, np.int64)

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def index(self) -> dict[str, int]:
        """The index of each word."""
        return {word: index for index, word in enumerate(self.words)}

    def encode(self, sentences: Iterable[Sequence[str]]) -> tuple[Ragged, int]:
        """Return the indices of each sentence's known words, int32, and the number of unknown words, left out."""
        flat, ends = _flatten(sentences, lambda words: map(self.index.get, words, repeat(-1)))
        return _without_unknown(flat, ends)


def count_words(sentences: Iterable[Sequence[str]], min_count: int) -> tuple[Vocabulary, Ragged, int]:
    """Make a vocabulary of the words that occur at least `min_count` times, and encode the sentences with it.

    Words of equal count are in the order of their first occurrence. Returns the vocabulary and the result of `encode`.
    The text is read once, so `sentences` may be a generator.
    """
    table: defaultdict[str, int] = defaultdict()
    table.default_factory = table.__len__  # a new word gets the next number
    flat, ends = _flatten(sentences, lambda words: map(table.__getitem__, words))
    counts = np.bincount(flat, minlength=len(table))
    order = np.argsort(-counts, kind="stable")
    order = order[: int(np.count_nonzero(counts >= min_count))]
    words = list(table)
    vocabulary = Vocabulary([words[i] for i in order.tolist()], counts[order])
    renumbered = np.full(len(table) + 1, -1, np.int32)  # one more, so that an empty text can be indexed
    renumbered[order] = np.arange(len(order))
    return vocabulary, *_without_unknown(renumbered[flat], ends)


def _flatten(
    sentences: Iterable[Sequence[str]], numbers: Callable[[Sequence[str]], Iterable[int]]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return the numbers of all words (N,), one sentence after the other, and the end of each sentence (S,)."""
    flat, ends = array("i"), array("q")
    for words in sentences:
        flat.extend(numbers(words))
        ends.append(len(flat))
    return np.frombuffer(flat, np.int32), np.frombuffer(ends, np.int64)


def _without_unknown(flat: NDArray[np.int32], ends: NDArray[np.int64]) -> tuple[Ragged, int]:
    """Drop words with the number -1 and sentences without words, and cut sentences after `MAX_SENTENCE` words.

    `ends` (S,) are the ends of the sentences in `flat` (N,).
    """
    known = flat >= 0
    before = np.concatenate([[0], np.cumsum(known)])  # number of known words before each position
    ends = before[ends]
    starts = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
    pieces, _ = Ragged(flat[known], starts, ends).divided(MAX_SENTENCE)
    return pieces, int(len(flat) - before[-1])
