"""A translation data set of plain text: two files of the same number of lines, or one with a tab in every line."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.machine.seeds import mix
from common.task import Split
from common.types import SPLITS, Count
from seq2seq.data.pairs import EMPTY_CORPUS, Corpus, SentencePairs
from seq2seq.tokenizers.text import read_pair, read_tabbed


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where one split lies: source and target, or pairs, or none; each gzipped or not."""

    source: str | None  # file with a sentence in every line
    target: str | None  # file with their translations, line by line
    pairs: str | None  # file with source, tab, target in every line


@dataclass(kw_only=True, eq=False)
class ParallelText(SentencePairs):
    """Parallel text by the paths of its files.

    A val or test that is not given is cut from train, the same for any seed of the run: one pair each of `val_count`
    (`test_count`) source sentences, whose other pairs are left out, so that no split knows a sentence of another that
    was cut. Which ones depends on the sentences alone, and test not on how large val is.

    The constructor opens no file; a mistake in the files is a UserError at the first use of their split.

    Args, beside those of SentencePairs:
        train: the split to learn from.
        val: the split that chooses the checkpoint.
        test: the split that is reported.
        val_count: pairs to cut from train for val where val is not given; 0 = no val.
        test_count: pairs to cut from train for test where test is not given; 0 = no test.
    """

    train: Files
    val: Files
    test: Files
    val_count: Count
    test_count: Count

    def __post_init__(self) -> None:
        """Refuse splits of one file of two, or of both kinds of files."""
        super().__post_init__()
        for split in SPLITS:
            files = self._files(split)
            if (files.source is None) != (files.target is None) or (
                files.pairs is not None and files.source is not None
            ):
                raise UserError(
                    f"data.{split}: expected source and target, two files, or pairs, one file with a tab in every "
                    f"line; given were {', '.join(key for key, path in vars(files).items() if path is not None)}."
                )

    def load(self, split: Split) -> dict[Split, Corpus]:
        """A split's own files, or train with all that is cut from it."""
        counts = self._cuts()
        if split != "train" and split not in counts:
            return {split: self._read(split) if self._is_given(split) else EMPTY_CORPUS}
        if not self._is_given("train"):
            raise UserError(
                "There is no training text: give data.train.source and data.train.target, or data.train.pairs, a file "
                "with a tab in every line."
            )
        whole = self._read("train")
        return self._cut(whole, counts) if counts else {"train": whole}

    def _files(self, split: Split) -> Files:
        return {"train": self.train, "val": self.val, "test": self.test}[split]

    def _is_given(self, split: Split) -> bool:
        return any(path is not None for path in vars(self._files(split)).values())

    def _read(self, split: Split) -> Corpus:
        files = self._files(split)
        if files.pairs is not None:
            return Corpus(*read_tabbed(Path(files.pairs).expanduser()), files.pairs)
        assert files.source is not None and files.target is not None
        paths = [Path(path).expanduser() for path in (files.source, files.target)]
        return Corpus(*read_pair(*paths), f"{files.source} and {files.target}")

    def _cuts(self) -> dict[Split, int]:
        """The splits that are parts of train, and their sizes; test comes first and so does not depend on val's."""
        wanted: dict[Split, int] = {"test": self.test_count, "val": self.val_count}
        return {split: count for split, count in wanted.items() if count and not self._is_given(split)}

    def _cut(self, whole: Corpus, counts: dict[Split, int]) -> dict[Split, Corpus]:
        """Train and its parts, each pair in one of them at most."""
        digests = np.fromiter((_digest(text) for text in whole.source), np.int64)  # (n,)
        others: list[Split] = [split for split in ("val", "test") if self._is_given(split)]
        taken = {_digest(text) for split in others for text in self._read(split).source}
        firsts: dict[int, int] = {}  # of each source sentence its first pair
        for row, (source, target) in enumerate(zip(whole.source, whole.target, strict=True)):
            if source.strip() and target.strip() and digests[row] not in taken:
                firsts.setdefault(int(digests[row]), row)
        if sum(counts.values()) >= len(firsts):
            asked = " and ".join(f"data.{split}_count={count}" for split, count in counts.items())
            raise UserError(
                f"{asked} leaves nothing of the {len(firsts):,} sentences of {whole.origin}; give less, or files of "
                f"their own ({', '.join(f'data.{split}.source' for split in counts)} and so on)."
            )
        order, start = sorted(firsts), 0
        parts: dict[Split, Corpus] = {}
        for split, count in counts.items():
            rows = np.array(sorted(firsts[digest] for digest in order[start : start + count]))
            parts[split] = whole.take(rows)
            start += count
        rest = np.flatnonzero(~np.isin(digests, order[:start]))
        doubled = len(whole) - len(rest) - start
        more = f"{doubled:,} more {'pair' if doubled == 1 else 'pairs'}"
        note = f"{more} left out whose source sentences were cut for {' and '.join(counts)}"
        return {"train": replace(whole.take(rest), notes=[note] * bool(doubled)), **parts}


def _digest(text: str) -> int:
    """A place for each sentence in an order that has nothing to do with the file's: 63 bits."""
    return mix("parts of train", text)
