"""Folders of parallel text: the names that stand for each split, and what is cut from train."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizing import BYTE_OPTIONS

from common.errors import UserError
from common.types import SPLITS, Split
from seq2seq.data.layouts import Files
from seq2seq.data.parallel_text import ParallelText

NONE = Files(source=None, target=None, pairs=None)
OPTIONS = replace(BYTE_OPTIONS, vocabulary=262)
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def text(root: Path | str, **keys: Any) -> ParallelText:
    """A data set with the defaults of configs/data/parallel_text.yaml that decide its splits."""
    plain: dict[str, Any] = {"train": NONE, "val": NONE, "test": NONE, "val_count": None, "test_count": None}
    plain |= {"source": "en", "target": "de", "longest": 128, "too_long": "skip", "batch_size": 512}
    return ParallelText(**{"root": str(root), **plain, "tokenizer": OPTIONS, **keys})


def pairs_of(split: str, count: int) -> list[tuple[str, str]]:
    """Pairs of sentences that name their split."""
    return [(f"{split} number {i}", f"{split} Zahl {i}") for i in range(count)]


def write_files(folder: Path, stem: str, pairs: list[tuple[str, str]], end: str = "", pair: str = "en de") -> None:
    """Write a file of each language."""
    folder.mkdir(parents=True, exist_ok=True)
    for side, language in enumerate(pair.split()):
        content = "".join(f"{sentences[side]}\n" for sentences in pairs).encode()
        (folder / f"{stem}.{language}{end}").write_bytes(COMPRESS[end](content))


def write_tsv(folder: Path, stem: str, pairs: list[tuple[str, str]], end: str = "") -> None:
    """Write one file with tabs."""
    content = "".join(f"{source}\t{target}\n" for source, target in pairs).encode()
    (folder / f"{stem}.tsv{end}").write_bytes(COMPRESS[end](content))


def origins(data: ParallelText) -> dict[str, list[str]]:
    """Of each split, the names of splits with which its sentences begin."""
    return {split: sorted({source.split()[0] for source, _ in data.pairs(split)}) for split in SPLITS}


SEPARATE = {split: [split] for split in SPLITS}


@pytest.mark.parametrize("end", COMPRESS)
@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("train", "valid", "test"),
        ("train.de-en", "valid.de-en", "test.de-en"),
        ("train.en-de", "dev.en-de", "test.en-de"),
        ("Train", "Dev", "Test"),
        ("training", "validation", "eval"),
    ],
)
def test_files_of_each_language_are_recognised_by_the_names_of_splits(
    tmp_path: Path, train: str, val: str, test: str, end: str
) -> None:
    names: dict[Split, str] = {"train": train, "val": val, "test": test}
    for split, stem in names.items():
        write_files(tmp_path, stem, pairs_of(split, 12), end)
    data = text(tmp_path)
    assert origins(data) == SEPARATE and [data.count(split) for split in SPLITS] == [12, 12, 12]
    roles = "; ".join(f"{stem}.en{end} and {stem}.de{end} are {split}" for split, stem in names.items())
    assert data.summary()[0] == f"data.root={tmp_path}: {roles}"
    assert text(tmp_path, source="de", target="en").pairs("test")[0] == pairs_of("test", 1)[0][::-1]


@pytest.mark.parametrize("end", COMPRESS)
def test_files_of_pairs_are_recognised_by_the_names_of_splits(tmp_path: Path, end: str) -> None:
    for split in SPLITS:
        write_tsv(tmp_path, split, pairs_of(split, 12), end)
    data = text(tmp_path)
    assert origins(data) == SEPARATE
    assert data.summary()[0].endswith(f": train.tsv{end} is train; val.tsv{end} is val; test.tsv{end} is test")


def test_the_paths_of_a_split_take_precedence_over_the_folder(tmp_path: Path) -> None:
    for split in SPLITS:
        write_files(tmp_path / "root", split, pairs_of(split, 12))
    write_files(tmp_path, "mine", pairs_of("mine", 5))
    mine = Files(source=str(tmp_path / "mine.en"), target=str(tmp_path / "mine.de"), pairs=None)
    data = text(tmp_path / "root", val=mine)
    assert origins(data) == {**SEPARATE, "val": ["mine"]}
    assert (
        "train.en and train.de are train; test.en and test.de are test; not read: val.de, val.en" in data.summary()[0]
    )
    everything = text(tmp_path / "gone", train=mine, val=mine, test=mine)
    assert everything.count("train") == 5 and "gone" not in "".join(everything.summary())


def test_the_summary_names_the_files_that_are_not_read(tmp_path: Path) -> None:
    """Of two files for one split, the plain one and the first name are read."""
    write_files(tmp_path, "train", pairs_of("train", 12))
    write_files(tmp_path, "train", pairs_of("other", 12), ".gz")
    write_files(tmp_path, "val", pairs_of("val", 12))
    write_files(tmp_path, "dev", pairs_of("other", 12))
    write_files(tmp_path, "test_2016_flickr", pairs_of("other", 12))
    (tmp_path / ".hidden.en").touch()
    data = text(tmp_path, test_count=0)
    assert origins(data) == {"train": ["train"], "val": ["val"], "test": []}
    unread = "dev.de, dev.en, test_2016_flickr.de, test_2016_flickr.en, train.de.gz, ..."
    assert data.summary()[0].endswith(f"; not read: {unread}")


@pytest.mark.parametrize("name", ["Tatoeba.de-en", "corpus"])
def test_the_only_pair_of_a_folder_is_train(tmp_path: Path, name: str) -> None:
    write_files(tmp_path, name, pairs_of("train", 60))
    write_files(tmp_path, "newstest2014", pairs_of("other", 9))
    (tmp_path / "LICENSE").write_text("free")
    data = text(tmp_path)
    assert [data.count(split) for split in SPLITS] == [48, 6, 6] and origins(data)["train"] == ["train"]
    assert (
        f"{name}.en and {name}.de are train; not read: LICENSE, newstest2014.de, newstest2014.en" in data.summary()[0]
    )
    write_tsv(tmp_path, "second", pairs_of("other", 9))
    with pytest.raises(UserError, match=rf"holds several files that may be train: {name}, second; rename"):
        text(tmp_path).count("train")


# Cuts.


@pytest.mark.parametrize(("pairs", "cut"), [(3, 1), (60, 6), (1500, 150), (9990, 999), (12_000, 1000)])
def test_a_tenth_of_train_but_at_most_1000_pairs_become_val_and_test(tmp_path: Path, pairs: int, cut: int) -> None:
    write_tsv(tmp_path, "train", pairs_of("train", pairs))
    data = text(tmp_path)
    data.tokenizer = replace(OPTIONS, vocabulary=260)
    corpora = data.load("train")
    assert [len(corpora[split]) for split in SPLITS] == [pairs - 2 * cut, cut, cut]
    for split, key in (("val", "data.val"), ("test", "data.test")):
        amount = "count=1000" if pairs > 10_000 else "share=0.1"
        assert corpora[split].notes == [f"cut from train by a hash of the source sentences ({key}_{amount})"]


def test_the_default_cut_is_that_of_the_former_default_for_large_files(tmp_path: Path) -> None:
    """Former configs cut 1,000 pairs; a test that differs would not be comparable."""
    write_tsv(tmp_path, "train", pairs_of("train", 10_005))
    now, former = text(tmp_path), text(tmp_path, val_count=1000, test_count=1000)
    for split in SPLITS:
        assert [*now.load("train")[split].source] == [*former.load("train")[split].source]


def test_a_count_takes_precedence_over_a_share_and_0_cuts_nothing(tmp_path: Path) -> None:
    write_tsv(tmp_path, "train", pairs_of("train", 60))
    data = text(tmp_path, val_count=7, val_share=0.5, test_share=0.25)
    assert [data.count(split) for split in SPLITS] == [38, 7, 15]
    assert "val: cut from train by a hash of the source sentences (data.val_count=7)" in data.summary()
    assert text(tmp_path, val_share=0.5).pairs("test") == text(tmp_path).pairs("test")
    data = text(tmp_path, val_count=0, test_share=0.0)
    assert [data.count(split) for split in SPLITS] == [60, 0, 0] and "cut from" not in "".join(data.summary())
    with pytest.raises(UserError, match=r"data.test_share=0.1 and data.val_share=0.9 leaves nothing of the 60 sent"):
        text(tmp_path, val_share=0.9).count("train")


def test_a_sentence_stays_in_its_split_where_others_are_added(tmp_path: Path) -> None:
    """But for those at the limits, which move because the shares are of another number."""
    write_tsv(tmp_path, "train", pairs_of("train", 100))
    before = {split: {*text(tmp_path).pairs(split)} for split in SPLITS}
    write_tsv(tmp_path, "train", [*pairs_of("new", 1), *pairs_of("train", 100)])
    after = {split: {*text(tmp_path).pairs(split)} for split in SPLITS}
    assert sum(len(before[split] - after[split]) for split in SPLITS) <= 2


# Mistakes.


def test_a_folder_without_the_languages_lists_its_files(tmp_path: Path) -> None:
    write_files(tmp_path, "train", pairs_of("train", 9), pair="fr cs")
    with pytest.raises(UserError) as caught:
        text(tmp_path).count("train")
    assert str(caught.value) == (
        f"data.root={tmp_path} holds no training text from en to de: expected train.en and train.de, or train.tsv with "
        "a tab in every line, but it holds train.cs, train.fr; rename them, or correct data.source and data.target."
    )


@pytest.mark.parametrize("split", SPLITS)
def test_a_file_of_one_language_alone_is_refused(tmp_path: Path, split: Split) -> None:
    for name in {"train", split}:
        write_files(tmp_path, name, pairs_of(name, 9))
    (tmp_path / f"{split}.de").unlink()
    with pytest.raises(UserError, match=rf"holds {split}\.en without {split}\.de; add it, move {split}\.en to another"):
        text(tmp_path).count("train")


def test_a_file_that_is_not_read_may_be_incomplete(tmp_path: Path) -> None:
    for split in SPLITS:
        write_files(tmp_path, split, pairs_of(split, 3))
    (tmp_path / "valid.en").write_text("of an earlier version\n")
    assert origins(text(tmp_path)) == SEPARATE


def test_the_columns_of_pairs_are_not_swapped_against_their_name(tmp_path: Path) -> None:
    write_tsv(tmp_path, "train.de-en", [pair[::-1] for pair in pairs_of("train", 20)])
    with pytest.raises(
        UserError, match=r"train.de-en.tsv, by its name with de in the first column, where data.source=en"
    ):
        text(tmp_path).count("train")
    assert text(tmp_path, source="de", target="en").pairs("train")[0][0].startswith("train Zahl")


def test_a_root_that_is_no_folder_or_has_one_language_is_refused(tmp_path: Path) -> None:
    write_tsv(tmp_path, "train", pairs_of("train", 9))
    file = tmp_path / "train.tsv"
    with pytest.raises(UserError, match=rf"data.root={file} is a file; give data.train.pairs={file}\.$"):
        text(file).count("train")
    with pytest.raises(UserError, match=rf"data.root={tmp_path}/gone does not exist"):
        text(tmp_path / "gone").count("train")
    with pytest.raises(UserError, match=r"data.source=en and data.target=en: expected two languages"):
        text(tmp_path, target="en").count("train")


def test_the_constructor_opens_no_file_and_a_tilde_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    data = text("~/corpus")
    write_files(tmp_path / "corpus", "train", pairs_of("train", 20))
    assert data.count("train") == 16
