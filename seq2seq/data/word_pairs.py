"""Words and the windows around them, for word2vec (Mikolov et al. 2013, arXiv 1301.3781 and 1310.4546).

A sample is a passage: consecutive sentences of about `passage` words. Frequent words are left out at random before
windows are cut, so windows reach beyond the words that were left out. All words of a passage are processed at once in
arrays, since one Python call for each pair, or even for each sentence, would take longer than the training.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.data.costs import equal_costs
from common.data.fingerprints import digest
from common.errors import UserError
from common.machine.seeds import generator as seeded
from common.task import Batch, Split
from common.types import SPLITS, NonNegativeFloat, Positive
from seq2seq.data import docstrings
from seq2seq.data.text_lines import TextLines, text_files
from seq2seq.tokenizers.text import Ragged
from seq2seq.tokenizers.words import Vocabulary, WordOptions, count_words

CHUNK = 1 << 20  # bytes of text that are split into words at a time
PARAGRAPH = re.compile(r"\n\s*\n")
HELD_OUT_EVERY = 20  # passages: the number of which one is cut from train as val, and one as test


class Windows(NamedTuple):
    """The N words of a passage that were kept, and how many words before and after each belong to its window."""

    words: Tensor  # int64 (N,)
    left: Tensor  # int64 (N,)
    right: Tensor  # int64 (N,)


class _Passages(NamedTuple):
    """The sentences of a split: passage i consists of the sentences from bounds[i] to bounds[i + 1] - 1."""

    sentences: Ragged
    bounds: NDArray[np.int64]
    numbers: NDArray[np.int64]  # the passages of the split, as indices into `bounds`
    unknown: int  # number of words of the text that are not in the vocabulary
    origin: str


class WordPairs:
    """The words of text files with the windows around them; without files, Python's own documentation.

    A line of a file is a sentence, as is a paragraph of the documentation. If there is no file of val or test, one in
    `HELD_OUT_EVERY` passages of train is cut for it, provided that train has as many; the vocabulary counts these, too.
    """

    def __init__(
        self,
        *,
        train: str | None,
        val: str | None,
        test: str | None,
        words: WordOptions,
        window: Positive,
        subsample: NonNegativeFloat,
        passage: Positive,
        batch_size: Positive,
    ):
        """Make the data set; no file is opened before it is needed.

        Args:
            train: a text file, or a pattern such as texts/*.txt; None = documentation strings, for all splits.
            val: the same for val; None = a part of train.
            test: the same for test.
            words: how text is split into words.
            window: maximum number of context words on each side.
            subsample: the t of `keep_probabilities`; 0 keeps all words.
            passage: number of words of a sample.
            batch_size: number of passages of an optimizer step.
        """
        self.files: dict[Split, str | None] = {"train": train, "val": val, "test": test}
        self.options, self.window, self.subsample = words, window, subsample
        self.passage, self.batch_size = passage, batch_size
        self._vocabulary: Vocabulary | None = None
        self._splits: dict[str, _Passages] = {}
        if train is None and (given := next((split for split in SPLITS[1:] if self.files[split]), None)):
            raise UserError(
                f"data.{given}={self.files[given]}, but data.train=null, which stands for Python's documentation; give "
                "data.train=FILE as well."
            )

    @property
    def vocabulary(self) -> Vocabulary:
        """The words of train or, after `use`, those of a checkpoint."""
        if self._vocabulary is None:
            self._read("train")
        assert self._vocabulary is not None
        return self._vocabulary

    def use(self, vocabulary: Vocabulary) -> None:
        """Use a checkpoint's vocabulary instead of counting the words of train."""
        self._vocabulary = vocabulary
        self._splits.clear()
        self.__dict__.pop("_keep", None)  # a cached property

    def count(self, split: Split) -> int:
        """The number of passages in `split`."""
        return len(self._passages(split).numbers)

    def cost(self, split: Split) -> NDArray[np.int64]:
        """1 for each passage."""
        return equal_costs(1, self.count(split))

    def sample(self, split: Split, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """Sample which words of a passage are kept, and the sizes of their windows; see `windows`.

        Without a `generator`, as in evaluation, the result depends only on `split` and `index`.
        """
        generator = generator or seeded("windows", split, index)
        drawn = windows(self.indices(split, index), self._keep, self.window, generator)
        return {"id": index, **drawn._asdict()}

    def indices(self, split: Split, index: int) -> Ragged:
        """The words of each sentence of a passage, as indices into the vocabulary."""
        passages = self._passages(split)
        number = int(passages.numbers[index])
        return passages.sentences.take(np.arange(passages.bounds[number], passages.bounds[number + 1]))

    @cached_property
    def _keep(self) -> NDArray[np.float64]:
        return keep_probabilities(self.vocabulary.counts, self.subsample)

    @property
    def shares(self) -> NDArray[np.float64]:
        """The expected share of each word among the words that are kept: (V,)."""
        kept = self._keep * self.vocabulary.counts
        return np.asarray(kept / kept.sum())

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """Concatenate passages: `words`, `left` and `right` (N,), and `lengths`, the words of each passage (B,)."""
        lengths = torch.tensor([len(sample["words"]) for sample in samples])
        joined = {name: torch.cat([sample[name] for sample in samples]) for name in Windows._fields}
        return {"ids": [sample["id"] for sample in samples], "lengths": lengths, **joined}

    def summary(self) -> list[str]:
        """Lines on all splits, and on the vocabulary."""
        lines = [line for split in SPLITS for line in self.split_summary(split)]
        count, total = len(self.vocabulary), int(self.vocabulary.counts.sum())
        kept = float(self._keep @ self.vocabulary.counts) / total
        return [
            *lines,
            f"{count:,} words occur at least {self.options.min_count} times in train, {total:,} times in all, of which "
            f"{100 * kept:.0f}% are kept (data.subsample={self.subsample:g})",
        ]

    def split_summary(self, split: Split) -> list[str]:
        """A line with the numbers of words, sentences and passages of a split; none for a split without passages."""
        passages = self._passages(split)
        if not len(passages.numbers):
            return []
        spans = zip(passages.bounds[passages.numbers], passages.bounds[passages.numbers + 1], strict=True)
        rows = np.concatenate([np.arange(*span) for span in spans])
        words = int(passages.sentences.lengths[rows].sum())
        unknown = f"; {passages.unknown:,} unknown words are left out" if passages.unknown else ""
        return [
            f"{split}: {words:,} words in {len(rows):,} sentences, {len(passages.numbers):,} samples, from "
            f"{passages.origin}{unknown}"
        ]

    def fingerprint(self, split: Split) -> dict[str, str]:
        """Digests of the words of a split, and of where sentences and passages end."""
        passages = self._passages(split)
        sentences = passages.sentences
        return {"words": digest([sentences.flat, sentences.starts, sentences.ends, passages.bounds, passages.numbers])}

    def where(self, split: Split, index: int) -> str:
        """The name of a passage for messages."""
        return f"passage {index} of {self._passages(split).origin}"

    def _passages(self, split: Split) -> _Passages:
        if split not in self._splits:
            self._read(split)
        return self._splits[split]

    def _read(self, split: Split) -> None:
        """Read the text of `split` and, if splits are cut from train, of the others; count words if needed."""
        is_own = self.files["train"] is None or self.files[split] is not None
        if not is_own:
            split = "train"
        if self._vocabulary is not None:
            sentences, unknown = self._vocabulary.encode(self._sentences(split))
        elif split == "train":
            self._vocabulary, sentences, unknown = self._counted()
        else:
            self._read("train")
            self._read(split)
            return
        if not sentences.lengths.sum():
            raise UserError(
                f"none of the {unknown:,} words of {self._origin(split)} is in the vocabulary; give a text with words "
                "of train, or train with a lower data.words.min_count."
            )
        bounds = passage_bounds(sentences.lengths, self.passage)
        numbers = np.arange(len(bounds) - 1)
        shares: dict[Split, NDArray[np.int64]] = {split: numbers}
        if split == "train" and self.files["train"] is not None:
            shares = held_out(numbers, [name for name in SPLITS[1:] if self.files[name] is None])
        for name, part in shares.items():
            self._splits[name] = _Passages(sentences, bounds, part, unknown, self._origin(split))

    def _counted(self) -> tuple[Vocabulary, Ragged, int]:
        vocabulary, sentences, unknown = count_words(self._sentences("train"), self.options.min_count)
        if len(vocabulary) < 2:
            raise UserError(
                f"{self._origin('train')} has {len(vocabulary)} words that occur at least {self.options.min_count} "
                "times, and word vectors need two; give more text, or lower data.words.min_count."
            )
        return vocabulary, sentences, unknown

    def _sentences(self, split: Split) -> Iterator[list[str]]:
        """Yield the words of each sentence of a split."""
        if self.files["train"] is None:
            for text in docstrings.docstrings(split):
                yield from map(self.options.words, PARAGRAPH.split(text))
            return
        name = self.files[split]
        assert name is not None
        for chunk in TextLines(text_files(f"data.{split}", name)).chunks(CHUNK):
            yield from map(self.options.words, chunk.split("\n"))

    def _origin(self, split: Split) -> str:
        return docstrings.origin() if self.files["train"] is None else str(self.files[split])


def keep_probabilities(counts: NDArray[np.int64], subsample: float) -> NDArray[np.float64]:
    """The probability with which each word is kept: (V,).

    It is (sqrt(f / t) + 1) * t / f, at most 1, for a word with the share f of all words and the threshold t =
    `subsample`, as in word2vec.c; Mikolov et al. 2013 (arXiv 1310.4546), equation 5, has sqrt(t / f). With a threshold
    of 0, or without counts (all 0), all words are kept.
    """
    if not subsample or not counts.any():
        return np.ones(len(counts))
    ratio: NDArray[np.float64] = subsample * counts.sum() / counts  # t / f
    return np.minimum(1.0, np.sqrt(ratio) + ratio)


def windows(sentences: Ragged, keep: NDArray[np.float64], window: int, generator: torch.Generator) -> Windows:
    """Leave out frequent words at random, then cut a window around each word that is kept.

    A word reaches a number of words to each side that is uniform from 1 to `window`, but not beyond its sentence.
    `keep` (V,) are the words' probabilities of being kept.
    """
    lengths = sentences.lengths
    sentence = np.repeat(np.arange(len(sentences)), lengths)  # number of each word's sentence
    before = np.cumsum(lengths) - lengths  # number of words before each sentence
    words = sentences.flat[np.arange(len(sentence)) + (sentences.starts - before)[sentence]]
    kept = torch.rand(len(words), generator=generator, dtype=torch.float64).numpy() < keep[words]
    words, sentence = words[kept], sentence[kept]
    reach = torch.randint(1, window + 1, (len(words),), generator=generator).numpy()
    counts = np.bincount(sentence, minlength=len(sentences))
    ends = np.cumsum(counts)
    position = np.arange(len(words))
    left = np.minimum(reach, position - (ends - counts)[sentence])
    right = np.minimum(reach, ends[sentence] - 1 - position)
    return Windows(*(torch.from_numpy(part.astype(np.int64)) for part in (words, left, right)))


def passage_bounds(lengths: NDArray[np.int64], passage: int) -> NDArray[np.int64]:
    """The first sentence of each passage, and the number of sentences: int64 (P + 1,).

    `lengths` (S,) are the numbers of words of the sentences. Passage p holds the sentences whose first word is one of
    the words from p * `passage` to (p + 1) * `passage` - 1 of the text; passages without sentences are left out.
    """
    starts = np.cumsum(lengths) - lengths
    firsts = np.flatnonzero(np.diff(starts // passage, prepend=-1))
    return np.append(firsts, len(lengths))


def held_out(numbers: NDArray[np.int64], others: Sequence[Split]) -> dict[Split, NDArray[np.int64]]:
    """Cut the splits `others` from the passages with these `numbers`: one in `HELD_OUT_EVERY` passages for each."""
    remainder = numbers % HELD_OUT_EVERY
    parts: dict[Split, NDArray[np.int64]] = {
        split: numbers[remainder == HELD_OUT_EVERY // 2 + i] for i, split in enumerate(others)
    }
    taken = [number for part in parts.values() for number in part.tolist()]
    return {"train": np.setdiff1d(numbers, taken), **parts}
