"""Parallel files by path: each layout, cutting val and test out of train, and a sentence per mistake."""

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
    """A data set whose train is these pairs in one file."""

    def given(pairs: list[tuple[str, str]], **changes: Any) -> ParallelText:
        return data_set(train=tabbed(tmp_path / "train.tsv", pairs), **changes)

    return given


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
    found = [data_set(train=one) for one in files]
    for split in SPLITS:
        assert found[0].pairs(split) == found[1].pairs(split) == found[2].pairs(split)
        assert found[0].cost(split) == found[2].cost(split)
    assert found[1].tokenizers()[0].state() == found[0].tokenizers()[0].state()


def test_val_and_test_are_cut_once_for_all_and_no_pair_is_in_two_splits(make: Callable[..., ParallelText]) -> None:
    data = make(PAIRS)
    parts = {split: data.pairs(split) for split in SPLITS}
    assert [len(parts[split]) for split in SPLITS] == [55, 10, 15]
    assert sorted(pair for part in parts.values() for pair in part) == sorted(PAIRS)
    for part in parts.values():
        assert part == sorted(part, key=PAIRS.index), "the file's order"
    back = make(PAIRS[::-1])
    assert all({*back.pairs(split)} == {*parts[split]} for split in SPLITS), "whatever the file's order"
    assert make(PAIRS, val_count=20).pairs("test") == parts["test"], "however large val is"
    assert parts["val"] != PAIRS[:10] and parts["test"] != PAIRS[-15:]


def test_repeated_sentences_stay_on_one_side_of_the_cut(make: Callable[..., ParallelText]) -> None:
    again = [(source, f"{target} !") for source, target in PAIRS]
    data = make([*PAIRS, *again, *PAIRS[:40]])
    sources = {split: [source for source, _ in data.pairs(split)] for split in SPLITS}
    assert len({*sources["val"]}) == 10 == len(sources["val"]) and len({*sources["test"]}) == 15
    assert {*sources["train"]} | {*sources["val"]} | {*sources["test"]} == {source for source, _ in PAIRS}
    assert not {*sources["train"]} & {*sources["val"], *sources["test"]} and not {*sources["val"]} & {*sources["test"]}
    left_out = 200 - sum(map(len, sources.values()))
    note = f"train: {left_out} more pairs left out whose source sentences were cut for test and val"
    assert note in data.summary() and left_out > 25
    assert not [line for line in data.summary() if "cut for" in line and not line.startswith("train")]


def test_nothing_incomplete_is_cut(make: Callable[..., ParallelText]) -> None:
    holes = [("", f"leer {i}") for i in range(30)] + [(f"empty {i}", " ") for i in range(30)]
    data = make([*holes, *PAIRS])
    assert {*data.pairs("val"), *data.pairs("test")} < {*PAIRS}
    assert data.count("train") == 55 and "train: 60 pairs with an empty side left out" in data.summary()


def test_a_pair_lies_in_the_line_of_its_files_whatever_was_left_out_before(tmp_path: Path) -> None:
    holes = [("", "leer"), *PAIRS[:40], ("leer", ""), ("zu lang " * 60, "zu lang"), *PAIRS[40:]]
    for i, side in enumerate(("en", "de")):
        (tmp_path / f"all.{side}").write_text("".join(f"{pair[i]}\n" for pair in holes))
    two = Files(source=str(tmp_path / "all.en"), target=str(tmp_path / "all.de"), pairs=None)
    for files, origin in (
        (two, f"{tmp_path}/all.en and {tmp_path}/all.de"),
        (tabbed(tmp_path / "all.tsv", holes), f"{tmp_path}/all.tsv"),
    ):
        data = data_set(train=files)
        for split in SPLITS:
            lines = [holes.index(pair) + 1 for pair in data.pairs(split)]
            assert [data.where(split, i) for i in range(len(lines))] == [f"line {n} of {origin}" for n in lines]


def test_splits_given_by_path_win(tmp_path: Path, make: Callable[..., ParallelText]) -> None:
    own = [("", "leer"), *PAIRS[:30]]
    data = make(PAIRS, val=tabbed(tmp_path / "val.tsv", own))
    assert data.pairs("val") == own and data.count("test") == 15 and data.count("train") == 65
    assert not {*data.pairs("test")} & {*own}, "what is cut knows no sentence of a split that is given"
    both = make(PAIRS, val=tabbed(tmp_path / "val.tsv", own), test=tabbed(tmp_path / "test.tsv", own[::-1]))
    assert both.pairs("train") == PAIRS and both.pairs("test") == own[::-1]
    neither = make(PAIRS, val_count=0, test_count=0)
    assert [neither.count(split) for split in SPLITS] == [80, 0, 0] and neither.pairs("val") == []


def test_a_given_test_is_read_without_train(tmp_path: Path, make: Callable[..., ParallelText]) -> None:
    tokenizers = make(PAIRS).tokenizers()
    data = data_set(test=tabbed(tmp_path / "test.tsv", PAIRS[:5]), train=Files(source="no", target="no", pairs=None))
    data.use(*tokenizers)
    assert data.count("test") == 5 and data.sample("test", 0, None)["source"] == [
        *tokenizers[0].encode(PAIRS[0][0]),
        EOS,
    ]
    with pytest.raises(UserError, match="There is no file no; mend its path"):
        data.count("val")


def test_a_cut_that_leaves_nothing_is_refused(make: Callable[..., ParallelText]) -> None:
    with pytest.raises(UserError) as caught:
        make(PAIRS, val_count=40, test_count=40).count("train")
    assert str(caught.value).startswith(
        "data.test_count=40 and data.val_count=40 leaves nothing of the 80 sentences of "
    )
    one = make(PAIRS, val_count=40, test_count=39, tokenizer=replace(OPTIONS, vocabulary=260))
    assert one.count("train") == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"source": "a"}, "given were source."),
        ({"target": "b"}, "given were target."),
        ({"source": "a", "pairs": "c"}, "given were source, pairs."),
        ({"source": "a", "target": "b", "pairs": "c"}, "given were source, target, pairs."),
    ],
)
def test_files_are_two_or_one(given: dict[str, str], said: str) -> None:
    files = Files(**{"source": None, "target": None, "pairs": None, **given})
    with pytest.raises(UserError) as caught:
        data_set(val=files)
    assert str(caught.value).startswith("data.val: expected source and target") and str(caught.value).endswith(said)


def test_no_training_text_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"There is no training text: give data.train.source and"):
        data_set().count("train")


def test_a_home_folder_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tabbed(tmp_path / "a file = (1).tsv", PAIRS)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_set(train=Files(source=None, target=None, pairs="~/a file = (1).tsv")).count("train") == 55
