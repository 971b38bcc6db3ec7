"""Sentence pairs as the trainer sees them, wherever they come from: cleaned for training, encoded once, padded."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import UserError
from common.task import Batch, Split
from common.types import SPLITS, Positive
from seq2seq.tokenizers.bpe import BOS, EOS, PAD, Tokenizer, TokenizerOptions, normalize
from seq2seq.tokenizers.protocol import TextTokenizer
from seq2seq.tokenizers.text import Lines, Ragged


@dataclass(frozen=True)
class Corpus:
    """One split as raw text: line n of `source` is line n of `target` in the other language."""

    source: Lines
    target: Lines
    origin: str  # where it comes from, for the summary
    categories: Sequence[str] | None = None  # one of each pair, where the set has any
    notes: list[str] = field(default_factory=list)  # what was left out before, and why

    def __len__(self) -> int:
        return len(self.source)

    def take(self, rows: NDArray[np.int64]) -> "Corpus":
        """These pairs in this order."""
        categories = None if self.categories is None else [self.categories[i] for i in rows.tolist()]
        return Corpus(self.source.take(rows), self.target.take(rows), self.origin, categories, self.notes)


EMPTY_CORPUS = Corpus(Lines.of([]), Lines.of([]), "")


@dataclass(frozen=True)
class EncodedCorpus:
    """One split ready for use."""

    corpus: Corpus
    source: Ragged  # ids, each sentence with EOS at its end
    target: Ragged
    costs: list[int]  # tokens of the longer side as it is used
    notes: list[str]


@dataclass(kw_only=True, eq=False)
class SentencePairs(ABC):
    """Pairs of sentences in two languages. A set of this kind says how to load its splits.

    Vocabularies are learnt from train alone, or come out of a checkpoint by `use`. Pairs with an empty side, and where
    `too_long` says so those with more than `longest` tokens, are left out of train; nothing is ever left out of val and
    test, nor cut short there.

    A subclass adds keys as fields of a dataclass, and checks them in `__post_init__`.

    Args:
        source: the language to translate from (en, de, zh ...), for messages and scores.
        target: the language to translate to.
        tokenizer: how text becomes tokens.
        longest: tokens, end of sentence included, that a side of a training pair may have.
        too_long: what becomes of a longer one: "truncate" that side, or "skip" the pair.
        batch_size: padded tokens of one optimizer step: sentences times the longest of all source and target sides.
    """

    source: str
    target: str
    tokenizer: TokenizerOptions
    longest: Positive
    too_long: Literal["truncate", "skip"]
    batch_size: Positive

    def __post_init__(self) -> None:
        """Refuse a limit that no batch could hold."""
        if self.longest > self.batch_size:
            raise UserError(
                f"data.longest={self.longest} and data.batch_size={self.batch_size}, both in tokens: expected a batch "
                "to hold at least the longest sentence; give less of the one or more of the other."
            )
        self._corpora: dict[Split, Corpus] = {}
        self._prepared: dict[Split, EncodedCorpus] = {}
        self._tokenizers: tuple[TextTokenizer, TextTokenizer] | None = None

    @abstractmethod
    def load(self, split: Split) -> dict[Split, Corpus]:
        """This split, and others that come along; EMPTY_CORPUS for a val or test that there is not.

        Called once for each split. Raises UserError when the files are not there or broken.
        """

    def tokenizers(self) -> tuple[TextTokenizer, TextTokenizer]:
        """Those of source and target, learnt from train at the first call; one and the same when joint."""
        if self._tokenizers is None:
            corpus, options = self._complete(), self.tokenizer
            if options.joint:
                joint = Tokenizer.train(chain(corpus.source, corpus.target), options)
                self._tokenizers = joint, joint
            else:
                sides = (self.source, corpus.source), (self.target, corpus.target)
                source, target = (Tokenizer.train(lines, options, f" in {name}") for name, lines in sides)
                self._tokenizers = source, target
        return self._tokenizers

    def use(self, source: TextTokenizer, target: TextTokenizer) -> None:
        """Take a checkpoint's tokenizers in place of own ones, which then are never learnt."""
        self._tokenizers = source, target
        self._prepared = {}

    def count(self, split: Split) -> int:
        """Number of pairs in `split`; 0 when there is no such val or test."""
        return len(self._used(split))

    def cost(self, split: Split) -> Sequence[int]:
        """Tokens of each pair's longer side, end of sentence included."""
        return self._ready(split).costs

    def pairs(self, split: Split) -> list[tuple[str, str]]:
        """Source and target of each pair as they were written."""
        corpus = self._used(split)
        return list(zip(corpus.source, corpus.target, strict=True))

    def categories(self, split: Split) -> list[str] | None:
        """What kind of text each pair is, for sets that know it."""
        found = self._used(split).categories
        return None if found is None else list(found)

    def sample(self, split: Split, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """One pair: id (its index), source and target (ids with EOS at the end), source_text and target_text."""
        ready = self._ready(split)
        return {
            "id": index,
            "source": self._within(split, ready.source[index].tolist()),
            "target": self._within(split, ready.target[index].tolist()),
            "source_text": ready.corpus.source[index],
            "target_text": ready.corpus.target[index],
        }

    def where(self, split: Split, index: int) -> str:
        """The line of a pair in its files, for messages."""
        corpus = self._used(split)
        return f"line {corpus.source.number(index)} of {corpus.origin}"

    def view(self, line: str, target: str | None = None, id: int = 0) -> dict[str, Any]:
        """A user's sentence, and perhaps its given translation, as a sample, of any length."""
        source, other = self.tokenizers()
        sample = {"id": id, "source": [*source.encode(line), EOS], "source_text": line}
        if target is not None:
            sample |= {"target": [*other.encode(target), EOS], "target_text": target}
        return sample

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """Samples to a batch, padded with 0 on the right to the longest source (S) and target (T).

        Returns ids, source int64 (B, S), source_lengths (B,) and source_texts; and where the samples have targets
        target_in (B, T) from BOS on, target_out (B, T) up to EOS, target_lengths (B,) and target_texts.
        """
        source, lengths = _padded([sample["source"] for sample in samples])
        batch: Batch = {
            "ids": [sample["id"] for sample in samples],
            "source": source,
            "source_lengths": lengths,
            "source_texts": [sample["source_text"] for sample in samples],
        }
        if "target" in samples[0]:
            targets = [sample["target"] for sample in samples]
            target_out, target_lengths = _padded(targets)
            target_in, _ = _padded([[BOS, *ids[:-1]] for ids in targets])
            texts = [sample["target_text"] for sample in samples]
            batch |= {"target_in": target_in, "target_out": target_out}
            batch |= {"target_lengths": target_lengths, "target_texts": texts}
        return batch

    def summary(self) -> list[str]:
        """Languages and vocabulary, then each split's size and what was left out or changed in it."""
        sizes = [f"{tokenizer.size:,}" for tokenizer in self.tokenizers()]
        options = self.tokenizers()[0].options
        entries = f"{sizes[0]} entries for both" if options.joint else f"{' + '.join(sizes)} entries"
        lines = [f"{self.source} -> {self.target}; {options.kind} from {options.pieces}, {entries}"]
        for split in SPLITS:
            ready = self._ready(split)
            if not len(ready.corpus):
                continue
            tokens = f"{ready.source.lengths.sum():,} + {ready.target.lengths.sum():,} tokens"
            lines.append(f"{split}: {len(ready.corpus):,} pairs, {tokens}, of {ready.corpus.origin}")
            lines += [f"{split}: {note}" for note in ready.notes]
        return lines

    def _corpus(self, split: Split) -> Corpus:
        if split not in self._corpora:
            self._corpora |= self.load(split)
        return self._corpora[split]

    def _used(self, split: Split) -> Corpus:
        """The pairs of a split in order of index. Only in train does that depend on tokens."""
        return self._ready(split).corpus if split == "train" else self._corpus(split)

    def _complete(self) -> Corpus:
        """Train without the pairs that have an empty side."""
        corpus = self._corpus("train")
        complete = corpus.take(np.flatnonzero(_written(corpus.source) & _written(corpus.target)))
        if not len(complete):
            raise UserError(
                f"No training pair is left of {corpus.origin}: each of {len(corpus):,} has an empty side; give text "
                "in both languages."
            )
        return complete

    def _ready(self, split: Split) -> EncodedCorpus:
        if split not in self._prepared:
            self._prepared[split] = self._clean(self._complete()) if split == "train" else self._as_it_is(split)
        return self._prepared[split]

    def _as_it_is(self, split: Split) -> EncodedCorpus:
        """All of val or test."""
        corpus = self._corpus(split)
        (source, target), notes = self._encoded(corpus)
        for name, side in ((self.source, corpus.source), (self.target, corpus.target)):
            empty = int((~_written(side)).sum())
            notes += [f"{empty:,} empty {name} {'line' if empty == 1 else 'lines'}, kept as they are"] * bool(empty)
        return EncodedCorpus(corpus, source, target, np.maximum(source.lengths, target.lengths).tolist(), notes)

    def _clean(self, corpus: Corpus) -> EncodedCorpus:
        """Train without pairs that are too long, or with long sides marked as cut by their cost."""
        (source, target), notes = self._encoded(corpus)
        empty = len(self._corpus("train")) - len(corpus)
        if empty:
            notes.insert(len(corpus.notes), f"{_pairs(empty)} with an empty side left out")
        lengths = np.maximum(source.lengths, target.lengths)  # (n,)
        over = int((lengths > self.longest).sum())
        limit = f"longer than {self.longest} tokens (data.longest)"
        if over and self.too_long == "truncate":
            sides = int((source.lengths > self.longest).sum() + (target.lengths > self.longest).sum())
            notes.append(f"{sides:,} {'side' if sides == 1 else 'sides'} {limit} truncated, in {_pairs(over)}")
        elif over:
            rows = np.flatnonzero(lengths <= self.longest)
            if not len(rows):
                raise UserError(
                    f"No training pair is left of {corpus.origin}: each is {limit}; give more, or "
                    "data.too_long=truncate."
                )
            notes.append(f"{_pairs(over)} {limit} left out")
            corpus, source, target, lengths = corpus.take(rows), source.take(rows), target.take(rows), lengths[rows]
        return EncodedCorpus(corpus, source, target, np.minimum(lengths, self.longest).tolist(), notes)

    def _encoded(self, corpus: Corpus) -> tuple[list[Ragged], list[str]]:
        """Both sides' ids, and the corpus's notes with one more where the tokenizer reads another text than written."""
        notes, rows = list(corpus.notes), []
        sides = (self.source, corpus.source), (self.target, corpus.target)
        for tokenizer, (name, lines) in zip(self.tokenizers(), sides, strict=True):
            rows.append(tokenizer.encode_all(lines))
            options = tokenizer.options
            if options.normalization == "none" and not options.lowercase:
                continue
            changed = sum(normalize(line, options) != line for line in lines)
            notes.append(
                f"normalization={options.normalization} lowercase={str(options.lowercase).lower()} changes "
                f"{changed:,} {name} {'sentence' if changed == 1 else 'sentences'} before encoding"
            )
        return rows, notes

    def _within(self, split: Split, ids: list[int]) -> list[int]:
        """A training sentence cut to `longest` tokens, the last of which still is EOS."""
        return ids if split != "train" or len(ids) <= self.longest else [*ids[: self.longest - 1], EOS]


def _padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids (B, N) padded on the right, and their lengths (B,)."""
    lengths = [len(row) for row in rows]
    padded = np.full((len(rows), max(lengths)), PAD, np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return torch.from_numpy(padded), torch.tensor(lengths)


def _written(lines: Iterable[str]) -> NDArray[np.bool_]:
    """Which lines hold more than white space: (n,)."""
    return np.fromiter((bool(line.strip()) for line in lines), np.bool_)


def _pairs(count: int) -> str:
    return f"{count:,} {'pair' if count == 1 else 'pairs'}"
