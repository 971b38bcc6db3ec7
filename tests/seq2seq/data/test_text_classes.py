"""Texts with classes: which column is the label, the classes, the splits, and one sentence for each mistake."""

from pathlib import Path
from typing import Any

import pytest
from berts import sentences

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from seq2seq.data.text_classes import TextClasses

TEXTS = sentences(60)
LABELS = [("good", "bad", "odd")[len(text) % 3] for text in TEXTS]


def write(path: Path, rows: list[str]) -> Path:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "train.tsv", [f"{label}\t{text}" for label, text in zip(LABELS, TEXTS, strict=True)])


def data_of(file: Path | None, *keys: str) -> TextClasses:
    command = ["model=bert_classifier", "data.tokenizer.vocabulary=70", *keys]
    data: TextClasses = build(configure("train", [*command, *([] if file is None else [f"data.train={file}"])])["data"])
    return data


def pairs(data: TextClasses, split: Any = "train") -> list[tuple[str, str]]:
    rows = [data.sample(split, i, None) for i in range(data.count(split))]
    return [(data.classes()[row["label"]], row["text"]) for row in rows]


def test_labels_and_texts_are_read(file):
    data = data_of(file, "data.val_share=0", "data.test_share=0")
    assert data.classes() == ["bad", "good", "odd"]
    assert pairs(data) == list(zip(LABELS, TEXTS, strict=True))
    sample = data.sample("train", 4, None)
    assert sample["tokens"].tolist() == [2, *data.text_tokenizer().encode(TEXTS[4]), 3]
    batch = data.collate([data.sample("train", i, None) for i in range(3)])
    assert batch["labels"].tolist() == [data.classes().index(label) for label in LABELS[:3]]
    assert data.where("train", 4) == f"line 5 of {file}"


@pytest.mark.parametrize("order", ["label first", "text first"])
def test_the_column_with_fewer_values_is_the_label_and_the_summary_says_so(tmp_path, order):
    rows = [
        (label, text) if order == "label first" else (text, label) for label, text in zip(LABELS, TEXTS, strict=True)
    ]
    data = data_of(write(tmp_path / "t.tsv", ["\t".join(row) for row in rows]))
    assert data.classes() == ["bad", "good", "odd"]
    number = "first" if order == "label first" else "second"
    assert any(
        f"the {number} column of" in line and "was read as the label (3 different" in line for line in data.summary()
    )


def test_a_key_decides_which_column_is_the_label(tmp_path):
    path = write(tmp_path / "t.tsv", ["a\tb", "c\td", "a\te"])
    keys = ["data.val_share=0", "data.test_share=0", "data.tokenizer.vocabulary=15"]
    assert data_of(path, *keys).classes() == ["a", "c"]
    data = data_of(path, *keys, "data.label_column=second")
    assert data.classes() == ["b", "d", "e"] and not any(
        "was read as the label" in line for line in data._load("train").notes
    )


def test_names_of_columns_are_left_out_with_a_note(tmp_path):
    rows = ["sentence\tlabel", *(f"{text}\t{len(text) % 2}" for text in TEXTS)]
    data = data_of(write(tmp_path / "t.tsv", rows))
    assert data.classes() == ["0", "1"]
    assert any("line 1 of" in line and "names (label)" in line for line in data.summary())


def test_whole_numbers_are_sorted_by_value(tmp_path):
    rows = [f"{i % 12}\t{text}" for i, text in enumerate(TEXTS)]
    assert data_of(write(tmp_path / "t.tsv", rows)).classes() == [str(i) for i in range(12)]


def test_val_and_test_are_cut_or_read_and_their_labels_are_checked(file, tmp_path):
    data = data_of(file)
    assert data.count("val") == data.count("test") and data.count("val") >= 5
    assert not {text for _, text in pairs(data)} & {text for _, text in pairs(data, "val")}
    test = write(tmp_path / "test.tsv", [f"good\t{TEXTS[0]}", f"new\t{TEXTS[1]}"])
    data = data_of(file, f"data.test={test}")
    assert data.count("test") == 2 and pairs(data_of(file, f"data.test={file}"), "test")[0] == (LABELS[0], TEXTS[0])
    with pytest.raises(
        UserError, match=r"line 2 of .*test.tsv has the label 'new', and the classes are bad, good, odd"
    ):
        data.sample("test", 1, None)


def test_texts_of_a_file_for_test_are_not_cut_as_val(file, tmp_path):
    rows = [f"{label}\t{text}" for label, text in zip(LABELS, TEXTS, strict=True)][:50]
    data = data_of(file, f"data.test={write(tmp_path / 'test.tsv', rows)}", "data.val_share=0.5")
    assert data.count("val") > 1 and not {*pairs(data, "val")} & {*pairs(data, "test")}


def test_the_classes_of_a_checkpoint_decide_without_train(tmp_path):
    test = write(tmp_path / "test.tsv", [f"{TEXTS[0]}\tgood", f"{TEXTS[1]}\todd"])
    data = data_of(None, f"data.test={test}")
    data.use(data_of(write(tmp_path / "t.tsv", [f"x\t{text}" for text in TEXTS])).text_tokenizer())
    data.set_learnt_classes(["odd", "good"])
    assert [data.sample("test", i, None)["label"] for i in range(2)] == [1, 0]


def test_long_texts_are_truncated_and_counted(file):
    data = data_of(file, "data.longest=4")
    assert max(data.cost("train")) == 4
    ids = data.text_tokenizer().encode(data.sample("train", 0, None)["text"])
    assert data.sample("train", 0, None)["tokens"].tolist() == [2, *ids[:2], 3]
    long = sum(len(data.text_tokenizer().encode(text)) > 2 for _, text in pairs(data))
    assert 0 < long < data.count("train"), "some texts fit"
    assert f"train: {long:,} texts of more than 4 tokens (data.longest) truncated" in data.summary()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["good a text"], r"line 1 has no tab; expected a label, one tab and a text"),
        (["a\tb", "a\tb\tc"], r"line 2 has 2 tabs"),
        (["", " "], "has no text"),
        (["good\ta b", "\ta c", "good\td"], "line 2 has no label"),
        (["label\ttext"], "has only the columns' names"),
    ],
)
def test_mistakes_end_in_one_sentence(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        data_of(write(tmp_path / "t.tsv", rows), "data.label_column=first").count("train")


def test_without_a_file_there_is_nothing_to_learn_from():
    with pytest.raises(UserError, match=r"There is no text with classes: give data.train=FILE"):
        data_of(None).count("train")


def test_a_label_that_train_lacks_is_refused_before_the_run_begins(file, tmp_path):
    test = write(tmp_path / "test.tsv", ["good\ta b", "new\ta b"])
    with pytest.raises(
        UserError, match=r"line 2 of .*test.tsv has the label 'new', and the classes are bad, good, odd"
    ):
        data_of(file, f"data.test={test}").summary()
