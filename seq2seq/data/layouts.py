"""The files of parallel text in a folder: for each split a file of each language, or one file of pairs."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.types import SPLITS, Split

# The names of each split, in any case of letters; of several, the first is read. The languages may follow the name, as
# in train.de-en.de (Moses, fairseq).
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "eval"),
}
HELD_OUT = ("dev", "val", "test")  # in a file's name: not for training
COMPRESSIONS = ("", ".gz", ".bz2", ".xz")
PAIRS = "tsv"
MAX_NAMES = 5  # of files in a message


@dataclass(frozen=True, kw_only=True)
class Files:
    """The files of one split: source and target, or pairs, or none; each plain, gzip, bzip2 or xz."""

    source: str | None  # file with one sentence per line
    target: str | None  # file with their translations, one per line
    pairs: str | None  # file with source, tab, target in every line

    @property
    def paths(self) -> list[str]:
        """The paths of the files; none for a split without files."""
        return [path for path in (self.source, self.target, self.pairs) if path is not None]


NO_FILES = Files(source=None, target=None, pairs=None)


@dataclass(frozen=True, kw_only=True)
class TextFolder:
    """The files of a folder."""

    root: Path
    source: str
    target: str
    names: list[str]  # of all visible files, sorted
    files: dict[Split, Files]  # of each split that has files

    def note(self, splits: Sequence[Split]) -> str:
        """A line for the summary: the files of each of `splits`, and the other files of the folder."""
        read = {split: [Path(path).name for path in self.files[split].paths] for split in splits if split in self.files}
        roles = [f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} {split}" for split, names in read.items()]
        unread = [name for name in self.names if not any(name in names for names in read.values())]
        roles += [f"not read: {_listed(unread)}"] * bool(unread)
        return f"data.root={self.root}: {'; '.join(roles)}"

    def no_train(self) -> str:
        """The sentence of the error that there is no training text."""
        return (
            f"data.root={self.root} holds no training text from {self.source} to {self.target}: expected "
            f"train.{self.source} and train.{self.target}, or train.{PAIRS} with a tab in every line, but it holds "
            f"{_listed(self.names) or 'no file'}; rename them, or correct data.source and data.target."
        )


def find_files(root: str, source: str, target: str) -> TextFolder:
    """Find the files of each split in the folder `root`, for translation from `source` to `target`.

    Without files that are named for train, the only other pair of files, or .tsv file, is train. Raises UserError when
    `root` is no folder, when a split has the file of one language alone, and when several other files may be train.
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
        for stem in _stems_of(split, stems, source, target):
            files.setdefault(split, _files_of(folder, stem, stems[stem], source, target))
    if "train" not in files:
        files |= _only_pair(folder, stems, source, target)
    return TextFolder(root=folder, source=source, target=target, names=names, files=files)


def _by_stem(names: Sequence[str], endings: Sequence[str]) -> dict[str, dict[str, str]]:
    """Names as {stem: {ending: name}}, for a name stem.ending, compressed or not; a plain file comes first."""
    stems: dict[str, dict[str, str]] = {}
    for compression in COMPRESSIONS:
        for name in names:
            stem, _, ending = name.removesuffix(compression).rpartition(".")
            if stem and ending in endings and name.endswith(compression):
                stems.setdefault(stem, {}).setdefault(ending, name)
    return stems


def _stems_of(split: Split, stems: Iterable[str], source: str, target: str) -> Iterator[str]:
    """The stems that stand for `split`; the one to read comes first."""
    for name in SPLIT_NAMES[split]:
        for form in (name, f"{name}.{source}-{target}", f"{name}.{target}-{source}"):
            yield from (stem for stem in stems if stem.lower() == form.lower())


def _files_of(folder: Path, stem: str, names: dict[str, str], source: str, target: str) -> Files:
    """The files of a stem; raises UserError for one language without the other."""
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
    """The files of train if a single pair of files, or file of pairs, may be that; raises UserError for several."""
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
