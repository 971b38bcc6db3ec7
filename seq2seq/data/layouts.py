"""Find parallel text in a folder: each split has one file per language, or one file of sentence pairs."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.types import SPLITS, Split

# The file names of each split, without endings, in upper or lower case. If a folder has files with several names of one
# split, only the files with the name that comes first in this table are read. The languages may follow the name, as in
# train.de-en.de (Moses, fairseq).
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "eval"),
}
HELD_OUT = ("dev", "val", "test")  # a file whose name contains one of these is not guessed to be train
COMPRESSIONS = ("", ".gz", ".bz2", ".xz")
PAIRS = "tsv"  # the ending of a file of sentence pairs
MAX_NAMES = 5  # maximum number of file names that a message lists


@dataclass(frozen=True, kw_only=True)
class Files:
    """The paths of one split's files: `source` and `target`, or `pairs`, or none. Paths that are not given are None.

    A file is plain text or compressed by gzip, bzip2 or xz.
    """

    source: str | None  # file with one source sentence per line
    target: str | None  # file with one translation per line
    pairs: str | None  # file with source, tab, target in every line

    @property
    def paths(self) -> list[str]:
        """The paths that are given; empty for a split without files."""
        return [path for path in (self.source, self.target, self.pairs) if path is not None]


NO_FILES = Files(source=None, target=None, pairs=None)


@dataclass(frozen=True, kw_only=True)
class TextFolder:
    """A folder of parallel text, and which of its files belong to which split."""

    root: Path
    source: str  # the language to translate from
    target: str  # the language to translate to
    names: list[str]  # of all files that are not hidden, sorted
    files: dict[Split, Files]  # of each split that has files

    def note(self, splits: Sequence[Split]) -> str:
        """A line for the summary: the files of each of `splits`, and the files of the folder that are not read."""
        read = {split: [Path(path).name for path in self.files[split].paths] for split in splits if split in self.files}
        roles = [f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} {split}" for split, names in read.items()]
        unread = [name for name in self.names if not any(name in names for names in read.values())]
        roles += [f"not read: {_listed(unread)}"] * bool(unread)
        return f"data.root={self.root}: {'; '.join(roles)}"

    def no_train(self) -> str:
        """The error message for a folder without training text."""
        return (
            f"data.root={self.root} holds no training text from {self.source} to {self.target}: expected "
            f"train.{self.source} and train.{self.target}, or train.{PAIRS} with a tab in every line, but it holds "
            f"{_listed(self.names) or 'no file'}; rename them, or correct data.source and data.target."
        )


def find_files(root: str, source: str, target: str) -> TextFolder:
    """Find the files of each split in the folder `root`, for translation from `source` to `target`.

    If no file has a name of train, train is guessed: it is the only pair of files, or .tsv file, without dev, val or
    test in its name.

    Raises UserError if `root` is not a folder, or if `source` equals `target`. Also raises UserError if a split has the
    file of only one language and no .tsv file, if the name of the .tsv file to be read has the languages in reverse
    order, or if train has to be guessed and several files could be train.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        state = f"is a file; give data.train.pairs={root}" if folder.is_file() else "does not exist; correct its path"
        raise UserError(f"data.root={root} {state}.")
    if source == target:
        raise UserError(f"data.source={source} and data.target={target}: expected two languages, such as en and de.")
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    stems = _by_stem(names, (source, target, PAIRS))
    files: dict[Split, Files] = {}
    for split in SPLITS:
        stem = next(_stems_of(split, stems, source, target), None)
        if stem is not None:
            files[split] = _files_of(folder, stem, stems[stem], source, target)
    if "train" not in files:
        files |= _only_pair(folder, stems, source, target)
    return TextFolder(root=folder, source=source, target=target, names=names, files=files)


def _by_stem(names: Sequence[str], endings: Sequence[str]) -> dict[str, dict[str, str]]:
    """Group file names that end in one of `endings`, such as train.en or train.en.gz: {stem: {ending: name}}.

    If a file exists both uncompressed and compressed, the uncompressed one is taken.
    """
    stems: dict[str, dict[str, str]] = {}
    for compression in COMPRESSIONS:
        for name in names:
            stem, _, ending = name.removesuffix(compression).rpartition(".")
            if stem and ending in endings and name.endswith(compression):
                stems.setdefault(stem, {}).setdefault(ending, name)
    return stems


def _stems_of(split: Split, stems: Iterable[str], source: str, target: str) -> Iterator[str]:
    """Yield the stems that are names of `split`; the first is the one to read."""
    for name in SPLIT_NAMES[split]:
        for form in (name, f"{name}.{source}-{target}", f"{name}.{target}-{source}"):
            yield from (stem for stem in stems if stem.lower() == form.lower())


def _files_of(folder: Path, stem: str, names: dict[str, str], source: str, target: str) -> Files:
    """The files with a stem: those of both languages or, if one is missing, the .tsv file.

    Raises UserError if there is neither, or if the name of the .tsv file has the languages in reverse order
    (train.de-en.tsv for `source` en and `target` de).
    """
    paths = {ending: str(folder / name) for ending, name in names.items()}
    if source in paths and target in paths:
        return Files(source=paths[source], target=paths[target], pairs=None)
    if PAIRS in paths and stem.lower().endswith(f".{target}-{source}".lower()):
        raise UserError(
            f"data.root={folder} holds {names[PAIRS]}, by its name with {target} in the first column, where "
            f"data.source={source} is expected; rename it, or give data.source={target} data.target={source}."
        )
    if PAIRS in paths:
        return Files(source=None, target=None, pairs=paths[PAIRS])
    (present,) = names
    missing = source if present == target else target
    raise UserError(
        f"data.root={folder} holds {names[present]} without {stem}.{missing}; add it, move {names[present]} to another "
        "folder, or correct data.source and data.target."
    )


def _only_pair(folder: Path, stems: dict[str, dict[str, str]], source: str, target: str) -> dict[Split, Files]:
    """Guess train: the only pair of files, or .tsv file, without dev, val or test in its name; empty if there is none.

    Raises UserError if there are several, or if the name of the .tsv file has the languages in reverse order.
    """
    complete = [stem for stem, names in stems.items() if {source, target} <= names.keys() or PAIRS in names]
    complete = [stem for stem in complete if not any(name in stem.lower() for name in HELD_OUT)]
    if len(complete) > 1:
        raise UserError(
            f"data.root={folder} holds several files that may be train: {_listed(complete)}; rename the right ones to "
            "train, or give data.train."
        )
    if not complete:
        return {}
    return {"train": _files_of(folder, complete[0], stems[complete[0]], source, target)}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")
