"""Sentences for masked language modelling: the lines of a text file, or the standard library's documentation."""

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from common.data import fingerprints
from common.errors import UserError
from common.task import Split
from common.types import SPLITS, Share
from seq2seq.data import docstrings
from seq2seq.data.held_out import cut
from seq2seq.data.single_texts import SingleTexts
from seq2seq.data.text_lines import TextLines, text_files
from seq2seq.tokenizers.text import Ragged

BLANK_LINE = re.compile(r"\n\s*\n")
LETTER = re.compile(r"[^\W\d_]")


class Texts(NamedTuple):
    """The texts of one split: the lines with the indices `rows`, each of which has more than white space."""

    lines: Sequence[str]
    rows: NDArray[np.int64]
    origin: str  # the file, or the name of the default text, for messages
    notes: list[str]

    def all(self) -> Iterator[str]:
        """The texts, in order."""
        return (self.lines[row] for row in self.rows.tolist())


class Encoded(NamedTuple):
    """The samples of one split, without the special entries at their ends."""

    tokens: Ragged
    first_texts: NDArray[np.int64]  # the index of each sample's text, or of its first text, (n,)
    notes: list[str]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The number of tokens of each sample, with the special entries, (n,)."""
        return self.tokens.lengths + 2


@dataclass(kw_only=True, eq=False)
class Sentences(SingleTexts):
    """Sentences, each a line of a file, or packed to samples of up to `longest` tokens.

    A line of more than `longest` tokens, the special entries included, is divided into several samples, so every token
    of a split is in exactly one sample. A file for val or test that is not given is cut from train by a hash of the
    lines. Without a file for train, the texts are the paragraphs of the documentation strings of Python's standard
    library (see docstrings.py), which has all three splits.

    Args, in addition to those of SingleTexts:
        train: text file to learn from, with a sentence in each line, or a pattern such as 'texts/*.txt'; None = the
            standard library's documentation.
        val: text file or pattern of the split that selects the checkpoint; None = cut from train.
        test: text file or pattern of the split with the reported numbers; None = cut from train.
        val_share: the fraction of train's different lines to cut as val; None = 0.1, but at most 1,000 lines.
        test_share: like `val_share`, for test.
        packed: whether consecutive lines are packed into samples of up to `longest` tokens, with an end entry between
            them, as in RoBERTa (Liu et al. 2019, arXiv 1907.11692, section 4.2, "full-sentences"). A line is then
            divided only if it is longer than a sample.
    """

    train: str | None
    val: str | None
    test: str | None
    val_share: Share | None
    test_share: Share | None
    packed: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        self._texts: dict[Split, Texts] = {}
        self._encoded: dict[Split, Encoded] = {}

    def training_texts(self) -> Iterable[str]:
        """The texts of train."""
        return self._load("train").all()

    def forget_tokens(self) -> None:
        """Forget all token ids, because the tokenizer has changed."""
        self._encoded = {}

    def count(self, split: Split) -> int:
        """Number of samples in `split`; 0 if there is no such val or test split."""
        return len(self._encode(split).tokens)

    def cost(self, split: Split) -> NDArray[np.int64]:
        """Number of tokens of each sample."""
        return self._encode(split).lengths

    def sample(self, split: Split, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """One sample: id (its index) and tokens (n,) int64; there is no augmentation."""
        return {"id": index, "tokens": self.framed(self._encode(split).tokens[index])}

    def token_counts(self) -> NDArray[np.int64]:
        """How often each entry of the vocabulary occurs in train, (V,); 0 for special entries except `unknown`."""
        encoded = self._encode("train")
        special = self.text_tokenizer().special_entries
        counts = np.bincount(encoded.tokens.flat, minlength=self.text_tokenizer().size)
        counts[list(special.ids - {special.unknown})] = 0
        return counts

    def where(self, split: Split, index: int) -> str:
        """The line of a sample and its file, for messages."""
        texts = self._load(split)
        row = int(texts.rows[self._encode(split).first_texts[index]])
        return (
            texts.lines.where(row) if isinstance(texts.lines, TextLines) else f"paragraph {row + 1} of {texts.origin}"
        )

    def fingerprint(self, split: Split) -> dict[str, str]:
        """A digest of all texts of a split, in order."""
        digest = fingerprints.digest(f"{text}\n".encode() for text in self._load(split).all())
        is_documentation = self.train is None and self._path(split) is None
        return {"sentences": digest} | ({"Python version": docstrings.python_version()} if is_documentation else {})

    def summary(self) -> list[str]:
        """Lines for the start summary: the tokenizer, and the samples of each split."""
        return [*self.tokenizer_summary(), *(line for split in SPLITS for line in self.split_summary(split))]

    def split_summary(self, split: Split) -> list[str]:
        """The lines of `summary` on one split; empty if there is no such split."""
        texts, encoded = self._load(split), self._encode(split)
        if not len(encoded.tokens):
            return []
        tokens = f"{int(encoded.tokens.lengths.sum()):,} tokens in {len(encoded.tokens):,} samples"
        line = f"{tokens}, {len(texts.rows):,} {'texts' if len(texts.rows) > 1 else 'text'} of {texts.origin}"
        return [f"{split}: {part}" for part in (line, *texts.notes, *encoded.notes)]

    def _load(self, split: Split) -> Texts:
        """The texts of a split; empty if there is none. Train and the splits that are cut from it are read together."""
        if split in self._texts:
            return self._texts[split]
        path = self._path(split)
        if self.train is None and path is None:
            self._texts[split] = _texts_of(paragraphs(docstrings.docstrings(split)), docstrings.origin())
        elif path is not None and split != "train":
            self._texts[split] = _texts_of(TextLines(text_files(f"data.{split}", path)), path)
        else:
            shares: dict[Split, float | None] = {"test": self.test_share, "val": self.val_share}
            self._texts |= self._cut({name: share for name, share in shares.items() if self._path(name) is None})
        return self._texts[split]

    def _path(self, split: Split) -> str | None:
        return {"train": self.train, "val": self.val, "test": self.test}[split]

    def _cut(self, shares: dict[Split, float | None]) -> dict[Split, Texts]:
        """Read train, and cut the splits in `shares` from it. Test comes first, so that it does not depend on val."""
        assert self.train is not None
        texts = _texts_of(TextLines(text_files("data.train", self.train)), self.train)
        if not shares:
            return {"train": texts}
        given: list[Split] = [split for split in SPLITS if split != "train" and split not in shares]
        others = (text for split in given for text in self._load(split).all())
        parts, left_out = cut(texts.all(), shares, texts.origin, others)
        note = f"{left_out:,} {'line' if left_out == 1 else 'lines'} left out that are also in {' or '.join(shares)}"
        notes = {"train": [*texts.notes, *[note] * bool(left_out)]}
        cut_note = "cut from train by a hash of the lines"
        return {
            split: Texts(texts.lines, texts.rows[rows], texts.origin, notes.get(split, [cut_note] * bool(len(rows))))
            for split, rows in parts.items()
        }

    def _encode(self, split: Split) -> Encoded:
        if split not in self._encoded:
            texts = self._load(split)
            rows = self.text_tokenizer().encode_all(texts.all())
            pieces, owners = divide(rows, self.longest - 2)
            divided = len(np.unique(owners[1:][owners[1:] == owners[:-1]]))
            notes = [f"{divided:,} texts of more than {self.longest} tokens (data.longest) divided"] * bool(divided)
            if self.packed:
                pieces, owners = pack(pieces, owners, self.longest - 2)
            self._encoded[split] = Encoded(pieces, owners, notes)
        return self._encoded[split]


def paragraphs(documents: Iterable[str]) -> list[str]:
    """The paragraphs of documents, as parts between empty lines, each in one line; those without letters are left out.

    Repeated white space becomes one space.
    """
    parts = (" ".join(part.split()) for document in documents for part in BLANK_LINE.split(document))
    return [part for part in parts if LETTER.search(part)]


def divide(rows: Ragged, longest: int) -> tuple[Ragged, NDArray[np.int64]]:
    """Divide rows that end with an end entry into pieces of at most `longest` tokens, without the end entry.

    Returns the pieces, in order, and the index of each piece's row. A row without tokens gives no piece.
    """
    return Ragged(rows.flat, rows.starts, rows.ends - 1).divided(longest)


def pack(pieces: Ragged, owners: NDArray[np.int64], longest: int) -> tuple[Ragged, NDArray[np.int64]]:
    """Join consecutive pieces of `divide` as long as they have at most `longest` tokens together.

    The end entries between rows are kept and count as tokens. Returns the joined pieces, and the index of the first row
    of each.
    """
    firsts, first = array("q"), 0
    while first < len(pieces):
        firsts.append(first)
        first = int(np.searchsorted(pieces.ends, pieces.starts[first] + longest, side="right"))
    rows = np.frombuffer(firsts, np.int64)  # the first piece of each sample
    last = np.append(rows[1:], len(pieces))[: len(rows)] - 1
    return Ragged(pieces.flat, pieces.starts[rows], pieces.ends[last]), owners[rows]


def _texts_of(lines: Sequence[str], origin: str) -> Texts:
    """The lines that have more than white space; raises UserError if there are none."""
    has_text = np.fromiter((bool(line.strip()) for line in lines), np.bool_, len(lines))
    empty = int((~has_text).sum())
    if not has_text.any():
        raise UserError(f"{origin} has no text; give a file with a sentence in each line.")
    notes = [f"{empty:,} {'line' if empty == 1 else 'lines'} without text left out"] * bool(empty)
    return Texts(lines, np.flatnonzero(has_text), origin, notes)
