"""Multi30k: captions of photographs in English, German, French and Czech (Elliott et al. 2016, arXiv:1605.00459)."""

from pathlib import Path
from typing import Literal

from common.errors import UserError
from common.task import Split
from common.types import Positive
from seq2seq.data.pairs import Corpus, SentencePairs
from seq2seq.tokenizers.bpe import TokenizerOptions
from seq2seq.tokenizers.text import read_pair


class Multi30k(SentencePairs):
    """Task 1 of Multi30k as published: 29,000 pairs to learn from, 1,014 of val, 1,000 of test_2016_flickr.

    `root` holds train.en.gz, val.en.gz, test_2016_flickr.en.gz and the same of each other language, gzipped or not.
    """

    def __init__(
        self,
        *,
        root: str,
        test: str,
        source: str,
        target: str,
        tokenizer: TokenizerOptions,
        longest: Positive,
        too_long: Literal["truncate", "skip"],
        batch_size: Positive,
    ):
        """Describe the data set.

        Args:
            root: folder of the files.
            test: their name for the test split: test_2016_flickr, or test_2017_flickr and so on.
            source: the language to translate from.
            target: the language to translate to.
            tokenizer: how text becomes tokens.
            longest: tokens, end of sentence included, that a side of a training pair may have.
            too_long: what becomes of a longer one: "truncate" that side, or "skip" the pair.
            batch_size: padded tokens of one optimizer step; see SentencePairs.
        """
        if source == target:
            raise UserError(
                f"data.source={source} and data.target={target}: expected two languages, such as en and de."
            )
        super().__init__(
            source=source,
            target=target,
            tokenizer=tokenizer,
            longest=longest,
            too_long=too_long,
            batch_size=batch_size,
        )
        self.root, self.test = root, test

    def load(self, split: Split) -> dict[Split, Corpus]:
        """The two files of a split."""
        stem = self.test if split == "test" else split
        source, target = self._file("source", self.source, stem), self._file("target", self.target, stem)
        return {split: Corpus(*read_pair(source, target), f"{source} and {target}")}

    def _file(self, key: str, language: str, stem: str) -> Path:
        folder = Path(self.root).expanduser()
        for path in (folder / f"{stem}.{language}.gz", folder / f"{stem}.{language}"):
            if path.is_file():
                return path
        there = {path.name.split(".")[1] for path in folder.glob(f"{stem}.*")}
        if there:
            said = f"data.{key}={language}: expected a language of {stem} in data.root={self.root}"
            raise UserError(f"{said}, which are {', '.join(sorted(there))}.")
        raise UserError(
            f"There is no {stem}.{language}.gz in data.root={self.root}; put the files of Multi30k's task 1 there (raw "
            "text, data/task1/raw in the repository multi30k/dataset)."
        )
