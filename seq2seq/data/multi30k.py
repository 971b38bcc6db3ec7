"""Multi30k: captions of photographs in English, German, French and Czech (Elliott et al. 2016, arXiv:1605.00459)."""

from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.task import Split
from seq2seq.data.pairs import Corpus, SentencePairs
from seq2seq.tokenizers.text import read_two_files


@dataclass(kw_only=True, eq=False)
class Multi30k(SentencePairs):
    """Task 1 of Multi30k as published: 29,000 pairs in train, 1,014 in val and 1,000 in test_2016_flickr.

    Args, in addition to those of SentencePairs:
        root: folder of the files train.en.gz, val.en.gz and test_2016_flickr.en.gz, and of the same files of the other
            language. Each file may also be uncompressed (train.en).
        test: name of the test split's files without endings: test_2016_flickr, test_2017_flickr, ...
    """

    root: str
    test: str

    def __post_init__(self) -> None:
        """Raise UserError if source and target are the same language."""
        if self.source == self.target:
            raise UserError(
                f"data.source={self.source} and data.target={self.target}: expected two languages, such as en and de."
            )
        super().__post_init__()

    def load(self, split: Split) -> dict[Split, Corpus]:
        """Read the two files of `split`."""
        stem = self.test if split == "test" else split
        source, target = self._file("source", self.source, stem), self._file("target", self.target, stem)
        sources, targets, notes = read_two_files(source, target)
        return {split: Corpus(sources, targets, f"{source} and {target}", notes=notes)}

    def _file(self, key: str, language: str, stem: str) -> Path:
        folder = Path(self.root).expanduser()
        for path in (folder / f"{stem}.{language}.gz", folder / f"{stem}.{language}"):
            if path.is_file():
                return path
        languages = {path.name.split(".")[1] for path in folder.glob(f"{stem}.*")}
        if languages:
            raise UserError(
                f"data.{key}={language}: expected a language of {stem} in data.root={self.root}: "
                f"{', '.join(sorted(languages))}."
            )
        raise UserError(
            f"There is no {stem}.{language}.gz in data.root={self.root}; put the files of Multi30k's task 1 there (raw "
            "text, data/task1/raw in the repository multi30k/dataset)."
        )
