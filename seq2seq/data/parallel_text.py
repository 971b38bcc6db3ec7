"""Translation data in text files: two files with the same number of lines, or one with tab-separated columns."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.task import Split
from common.types import MAX_COUNT, SPLITS, Count, Share
from seq2seq.data.held_out import DEFAULT_SHARE, MAX_DEFAULT_COUNT, digest
from seq2seq.data.layouts import NO_FILES, TextFolder, find_files
from seq2seq.data.layouts import Files as Files
from seq2seq.data.pairs import EMPTY_CORPUS, Corpus, SentencePairs
from seq2seq.tokenizers.text import read_tabbed, read_two_files


@dataclass(kw_only=True, eq=False)
class ParallelText(SentencePairs):
    """Parallel text, given by the paths of its files or by the folder that contains them.

    In the folder `root`, each split has one file per language or one file of pairs (see `layouts.find_files`). If paths
    are given for a split, they take precedence over the folder. A val or test split without files is cut from train:
    `val_count` (`test_count`) different source sentences are selected. For each of them, the first pair without an
    empty side is moved to the split, and further pairs are left out of train. Source sentences that also occur in the
    files of val or test are not selected. Therefore, a selected sentence is in one split only. The selection depends
    only on the sentences and on how many are selected, not on the run's seed. The selection of test does not depend on
    that of val.

    The constructor opens no file. A mistake in a file raises UserError when its split is first used.

    Args, in addition to those of SentencePairs:
        train: files of the split to learn from.
        val: files of the split that selects the checkpoint.
        test: files of the split with the reported scores.
        val_count: number of pairs to cut from train if val has no files; 0 = no val, None = `val_share` decides.
        test_count: number of pairs to cut from train if test has no files; 0 = no test, None = `test_share` decides.
        root: folder with the files of the splits for which no paths are given; None if there is no folder.
        val_share: the fraction of the different source sentences of train to cut as val if `val_count` is None; None =
            0.1, but at most 1,000 sentences.
        test_share: like `val_share`, for test if `test_count` is None.
    """

    train: Files
    val: Files
    test: Files
    val_count: Count | None
    test_count: Count | None
    root: str | None = None  # with defaults, because older yaml files and subclasses lack these keys
    val_share: Share | None = None
    test_share: Share | None = None

    def __post_init__(self) -> None:
        """Raise UserError for a split with only one of source and target, or with source, target and pairs."""
        super().__post_init__()
        for split in SPLITS:
            files = self._files_by_path(split)
            if (files.source is None) != (files.target is None) or (
                files.pairs is not None and files.source is not None
            ):
                raise UserError(
                    f"data.{split}: expected source and target (two files) or pairs (one file with a tab in every "
                    f"line), but got {', '.join(key for key, path in vars(files).items() if path is not None)}."
                )

    def load(self, split: Split) -> dict[Split, Corpus]:
        """Load `split`. Train and the splits that are cut from it are loaded together."""
        cut = [] if split != "train" and self._files_by_path(split).paths else self._cut_splits()
        if split != "train" and split not in cut:
            return {split: self._read(split) if self._files(split).paths else EMPTY_CORPUS}
        if not self._files("train").paths and self.root is not None:
            raise UserError(self._folder.no_train())
        if not self._files("train").paths:
            raise UserError(
                "There is no training text: give data.train.source and data.train.target, or data.train.pairs, a file "
                "with a tab in every line, or data.root, a folder with such files."
            )
        corpus = self._read("train")
        return self._cut(corpus, cut) if cut else {"train": corpus}

    def summary(self) -> list[str]:
        """A line on the files of `root`, if it is used, and the lines of SentencePairs."""
        of_root = [split for split in SPLITS if not self._files_by_path(split).paths]
        return [*([self._folder.note(of_root)] if of_root and self.root is not None else []), *super().summary()]

    def _files_by_path(self, split: Split) -> Files:
        return {"train": self.train, "val": self.val, "test": self.test}[split]

    def _files(self, split: Split) -> Files:
        """The files of a split: those given by path, otherwise those found in `root`."""
        files = self._files_by_path(split)
        return files if files.paths or self.root is None else self._folder.files.get(split, NO_FILES)

    @cached_property
    def _folder(self) -> TextFolder:
        assert self.root is not None
        return find_files(self.root, self.source, self.target)

    def _read(self, split: Split) -> Corpus:
        files = self._files(split)
        if files.pairs is not None:
            source, target, notes = read_tabbed(Path(files.pairs).expanduser())
            return Corpus(source, target, files.pairs, notes=notes)
        assert files.source is not None and files.target is not None
        paths = [Path(path).expanduser() for path in (files.source, files.target)]
        source, target, notes = read_two_files(*paths)
        return Corpus(source, target, f"{files.source} and {files.target}", notes=notes)

    def _cut_splits(self) -> list[Split]:
        """The splits to cut from train; test comes first, so that its sentences do not depend on val's."""
        splits: list[Split] = ["test", "val"]
        return [split for split in splits if self._amount(split)[0] != 0 and not self._files(split).paths]

    def _amount(self, split: Split, available: int = MAX_COUNT) -> tuple[int, str]:
        """The number of source sentences to cut from train for `split`, and the key=value that decides this number.

        `available` is the number of source sentences that can be cut.
        """
        count, share = {"val": (self.val_count, self.val_share), "test": (self.test_count, self.test_share)}[split]
        if count is None:
            share, longest = (DEFAULT_SHARE, MAX_DEFAULT_COUNT) if share is None else (share, available)
            count = round(share * available)
            least = int(share > 0 and available > 2)  # so that `split` is not empty
            if count <= longest:
                return max(least, count), f"data.{split}_share={share}"
            count = longest
        return count, f"data.{split}_count={count}"

    def _cut(self, corpus: Corpus, splits: list[Split]) -> dict[Split, Corpus]:
        """Divide `corpus` into train and the `splits` that are cut from it; each pair is in at most one of them."""
        digests = np.fromiter((digest(text) for text in corpus.source), np.int64)  # (n,)
        splits_with_files: list[Split] = [split for split in ("val", "test") if self._files(split).paths]
        held_out = {digest(text) for split in splits_with_files for text in self._read(split).source}
        first_rows: dict[int, int] = {}  # digest of a source sentence -> row of its first pair that can be cut
        for row, (source, target) in enumerate(zip(corpus.source, corpus.target, strict=True)):
            if source.strip() and target.strip() and digests[row] not in held_out:
                first_rows.setdefault(int(digests[row]), row)
        amounts = {split: self._amount(split, len(first_rows)) for split in splits}
        total = sum(count for count, _ in amounts.values())
        if total and total >= len(first_rows):
            keys = " and ".join(key for _, key in amounts.values())
            raise UserError(
                f"{keys} leaves nothing of the {len(first_rows):,} sentences of {corpus.origin}; give less, or "
                f"separate files ({', '.join(f'data.{split}.source' for split in splits)}, ...)."
            )
        order, start = sorted(first_rows), 0
        corpora: dict[Split, Corpus] = {}
        for split, (count, key) in amounts.items():
            rows = np.array(sorted(first_rows[digest] for digest in order[start : start + count]), dtype=np.int64)
            note = f"cut from train by a hash of the source sentences ({key})"
            corpora[split] = replace(corpus.take(rows), notes=[note] * bool(count))
            start += count
        train_rows = np.flatnonzero(~np.isin(digests, order[:start]))
        repeated = len(corpus) - len(train_rows) - start
        pairs = f"{repeated:,} more {'pair' if repeated == 1 else 'pairs'}"
        note = f"{pairs} left out because their source sentences are in {' or '.join(splits)}"
        return {"train": replace(corpus.take(train_rows), notes=[*corpus.notes, *[note] * bool(repeated)]), **corpora}
