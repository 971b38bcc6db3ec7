"""The base class of data sets of sentence pairs: filters training pairs, encodes each split once and pads batches."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.data import fingerprints
from common.errors import UserError
from common.task import Batch, Costs, Split
from common.types import SPLITS, Positive
from seq2seq.tokenizers import training
from seq2seq.tokenizers.bpe import BOS, EOS, PAD, TokenizerOptions, normalize
from seq2seq.tokenizers.protocol import TextTokenizer
from seq2seq.tokenizers.text import Lines, Ragged, read_tabbed


@dataclass(frozen=True)
class Corpus:
    """One split as raw text: line n of `target` translates line n of `source`."""

    source: Lines
    target: Lines
    origin: str  # the files or tables from which the split was read, for messages
    categories: Sequence[str] | None = None  # the category of each pair; None if the data have none
    notes: list[str] = field(default_factory=list)  # lines for the summary, such as which pairs loading left out

    def __len__(self) -> int:
        return len(self.source)

    def take(self, rows: NDArray[np.int64]) -> "Corpus":
        """The pairs with the indices `rows` (n,), in this order."""
        categories = None if self.categories is None else [self.categories[i] for i in rows.tolist()]
        return Corpus(self.source.take(rows), self.target.take(rows), self.origin, categories, self.notes)


EMPTY_CORPUS = Corpus(Lines.of([]), Lines.of([]), "")


@dataclass(frozen=True)
class EncodedCorpus:
    """One split, tokenized."""

    corpus: Corpus
    source: Ragged  # token ids before truncation; each sentence ends with EOS
    target: Ragged  # likewise
    costs: NDArray[np.int64]  # (n,) number of tokens of each pair's longer side, after truncation
    notes: list[str]  # lines for the summary


@dataclass(kw_only=True, eq=False)
class SentencePairs(ABC):
    """Pairs of sentences in two languages. A subclass defines how its splits are loaded.

    Tokenizers are trained on the split train only, unless `use` sets those of a checkpoint. The source and the target
    of a pair are its sides. In train, pairs with an empty side are left out, and pairs with a side of more than
    `longest` tokens are truncated or left out (`too_long`). In val and test, no pair is left out or truncated.

    A subclass is a dataclass whose fields are further config keys; it checks them in `__post_init__`.

    Args:
        source: the language to translate from: en, de, zh ...
        target: the language to translate to. It also decides how BLEU divides translations into tokens.
        tokenizer: options of the tokenizers.
        longest: maximum number of tokens, including EOS, of a side of a training pair.
        too_long: how a longer side is treated: "truncate" cuts it to `longest` tokens, "skip" leaves out its pair.
        batch_size: maximum size of the batch of one optimizer step, in padded tokens: the number of pairs times the
            number of tokens of the longest side.
        distilled: a file of tab-separated pairs that replaces the split train, after val and test were cut from it:
            translations by a teacher (`scripts/compress.py distil=sequence`); None = the data's own pairs. A file with
            sources of val or test that are not in train is refused.
    """

    batch_unit: ClassVar[str] = "tokens"

    source: str
    target: str
    tokenizer: TokenizerOptions
    longest: Positive
    too_long: Literal["truncate", "skip"]
    batch_size: Positive
    distilled: str | None = None  # with a default, because older yaml files and subclasses lack this key

    def __post_init__(self) -> None:
        """Raise UserError if `longest` exceeds `batch_size`."""
        if self.longest > self.batch_size:
            raise UserError(
                f"data.longest={self.longest} is more than data.batch_size={self.batch_size}, both in tokens; lower "
                "data.longest or raise data.batch_size."
            )
        self._corpora: dict[Split, Corpus] = {}
        self._encoded: dict[Split, EncodedCorpus] = {}
        self._tokenizers: tuple[TextTokenizer, TextTokenizer] | None = None

    @abstractmethod
    def load(self, split: Split) -> dict[Split, Corpus]:
        """Load `split`. Returns a dict with at least this split, and any others that were read with it.

        The corpus of a missing val or test split is empty (EMPTY_CORPUS). This method is called at most once per split.
        Raises UserError when a file is missing or broken.
        """

    def tokenizers(self) -> tuple[TextTokenizer, TextTokenizer]:
        """The tokenizers of source and target; a joint tokenizer is returned twice.

        Without tokenizers from `use`, the first call trains them on the split train.
        """
        if self._tokenizers is None:
            corpus, options = self._train_without_empty_sides(), self.tokenizer
            if options.joint:
                joint = training.train(chain(corpus.source, corpus.target), options)
                self._tokenizers = joint, joint
            else:
                sides = (self.source, corpus.source), (self.target, corpus.target)
                source, target = (training.train(lines, options, f" in {name}") for name, lines in sides)
                self._tokenizers = source, target
        return self._tokenizers

    def use(self, source: TextTokenizer, target: TextTokenizer) -> None:
        """Use a checkpoint's tokenizers instead of training them."""
        self._tokenizers = source, target
        self._encoded = {}

    def count(self, split: Split) -> int:
        """Number of pairs in `split`; 0 if there is no such val or test split."""
        return len(self._used(split))

    def cost(self, split: Split) -> Costs:
        """Number of tokens of each pair's longer side, including EOS and after truncation."""
        return self._encode(split).costs

    def pairs(self, split: Split) -> list[tuple[str, str]]:
        """The text of each pair, (source, target), before tokenization."""
        corpus = self._used(split)
        return list(zip(corpus.source, corpus.target, strict=True))

    def categories(self, split: Split) -> list[str] | None:
        """The category of each pair, or None if the data have no categories."""
        categories = self._used(split).categories
        return None if categories is None else list(categories)

    def sample(self, split: Split, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """One pair: id (its index), source and target (token ids that end with EOS), source_text and target_text.

        There is no augmentation, so `generator` is not used.
        """
        encoded = self._encode(split)
        return {
            "id": index,
            "source": self._truncate(split, encoded.source[index].tolist()),
            "target": self._truncate(split, encoded.target[index].tolist()),
            "source_text": encoded.corpus.source[index],
            "target_text": encoded.corpus.target[index],
        }

    def where(self, split: Split, index: int) -> str:
        """The number of a pair's line, and the file or files with this line, for messages."""
        corpus = self._used(split)
        return f"line {corpus.source.number(index)} of {corpus.origin}"

    def fingerprint(self, split: Split) -> dict[str, str]:
        """A digest of all sentences of each language, in the split's order.

        Sentences of train's pairs that are left out as empty or too long are included.
        """
        corpus = self._corpus(split)
        sides = {f"{self.source} sentences": corpus.source, f"{self.target} sentences": corpus.target}
        return {name: fingerprints.digest(f"{line}\n".encode() for line in lines) for name, lines in sides.items()}

    def view(self, line: str, target: str | None = None, id: int = 0) -> dict[str, Any]:
        """Make a sample (see `sample`) of a user's sentence of any length and, optionally, its translation.

        Without a translation, the sample has no `target` and no `target_text`.
        """
        source_tokenizer, target_tokenizer = self.tokenizers()
        sample = {
            "id": id,
            "source": [*source_tokenizer.encode(line), source_tokenizer.special.end],
            "source_text": line,
        }
        if target is not None:
            sample |= {"target": [*target_tokenizer.encode(target), EOS], "target_text": target}
        return sample

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """Make a batch. Token ids are padded with 0 on the right to the longest source (S) and target (T).

        The batch has ids, source int64 (B, S), source_lengths (B,) and source_texts. If the samples have targets, it
        also has target_in and target_out, int64 (B, T), target_lengths (B,) and target_texts. A row of target_out is a
        target that ends with EOS. A row of target_in is the same target with BOS before it and without EOS.
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
        """Lines for the start summary: languages, vocabulary, pairs of each split, and what was left out or changed."""
        counts = [f"{tokenizer.size:,}" for tokenizer in self.tokenizers()]
        options = self.tokenizers()[0].options
        entries = f"{counts[0]} entries for both" if options.joint else f"{' + '.join(counts)} entries"
        method = f"{options.kind} from {options.pieces}" if options.kind != "characters" else options.kind
        lines = [f"{self.source} -> {self.target}; {method}, {entries}"]
        return [*lines, *(line for split in SPLITS for line in self.split_summary(split))]

    def split_summary(self, split: Split) -> list[str]:
        """The lines of `summary` on one split; empty if there is no such split."""
        encoded = self._encode(split)
        if not len(encoded.corpus):
            return []
        tokens = f"{encoded.source.lengths.sum():,} + {encoded.target.lengths.sum():,} tokens"
        pairs = f"{len(encoded.corpus):,} pairs, {tokens}, of {encoded.corpus.origin}"
        return [f"{split}: {line}" for line in (pairs, *encoded.notes)]

    def _corpus(self, split: Split) -> Corpus:
        if split == "train" and self.distilled is not None:
            return self._distilled_train
        if split not in self._corpora:
            self._corpora |= self.load(split)
        return self._corpora[split]

    @cached_property
    def _distilled_train(self) -> Corpus:
        assert self.distilled is not None
        source, target, notes = read_tabbed(Path(self.distilled).expanduser())
        self._refuse_held_out(source)
        return Corpus(source, target, self.distilled, notes=[*notes, "translations of a teacher (data.distilled)"])

    def _refuse_held_out(self, source: Lines) -> None:
        """Raise UserError if a line is a source of val or test, and not also one of the train split that is replaced.

        Tabs are compared as spaces, as in a file of tab-separated pairs. Blank lines do not count.
        """
        corpora = self._corpus("val"), self._corpus("test")
        held_out = {line.replace("\t", " ") for corpus in corpora for line in corpus.source}
        leaked = {line for line in source if line in held_out and line.strip()}
        if leaked:
            leaked.difference_update(line.replace("\t", " ") for line in self._replaced_train().source)
        if leaked:
            raise UserError(
                f"data.distilled={self.distilled} holds sources of val or test that are not in train ({len(leaked):,}, "
                f"such as {min(leaked)!r}); translate train again by scripts/compress.py, with this run's data."
            )

    def _replaced_train(self) -> Corpus:
        """The data's own train, which `distilled` replaces; it is not kept. It is empty if it cannot be read."""
        if "train" in self._corpora:
            return self._corpora.pop("train")
        try:
            return self.load("train")["train"]
        except UserError:  # a run on translations needs no other train, and many users keep none
            return EMPTY_CORPUS

    def _used(self, split: Split) -> Corpus:
        """The pairs of a split that are used. To find train's pairs that are too long, train is encoded."""
        return self._encode(split).corpus if split == "train" else self._corpus(split)

    def _train_without_empty_sides(self) -> Corpus:
        corpus = self._corpus("train")
        pairs = corpus.take(np.flatnonzero(_have_text(corpus.source) & _have_text(corpus.target)))
        if not len(pairs):
            raise UserError(
                f"No training pair is left of {corpus.origin}: each of {len(corpus):,} has an empty side; give text "
                "in both languages."
            )
        return pairs

    def _encode(self, split: Split) -> EncodedCorpus:
        if split not in self._encoded:
            self._encoded[split] = self._encode_train() if split == "train" else self._encode_evaluation(split)
        return self._encoded[split]

    def _encode_evaluation(self, split: Split) -> EncodedCorpus:
        """Encode all pairs of val or test."""
        corpus = self._corpus(split)
        (source, target), notes = self._encode_sides(corpus)
        for name, side in ((self.source, corpus.source), (self.target, corpus.target)):
            empty = int((~_have_text(side)).sum())
            notes += [f"{empty:,} empty {name} {'line' if empty == 1 else 'lines'}, kept"] * bool(empty)
        return EncodedCorpus(corpus, source, target, np.maximum(source.lengths, target.lengths), notes)

    def _encode_train(self) -> EncodedCorpus:
        """Encode the pairs of train that are used.

        Pairs with an empty side and, with too_long=skip, pairs with a side of more than `longest` tokens are left out.
        Ids are not truncated here but in `sample`; costs count the tokens after truncation.
        """
        corpus = self._train_without_empty_sides()
        (source, target), notes = self._encode_sides(corpus)
        empty = len(self._corpus("train")) - len(corpus)
        if empty:
            notes.insert(len(corpus.notes), f"{_pairs(empty)} with an empty side left out")
        lengths = np.maximum(source.lengths, target.lengths)  # (n,)
        too_long = int((lengths > self.longest).sum())
        limit = f"longer than {self.longest} tokens (data.longest)"
        if too_long and self.too_long == "truncate":
            sides = int((source.lengths > self.longest).sum() + (target.lengths > self.longest).sum())
            notes.append(f"{sides:,} {'side' if sides == 1 else 'sides'} {limit} truncated, in {_pairs(too_long)}")
        elif too_long:
            rows = np.flatnonzero(lengths <= self.longest)
            if not len(rows):
                raise UserError(
                    f"No training pair is left of {corpus.origin}: each is {limit}; raise "
                    "data.longest, or give data.too_long=truncate."
                )
            notes.append(f"{_pairs(too_long)} {limit} left out")
            corpus, source, target, lengths = corpus.take(rows), source.take(rows), target.take(rows), lengths[rows]
        return EncodedCorpus(corpus, source, target, np.minimum(lengths, self.longest), notes)

    def _encode_sides(self, corpus: Corpus) -> tuple[list[Ragged], list[str]]:
        """Encode both sides of all pairs; returns the ids of each side, and notes.

        The notes are those of `corpus` and, for each side whose tokenizer normalises or lowercases text, the number of
        sentences that this changes.
        """
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

    def _truncate(self, split: Split, ids: list[int]) -> list[int]:
        """Truncate ids of train to `longest`, including EOS at the end; ids of other splits are unchanged."""
        return ids if split != "train" or len(ids) <= self.longest else [*ids[: self.longest - 1], ids[-1]]


def _padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Pad rows of ids on the right; returns ids (B, N) and the lengths of the rows (B,), int64."""
    lengths = [len(row) for row in rows]
    padded = np.full((len(rows), max(lengths)), PAD, np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return torch.from_numpy(padded), torch.tensor(lengths)


def _have_text(lines: Iterable[str]) -> NDArray[np.bool_]:
    """Whether each line contains more than white space: (n,)."""
    return np.fromiter((bool(line.strip()) for line in lines), np.bool_)


def _pairs(count: int) -> str:
    return f"{count:,} {'pair' if count == 1 else 'pairs'}"
