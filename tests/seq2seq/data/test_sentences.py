"""Sentences for masked language modelling: every token once, splits, packing, and one sentence for each mistake."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from berts import sentences

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from seq2seq.data.sentences import Sentences, divide, pack, paragraphs
from seq2seq.tokenizers.text import Ragged
from seq2seq.tokenizers.word_piece import WordPiece

TEXTS = sentences(60, longest=9)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join([*TEXTS[:30], "", "   ", *TEXTS[30:]]) + "\n", encoding="utf-8")
    return path


def data_of(file: Path | None, *keys: str) -> Sentences:
    command = ["model=bert", "data.tokenizer.vocabulary=70", *keys, *([] if file is None else [f"data.train={file}"])]
    data: Sentences = build(configure("train", command)["data"])
    return data


def samples(data: Sentences, split: Any = "train") -> list[list[int]]:
    return [data.sample(split, i, None)["tokens"].tolist() for i in range(data.count(split))]


def test_lines_are_samples_with_special_entries_and_blank_lines_are_left_out(file):
    data = data_of(file, "data.val_share=0", "data.test_share=0")
    tokenizer = data.text_tokenizer()
    assert samples(data) == [[2, *tokenizer.encode(text), 3] for text in TEXTS]
    assert data.cost("train").tolist() == [len(row) for row in samples(data)]
    assert data.count("val") == data.count("test") == 0
    assert data.where("train", 30) == f"line 33 of {file}"
    summary = "\n".join(data.summary())
    assert "word_piece with 70 entries" in summary and "2 lines without text left out" in summary


def test_a_batch_is_padded_and_keeps_its_rows(file):
    data = data_of(file)
    batch = data.collate([data.sample("train", i, None) for i in (0, 1, 2)])
    lengths = batch["lengths"].tolist()
    assert batch["tokens"].shape == (3, max(lengths)) and [len(row) for row in batch["rows"]] == lengths
    for tokens, row in zip(batch["tokens"], batch["rows"], strict=True):
        assert tokens.tolist() == [*row.tolist(), *[0] * (max(lengths) - len(row))]


def test_val_and_test_are_cut_from_train_or_read_from_files(file, tmp_path):
    data = data_of(file)
    counts = {split: data.count(split) for split in ("train", "val", "test")}
    assert counts["val"] == counts["test"] == 6 and sum(counts.values()) <= 60
    texts = {split: {*map(tuple, samples(data, split))} for split in counts}
    assert not texts["train"] & texts["val"] and not texts["train"] & texts["test"]
    assert "val: cut from train by a hash of the lines" in data.summary()
    (tmp_path / "val.txt").write_text("a dog runs\n")
    data = data_of(file, f"data.val={tmp_path}/val.txt")
    assert data.count("val") == 1 and data.count("test") == 6
    assert data.fingerprint("val") == data_of(None, f"data.val={tmp_path}/val.txt").fingerprint("val")


def test_lines_of_a_file_for_test_are_not_cut_as_val(file, tmp_path):
    def val(*keys: str) -> set[str]:
        data = data_of(file, *keys)
        return {data.text_tokenizer().decode(row[1:-1]) for row in samples(data, "val")}

    assert val("data.test_share=0", "data.val_share=0.5") & {*TEXTS[:50]}
    (tmp_path / "test.txt").write_text("\n".join(TEXTS[:50]) + "\n")
    chosen = val(f"data.test={tmp_path}/test.txt", "data.val_share=0.5")
    assert len(chosen) > 1 and chosen <= {*TEXTS[50:]} - {*TEXTS[:50]}


@pytest.mark.parametrize("packed", [False, True])
def test_every_token_is_in_exactly_one_sample(file, packed):
    data = data_of(file, "data.val_share=0", "data.test_share=0", "data.longest=6", f"data.packed={packed}")
    tokenizer = data.text_tokenizer()
    rows = samples(data)
    assert all(row[0] == 2 and row[-1] == 3 and 3 <= len(row) <= 6 for row in rows)
    tokens = [id for row in rows for id in row if id not in (2, 3)]
    assert tokens == [id for text in TEXTS for id in tokenizer.encode(text)]
    assert any("divided" in line for line in data.summary())


def test_packed_samples_hold_whole_lines_with_end_entries_between_them(file):
    data = data_of(file, "data.val_share=0", "data.test_share=0", "data.longest=30", "data.packed=true")
    tokenizer = data.text_tokenizer()
    lines = [tuple(tokenizer.encode(text)) for text in TEXTS]
    parts = []
    for row in samples(data):
        assert len(row) <= 30
        inner, start = row[1:-1], 0
        ends = [i for i, id in enumerate(inner) if id == 3] + [len(inner)]
        for end in ends:
            parts.append(tuple(inner[start:end]))
            start = end + 1
    assert parts == lines and data.count("train") < len(TEXTS) / 2
    lengths = [len(row) for row in samples(data)]
    for i, length in enumerate(lengths[:-1]):  # the next line did not fit
        first = samples(data)[i + 1][1:-1]
        first = first[: first.index(3)] if 3 in first else first
        assert length + 1 + len(first) > 30


@pytest.mark.parametrize("seed", range(5))
def test_packing_is_that_of_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 14, size=rng.integers(0, 60))
    rows = Ragged.of(([7] * int(length) for length in lengths), 3)
    pieces, owners = divide(rows, 10)
    expected: list[list[int]] = []  # start, end and owner of each sample
    for start, end, owner in zip(pieces.starts.tolist(), pieces.ends.tolist(), owners.tolist(), strict=True):
        if expected and end - expected[-1][0] <= 10:
            expected[-1][1] = end
        else:
            expected.append([start, end, owner])
    packed, firsts = pack(pieces, owners, 10)
    assert [list(row) for row in zip(packed.starts, packed.ends, firsts, strict=True)] == expected


def test_a_pattern_names_several_files(file, tmp_path):
    (tmp_path / "more.txt").write_text("\n".join(TEXTS[:5]) + "\n")
    both, one = data_of(tmp_path / "*.txt"), data_of(file)
    texts = [sum(len(data._load(split).rows) for split in ("train", "val", "test")) for data in (both, one)]
    assert texts[0] == texts[1] + 5 - both_left_out(both)


def both_left_out(data: Sentences) -> int:
    """Texts of both files of which one is in val or test, as the notes count them."""
    notes = [note for note in data._load("train").notes if "left out that are also" in note]
    return int(notes[0].split()[0]) if notes else 0


def test_rows_are_divided_into_pieces_of_equal_length():
    flat = np.arange(20, dtype=np.int32)
    rows = Ragged(flat, np.array([0, 6, 7, 12]), np.array([6, 7, 12, 20]))  # 5, 0, 4 and 7 tokens and their ends
    pieces, owners = divide(rows, 4)
    assert [pieces[i].tolist() for i in range(len(pieces))] == [
        [0, 1, 2, 3], [4], [7, 8, 9, 10], [12, 13, 14, 15], [16, 17, 18]
    ]  # fmt: skip
    assert owners.tolist() == [0, 0, 2, 3, 3]


def test_counts_are_those_of_train_without_special_entries(file):
    data = data_of(file)
    expected = np.bincount([id for row in samples(data) for id in row[1:-1]], minlength=70)
    assert data.token_counts().tolist() == expected.tolist() and expected[5:].sum() > 100


def test_the_default_text_is_the_documentation_of_python():
    data = data_of(None, "data.tokenizer.vocabulary=1000", "data.longest=64")
    assert data.count("train") > 2000 and data.count("val") > 100 and data.count("test") > 100
    assert "Python version" in data.fingerprint("train")
    assert "paragraph" in data.where("train", 3)
    assert max(data.cost("train")) <= 64


def test_paragraphs_are_the_parts_between_empty_lines():
    assert paragraphs(["One line\n  goes on.\n\n   \n-----\n\nTwo.", "Three"]) == ["One line goes on.", "Two.", "Three"]


def test_a_tokenizer_may_be_read_from_a_file_or_taken_from_a_checkpoint(file, tmp_path):
    tokenizer = WordPiece.train(TEXTS, 60, lowercase=True)
    (tmp_path / "vocab.txt").write_text("\n".join(tokenizer.entries), encoding="utf-8")
    data = data_of(file, f"data.tokenizer.file={tmp_path}/vocab.txt")
    assert data.text_tokenizer().state() == tokenizer.state()
    assert any("vocab.txt lowercases text" in line for line in data.summary())
    before = samples(data)
    data.use(WordPiece.train(TEXTS, 50, lowercase=True))
    assert data.text_tokenizer().size == 50 and samples(data) != before


def test_a_users_text_may_have_blanks(file):
    data = data_of(file)
    sample = data.view("a [MASK] runs", id=7)
    assert sample["id"] == 7 and sample["tokens"].tolist().count(4) == 1
    assert data.collate([sample])["texts"] == ["a [MASK] runs"]


def test_mistakes_end_in_one_sentence(tmp_path):
    (tmp_path / "empty.txt").write_text("\n   \n")
    with pytest.raises(UserError, match=r"there is no text, only white space or nothing"):
        data_of(tmp_path / "empty.txt").count("train")
    with pytest.raises(UserError, match=r"There is no file"):
        data_of(tmp_path / "missing.txt").count("train")
    with pytest.raises(UserError, match=r"data.longest=100 is more than data.batch_size=50"):
        data_of(None, "data.longest=100", "data.batch_size=50")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match=r"it is not a byte-level BPE"):
        data_of(None, f"data.tokenizer.file={tmp_path}/vocab.json").text_tokenizer()
    with pytest.raises(UserError, match=r"has none of tokenizer.json, vocab.txt"):
        data_of(None, f"data.tokenizer.file={tmp_path.parent}").text_tokenizer()


def test_a_tokenizer_without_a_mask_is_refused(file, tmp_path):
    entries = [entry for entry in WordPiece.train(TEXTS, 60, lowercase=True).entries if entry != "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join(entries), encoding="utf-8")
    with pytest.raises(UserError, match=r"has no entry \[MASK\], so it is not that of a masked language model"):
        data_of(file, f"data.tokenizer.file={tmp_path}/vocab.txt").text_tokenizer()


def test_samples_have_no_augmentation(file):
    data = data_of(file)
    assert torch.equal(*(torch.from_numpy(data.sample("train", 5, rng)["tokens"])
                         for rng in (None, torch.Generator().manual_seed(1))))  # fmt: skip
