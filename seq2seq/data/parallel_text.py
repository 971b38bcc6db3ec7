"""Translation data in text files: two files with the same number of lines, or one with tab-separated columns."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.machine.seeds import mix
from common.task import Split
from common.types import SPLITS, Count
from seq2seq.data.pairs import EMPTY_CORPUS, Corpus, SentencePairs
from seq2seq.tokenizers.text import read_tabbed, read_two_files


@dataclass(frozen=True, kw_only=True)
class Files:
    """The files of one split: source and target, or pairs, or none; each plain, gzip, bzip2 or xz."""

    source: str | None  # file with one sentence per line
    target: str | None  # file with their translations, one per line
    pairs: str | None  # file with source, tab, target in every line


@dataclass(kw_only=True, eq=False)
class ParallelText(SentencePairs):
    """Parallel text, given by the paths of its files.

    A val or test without files is split off train: `val_count` (`test_count`) source sentences with one pair each.
    Other pairs with these source sentences are left out of train, and sentences that the files of val or test hold are
    not selected. So a selected sentence is in no other split. The selection depends on the sentences only, not on the
    run's seed, and the selection of test does not depend on `val_count`.

    The constructor opens no file; a mistake in the files raises UserError at the first use of their split.

    Args, in addition to those of SentencePairs:
        train: files of the split to learn from.
        val: files of the split that selects the checkpoint.
        test: files of the split with the reported scores.
        val_count: pairs to split off train for a val without files; 0 = no val.
        test_count: pairs to split off train for a test without files; 0 = no test.
    """

    train: Files
    val: Files
    test: Files
    val_count: Count
    test_count: Count

    def __post_init__(self) -> None:
        """Raise UserError for a split with one file of two, or with both kinds of files."""
        super().__post_init__()
        for split in SPLITS:
            files = self._files(split)
            if (files.source is None) != (files.target is None) or (
                files.pairs is not None and files.source is not None
            ):
                raise UserError(
                    f"data.{split}: expected source and target (two files) or pairs (one file with a tab in every "
                    f"line), but got {', '.join(key for key, path in vars(files).items() if path is not None)}."
                )

    def load(self, split: Split) -> dict[Split, Corpus]:
        """Load `split`; train is loaded together with the splits that are taken from it."""
        counts = self._counts_from_train()
        if split != "train" and split not in counts:
            return {split: self._read(split) if self._has_files(split) else EMPTY_CORPUS}
        if not self._has_files("train"):
            raise UserError(
                "There is no training text: give data.train.source and data.train.target, or data.train.pairs, a file "
                "with a tab in every line."
            )
        corpus = self._read("train")
        return self._split(corpus, counts) if counts else {"train": corpus}

    def _files(self, split: Split) -> Files:
        return {"train": self.train, "val": self.val, "test": self.test}[split]

    def _has_files(self, split: Split) -> bool:
        return any(path is not None for path in vars(self._files(split)).values())

    def _read(self, split: Split) -> Corpus:
        files = self._files(split)
        if files.pairs is not None:
            source, target, notes = read_tabbed(Path(files.pairs).expanduser())
            return Corpus(source, target, files.pairs, notes=notes)
        assert files.source is not None and files.target is not None
        paths = [Path(path).expanduser() for path in (files.source, files.target)]
        source, target, notes = read_two_files(*paths)
        return Corpus(source, target, f"{files.source} and {files.target}", notes=notes)

    def _counts_from_train(self) -> dict[Split, int]:
        """The numbers of pairs to split off train; test comes first, so that it does not depend on val_count."""
        counts: dict[Split, int] = {"test": self.test_count, "val": self.val_count}
        return {split: count for split, count in counts.items() if count and not self._has_files(split)}

    def _split(self, corpus: Corpus, counts: dict[Split, int]) -> dict[Split, Corpus]:
        """Train and the splits that are taken from it; each pair is in at most one of them."""
        digests = np.fromiter((_digest(text) for text in corpus.source), np.int64)  # (n,)
        splits_with_files: list[Split] = [split for split in ("val", "test") if self._has_files(split)]
        held_out = {_digest(text) for split in splits_with_files for text in self._read(split).source}
        first_rows: dict[int, int] = {}  # of each source sentence, by its digest
        for row, (source, target) in enumerate(zip(corpus.source, corpus.target, strict=True)):
            if source.strip() and target.strip() and digests[row] not in held_out:
                first_rows.setdefault(int(digests[row]), row)
        if sum(counts.values()) >= len(first_rows):
            keys = " and ".join(f"data.{split}_count={count}" for split, count in counts.items())
            raise UserError(
                f"{keys} leaves nothing of the {len(first_rows):,} sentences of {corpus.origin}; give lower counts, or "
                f"separate files ({', '.join(f'data.{split}.source' for split in counts)}, ...)."
            )
        order, start = sorted(first_rows), 0
        splits: dict[Split, Corpus] = {}
        for split, count in counts.items():
            rows = np.array(sorted(first_rows[digest] for digest in order[start : start + count]))
            splits[split] = replace(corpus.take(rows), notes=[])
            start += count
        train_rows = np.flatnonzero(~np.isin(digests, order[:start]))
        repeated = len(corpus) - len(train_rows) - start
        pairs = f"{repeated:,} more {'pair' if repeated == 1 else 'pairs'}"
        note = f"{pairs} left out because their source sentences are in {' or '.join(counts)}"
        return {"train": replace(corpus.take(train_rows), notes=[*corpus.notes, *[note] * bool(repeated)]), **splits}


def _digest(text: str) -> int:
    """A hash of 63 bits; sentences are selected in the order of their hashes, independently of the file."""
    return mix("parts of train", text)
