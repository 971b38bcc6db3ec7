"""Texts with classes: files of two tab-separated columns, a label and a text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from common.data import fingerprints
from common.errors import UserError
from common.task import Split
from common.types import SPLITS, Share
from seq2seq.data.held_out import cut
from seq2seq.data.single_texts import SingleTexts
from seq2seq.tokenizers.text import Ragged, read_lines

MAX_NAMED = 3  # maximum number of labels that a message names
HEADERS = {"label", "labels", "class", "category", "target", "sentiment"}  # of a label's column, in lower case


class Labelled(NamedTuple):
    """The texts of one split, and the name of each one's class."""

    texts: list[str]
    labels: list[str]
    lines: list[int]  # the number of each text's line in its file, from 1
    origin: str
    notes: list[str]

    def take(self, rows: NDArray[np.int64], notes: list[str]) -> "Labelled":
        """The texts with these indices, with other notes."""
        texts, labels, lines = ([column[i] for i in rows.tolist()] for column in self[:3])
        return Labelled(texts, labels, lines, self.origin, notes)


@dataclass(kw_only=True, eq=False)
class TextClasses(SingleTexts):
    """Texts with one class each, from files with a label and a text in each line, separated by a tab.

    A text of more than `longest` tokens, the special entries included, is truncated. A file for val or test that
    is not given is cut from train by a hash of the texts. The classes are the labels of train, in the order of their
    numbers if all are whole numbers, and otherwise sorted as strings.

    Args, in addition to those of SingleTexts:
        train: file to learn from.
        val: file that selects the checkpoint; None = cut from train.
        test: file with the reported numbers; None = cut from train.
        val_share: the fraction of train's different texts to cut as val; None = 0.1, but at most 1,000 texts.
        test_share: like `val_share`, for test.
        label_column: which column has the labels: "first", "second", or "auto", the one with fewer different values in
            train. The summary says which one was taken.
    """

    train: str | None
    val: str | None
    test: str | None
    val_share: Share | None
    test_share: Share | None
    label_column: Literal["auto", "first", "second"]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._splits: dict[Split, Labelled] = {}
        self._tokens: dict[Split, Ragged] = {}
        self._truncated: dict[Split, int] = {}  # number of texts of which `_tokens` lacks the end
        self._classes: list[str] | None = None
        self._column: int | None = {"auto": None, "first": 0, "second": 1}[self.label_column]

    def training_texts(self) -> Iterable[str]:
        """The texts of train."""
        return self._load("train").texts

    def forget_tokens(self) -> None:
        """Forget all token ids, because the tokenizer has changed."""
        self._tokens = {}

    def classes(self) -> list[str]:
        """The names of the classes: those of a checkpoint, or those of train before val and test are cut from it."""
        if self._classes is None:
            self._load("train")
            labels = {label for split in SPLITS if self._path(split) is None for label in self._load(split).labels}
            labels |= {*self._load("train").labels}
            self._classes = sorted(labels, key=int) if all(map(_is_whole_number, labels)) else sorted(labels)
        return self._classes

    def set_learnt_classes(self, classes: Sequence[str]) -> None:
        """Use the classes of a checkpoint."""
        self._classes = list(classes)

    def count(self, split: Split) -> int:
        """Number of texts in `split`; 0 if there is no such val or test split."""
        return len(self._load(split).texts)

    def cost(self, split: Split) -> NDArray[np.int64]:
        """Number of tokens of each text, with the special entries and after truncation."""
        return self._encode(split).lengths + 2

    def sample(self, split: Split, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """One text: id (its index), tokens (n,) int64, text and label (an index); there is no augmentation.

        Raises UserError for a label that is not one of the classes.
        """
        labelled = self._load(split)
        return {
            "id": index,
            "tokens": self.framed(self._encode(split)[index]),
            "text": labelled.texts[index],
            "label": self._label(split, index),
        }

    def where(self, split: Split, index: int) -> str:
        """The line of a text and its file, for messages."""
        labelled = self._load(split)
        return f"line {labelled.lines[index]:,} of {labelled.origin}"

    def fingerprint(self, split: Split) -> dict[str, str]:
        """Digests of the texts and of the labels of a split, in order."""
        columns = {"texts": self._load(split).texts, "labels": self._load(split).labels}
        return {
            name: fingerprints.digest(f"{value}\n".encode() for value in column) for name, column in columns.items()
        }

    def summary(self) -> list[str]:
        """Lines for the start summary: tokenizer, classes, and the texts of each split."""
        classes = self.classes()
        names = ", ".join(classes[:MAX_NAMED]) + (", ..." if len(classes) > MAX_NAMED else "")
        lines = [*self.tokenizer_summary(), f"{len(classes)} classes: {names}"]
        return [*lines, *(line for split in SPLITS for line in self.split_summary(split))]

    def split_summary(self, split: Split) -> list[str]:
        """The lines of `summary` on one split; empty if there is no such split.

        Raises UserError for a label that is not one of the classes, so that a run stops before it begins.
        """
        labelled, tokens = self._load(split), self._encode(split)
        if not labelled.texts:
            return []
        for label in dict.fromkeys(labelled.labels):  # in the order of the file, so that the first mistake is named
            self._label(split, labelled.labels.index(label))
        truncated = self._truncated[split]
        note = f"{truncated:,} texts of more than {self.longest} tokens (data.longest) truncated"
        line = f"{len(labelled.texts):,} texts, {int(tokens.lengths.sum()):,} tokens, of {labelled.origin}"
        return [f"{split}: {part}" for part in (line, *labelled.notes, *[note] * bool(truncated))]

    def _label(self, split: Split, index: int) -> int:
        label = self._load(split).labels[index]
        if label not in self.classes():
            raise UserError(
                f"{self.where(split, index)} has the label {label!r}, and the classes are {_named(self.classes())}; "
                "correct the label, or train on a file that has it."
            )
        return self.classes().index(label)

    def _encode(self, split: Split) -> Ragged:
        """The tokens of each text without special entries, truncated: rows of at most longest - 2."""
        if split not in self._tokens:
            rows = self.text_tokenizer().encode_all(self._load(split).texts)
            ends = np.minimum(rows.ends - 1, rows.starts + self.longest - 2)
            self._tokens[split] = Ragged(rows.flat, rows.starts, ends)
            self._truncated[split] = int(np.count_nonzero(ends < rows.ends - 1))
        return self._tokens[split]

    def _load(self, split: Split) -> Labelled:
        """The texts of a split; empty if there is none. Train and the splits that are cut from it are read together."""
        if split in self._splits:
            return self._splits[split]
        path = self._path(split)
        if path is not None and split != "train":
            self._splits[split] = self._read(path)
            return self._splits[split]
        shares: dict[Split, float | None] = {"test": self.test_share, "val": self.val_share}
        shares = {name: share for name, share in shares.items() if self._path(name) is None}
        labelled = self._read_train()
        given: list[Split] = [name for name in SPLITS if name != "train" and name not in shares]
        others = (text for name in given * bool(shares) for text in self._load(name).texts)
        parts, left_out = cut(labelled.texts, shares, labelled.origin, others)
        note = f"{left_out:,} {'text' if left_out == 1 else 'texts'} left out that are also in {' or '.join(shares)}"
        notes = {"train": [*labelled.notes, *[note] * bool(left_out)]}
        cut_note = ["cut from train by a hash of the texts"]
        self._splits |= {
            name: labelled.take(rows, notes.get(name, cut_note * bool(len(rows)))) for name, rows in parts.items()
        }
        return self._splits[split]

    def _path(self, split: Split) -> str | None:
        return {"train": self.train, "val": self.val, "test": self.test}[split]

    def _read_train(self) -> Labelled:
        if self.train is None:
            raise UserError(
                "There is no text with classes: give data.train=FILE, a file with a label, a tab and a text in each "
                "line."
            )
        return self._read(self.train)

    def _read(self, path: str) -> Labelled:
        """Read a file of labels and texts."""
        rows = _read_columns(Path(path).expanduser())
        column, notes = self._find_column([columns for _, columns in rows], path)
        header = rows[0][1][column]
        if header.strip().lower() in HEADERS and all(columns[column] != header for _, columns in rows[1:]):
            notes.append(f"line 1 of {path} was read as the columns' names ({header})")
            rows = rows[1:]
        if not rows:
            raise UserError(
                f"{path} has only the columns' names; give a file with a label, a tab and a text in each line."
            )
        texts, labels = [row[1 - column] for _, row in rows], [row[column].strip() for _, row in rows]
        if empty := [number for (number, _), label in zip(rows, labels, strict=True) if not label]:
            raise UserError(f"{path}: line {empty[0]:,} has no label; give each text the name of its class.")
        return Labelled(texts, labels, [number for number, _ in rows], path, notes)

    def _find_column(self, rows: list[tuple[str, str]], path: str) -> tuple[int, list[str]]:
        """Find which column of a file has the labels, 0 or 1; also returns a note if that was not given.

        With a checkpoint's classes, it is the only column of which each value is one of them. Otherwise train decides.
        """
        if self._column is not None:
            return self._column, []
        values = [{columns[i].strip() for columns in rows[1:] or rows} for i in (0, 1)]  # line 1 may have names
        learnt = [i for i in (0, 1) if self._classes is not None and values[i] <= {*self._classes}]
        if len(learnt) == 1:
            self._column = learnt[0]
            return self._column, []
        if path != self.train:
            self._load("train")
            return self._find_column(rows, path)
        self._column = column = int(len(values[1]) < len(values[0]))
        name, key = ("first", "second")[column], "data.label_column"
        return column, [
            f"the {name} column of {path} was read as the label ({len(values[column]):,} different values, and "
            f"{len(values[1 - column]):,} in the other); {key}=first or second decides otherwise"
        ]


def _read_columns(path: Path) -> list[tuple[int, tuple[str, str]]]:
    """The number and the two columns of each line that is not empty; raises UserError for a line without one tab."""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        first, tab, second = line.partition("\t")
        if not tab or "\t" in second:
            tabs = line.count("\t")
            raise UserError(
                f"{path}: line {number:,} has {tabs or 'no'} {'tabs' if tabs else 'tab'}; expected a label, one tab "
                "and a text in each line; correct the line, or remove other columns (cut -f1,2 FILE > labelled.tsv)."
            )
        rows.append((number, (first, second)))
    if not rows:
        raise UserError(f"{path} has no text; give a file with a label, a tab and a text in each line.")
    return rows


def _is_whole_number(label: str) -> bool:
    return label.isascii() and label.removeprefix("-").isdigit()


def _named(classes: Sequence[str]) -> str:
    return ", ".join(classes[:MAX_NAMED]) + (" and others" if len(classes) > MAX_NAMED else "")
