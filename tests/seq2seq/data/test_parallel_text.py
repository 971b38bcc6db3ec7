"""Parallel files by path: each layout, val and test taken from train, and an error for each mistake."""

import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizing import BYTE_OPTIONS

from common.errors import UserError
from common.task import Split
from seq2seq.data.parallel_text import Files, ParallelText
from seq2seq.tokenizers.bpe import EOS

SPLITS: tuple[Split, ...] = ("train", "val", "test")
NONE = Files(source=None, target=None, pairs=None)
OPTIONS = replace(BYTE_OPTIONS, vocabulary=262)
PAIRS = [(f"the number {i} and {i * i}", f"die Zahl {i} und {i * i}") for i in range(80)]


def tabbed(path: Path, pairs: list[tuple[str, str]]) -> Files:
    path.write_text("".join(f"{source}\t{target}\n" for source, target in pairs), encoding="utf-8")
    return Files(source=None, target=None, pairs=str(path))


def data_set(**changes: Any) -> ParallelText:
    keys: dict[str, Any] = {"train": NONE, "val": NONE, "test": NONE, "val_count": 10, "test_count": 15}
    keys |= {"source": "en", "target": "de", "longest": 128, "too_long": "skip", "batch_size": 512}
    return ParallelText(**{**keys, "tokenizer": OPTIONS, **changes})


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., ParallelText]:
    """Returns a function that makes a data set with these pairs as train, in one file."""

    def from_pairs(pairs: list[tuple[str, str]], **changes: Any) -> ParallelText:
        return data_set(train=tabbed(tmp_path / "train.tsv", pairs), **changes)

    return from_pairs


def test_two_files_and_one_with_tabs_are_the_same_data(tmp_path: Path) -> None:
    for i, side in enumerate(("en", "de")):
        content = "".join(f"{pair[i]}\n" for pair in PAIRS).encode()
        (tmp_path / f"all.{side}").write_bytes(content.replace(b"\n", b"\r\n"))
        (tmp_path / f"all.{side}.gz").write_bytes(gzip.compress(content))
    files = [
        tabbed(tmp_path / "all.tsv", PAIRS),
        *(
            Files(source=str(tmp_path / f"all.en{end}"), target=str(tmp_path / f"all.de{end}"), pairs=None)
            for end in ("", ".gz")
        ),
    ]
    layouts = [data_set(train=train) for train in files]
    for split in SPLITS:
        assert layouts[0].pairs(split) == layouts[1].pairs(split) == layouts[2].pairs(split)
        assert [*layouts[0].cost(split)] == [*layouts[2].cost(split)]
    assert layouts[1].tokenizers()[0].state() == layouts[0].tokenizers()[0].state()


def test_val_and_test_depend_on_the_sentences_only_and_no_pair_is_in_two_splits(
    make: Callable[..., ParallelText],
) -> None:
    data = make(PAIRS)
    splits = {split: data.pairs(split) for split in SPLITS}
    assert [len(splits[split]) for split in SPLITS] == [55, 10, 15]
    assert sorted(pair for pairs in splits.values() for pair in pairs) == sorted(PAIRS)
    for pairs in splits.values():
        assert pairs == sorted(pairs, key=PAIRS.index), "the file's order"
    reversed_file = make(PAIRS[::-1])
    assert all({*reversed_file.pairs(split)} == {*splits[split]} for split in SPLITS), "for any order of the file"
    assert make(PAIRS, val_count=20).pairs("test") == splits["test"], "for any val_count"
    assert splits["val"] != PAIRS[:10] and splits["test"] != PAIRS[-15:]


def test_the_summary_names_the_columns_that_were_read(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text("".join(f"{source}\t{target}\tCC-BY\n" for source, target in PAIRS) + "\n")
    data = data_set(train=Files(source=None, target=None, pairs=str(path)))
    assert {pair for split in SPLITS for pair in data.pairs(split)} == {*PAIRS}
    columns = f"train: {path} has 3 columns: the first was read as the source, the second as the target"
    assert [line for line in data.summary() if "column" in line] == [columns]
    assert f"train: 1 blank line at the end of {path} left out" in data.summary()


def test_repeated_sentences_are_in_one_split(make: Callable[..., ParallelText]) -> None:
    other_targets = [(source, f"{target} !") for source, target in PAIRS]
    data = make([*PAIRS, *other_targets, *PAIRS[:40]])
    sources = {split: [source for source, _ in data.pairs(split)] for split in SPLITS}
    assert len({*sources["val"]}) == 10 == len(sources["val"]) and len({*sources["test"]}) == 15
    assert {*sources["train"]} | {*sources["val"]} | {*sources["test"]} == {source for source, _ in PAIRS}
    assert not {*sources["train"]} & {*sources["val"], *sources["test"]} and not {*sources["val"]} & {*sources["test"]}
    left_out = 200 - sum(map(len, sources.values()))
    note = f"train: {left_out} more pairs left out because their source sentences are in test or val"
    assert note in data.summary() and left_out > 25
    assert not [line for line in data.summary() if "left out because" in line and not line.startswith("train")]


def test_pairs_with_an_empty_side_are_not_taken_for_val_and_test(make: Callable[..., ParallelText]) -> None:
    with_empty = [("", f"leer {i}") for i in range(30)] + [(f"empty {i}", " ") for i in range(30)]
    data = make([*with_empty, *PAIRS])
    assert {*data.pairs("val"), *data.pairs("test")} < {*PAIRS}
    assert data.count("train") == 55 and "train: 60 pairs with an empty side left out" in data.summary()


def test_the_line_of_a_pair_counts_the_lines_that_were_left_out(tmp_path: Path) -> None:
    with_empty = [("", "leer"), *PAIRS[:40], ("leer", ""), ("zu lang " * 60, "zu lang"), *PAIRS[40:]]
    for i, side in enumerate(("en", "de")):
        (tmp_path / f"all.{side}").write_text("".join(f"{pair[i]}\n" for pair in with_empty))
    two_files = Files(source=str(tmp_path / "all.en"), target=str(tmp_path / "all.de"), pairs=None)
    for files, origin in (
        (two_files, f"{tmp_path}/all.en and {tmp_path}/all.de"),
        (tabbed(tmp_path / "all.tsv", with_empty), f"{tmp_path}/all.tsv"),
    ):
        data = data_set(train=files)
        for split in SPLITS:
            lines = [with_empty.index(pair) + 1 for pair in data.pairs(split)]
            assert [data.where(split, i) for i in range(len(lines))] == [f"line {n} of {origin}" for n in lines]


def test_a_split_with_files_is_not_taken_from_train(tmp_path: Path, make: Callable[..., ParallelText]) -> None:
    val = [("", "leer"), *PAIRS[:30]]
    data = make(PAIRS, val=tabbed(tmp_path / "val.tsv", val))
    assert data.pairs("val") == val and data.count("test") == 15 and data.count("train") == 65
    assert not {*data.pairs("test")} & {*val}, "test has no sentence of val's file"
    data = make(PAIRS, val=tabbed(tmp_path / "val.tsv", val), test=tabbed(tmp_path / "test.tsv", val[::-1]))
    assert data.pairs("train") == PAIRS and data.pairs("test") == val[::-1]
    data = make(PAIRS, val_count=0, test_count=0)
    assert [data.count(split) for split in SPLITS] == [80, 0, 0] and data.pairs("val") == []


def test_a_test_with_files_is_read_without_train(tmp_path: Path, make: Callable[..., ParallelText]) -> None:
    tokenizers = make(PAIRS).tokenizers()
    data = data_set(test=tabbed(tmp_path / "test.tsv", PAIRS[:5]), train=Files(source="no", target="no", pairs=None))
    data.use(*tokenizers)
    assert data.count("test") == 5 and data.sample("test", 0, None)["source"] == [
        *tokenizers[0].encode(PAIRS[0][0]),
        EOS,
    ]
    with pytest.raises(UserError, match="There is no file no; correct its path"):
        data.count("val")


def test_counts_that_leave_no_train_are_refused(make: Callable[..., ParallelText]) -> None:
    with pytest.raises(UserError) as caught:
        make(PAIRS, val_count=40, test_count=40).count("train")
    assert str(caught.value).startswith(
        "data.test_count=40 and data.val_count=40 leaves nothing of the 80 sentences of "
    )
    data = make(PAIRS, val_count=40, test_count=39, tokenizer=replace(OPTIONS, vocabulary=260))
    assert data.count("train") == 1


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({"source": "a"}, "but got source."),
        ({"target": "b"}, "but got target."),
        ({"source": "a", "pairs": "c"}, "but got source, pairs."),
        ({"source": "a", "target": "b", "pairs": "c"}, "but got source, target, pairs."),
    ],
)
def test_a_split_has_two_files_or_one(paths: dict[str, str], message: str) -> None:
    files = Files(**{"source": None, "target": None, "pairs": None, **paths})
    with pytest.raises(UserError) as caught:
        data_set(val=files)
    assert str(caught.value).startswith("data.val: expected source and target") and str(caught.value).endswith(message)


def test_no_training_text_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"There is no training text: give data.train.source and"):
        data_set().count("train")


def test_a_tilde_stands_for_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tabbed(tmp_path / "a file = (1).tsv", PAIRS)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_set(train=Files(source=None, target=None, pairs="~/a file = (1).tsv")).count("train") == 55
