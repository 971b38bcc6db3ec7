"""Cutting val and test from train: disjoint, stable, and no text in two splits."""

import pytest

from common.errors import UserError
from seq2seq.data.held_out import cut

TEXTS = [f"text {i % 90}" for i in range(100)]  # ten texts occur twice


def test_splits_are_disjoint_and_no_text_is_in_two_of_them():
    parts, left_out = cut(TEXTS, {"test": 0.2, "val": 0.1}, "the file")
    texts = {split: [TEXTS[i] for i in rows] for split, rows in parts.items()}
    assert len(texts["test"]) == len({*texts["test"]}) == 18 and len(texts["val"]) == 9
    assert not {*texts["train"]} & {*texts["test"], *texts["val"]} and not {*texts["test"]} & {*texts["val"]}
    assert sum(map(len, texts.values())) + left_out == 100


def test_the_selection_does_not_depend_on_the_order_or_on_val():
    def chosen(texts: list[str], shares: dict) -> set[str]:
        return {texts[i] for i in cut(texts, shares, "the file")[0]["test"]}

    expected = chosen(TEXTS, {"test": 0.2, "val": 0.1})
    assert chosen(TEXTS[::-1], {"test": 0.2, "val": 0.5}) == expected == chosen(TEXTS, {"test": 0.2})


def test_texts_of_a_split_with_a_file_of_its_own_are_not_selected():
    given = [text for text in dict.fromkeys(TEXTS) if text.endswith(("1", "2", "3", "4"))]
    parts, left_out = cut(TEXTS, {"val": 0.5}, "the file", given)
    val = {TEXTS[i] for i in parts["val"]}
    assert len(val) == round((90 - len(given)) / 2) and not val & {*given}
    assert {TEXTS[i] for i in parts["train"]} == {*TEXTS} - val and sum(map(len, parts.values())) + left_out == 100


def test_default_shares_are_a_tenth_and_at_most_a_thousand():
    assert len(cut(TEXTS, {"val": None}, "the file")[0]["val"]) == 9
    assert len(cut([str(i) for i in range(20_000)], {"val": None}, "the file")[0]["val"]) == 1000
    assert len(cut(["a", "b", "c"], {"val": None}, "the file")[0]["val"]) == 1
    assert len(cut(TEXTS, {"val": 0.0}, "the file")[0]["val"]) == 0
    parts, left_out = cut(TEXTS, {}, "the file")
    assert parts["train"].tolist() == [*range(100)] and left_out == 0


def test_shares_that_leave_nothing_are_refused():
    with pytest.raises(UserError, match=r"data.test_share=0.9 and data.val_share=0.9 leaves nothing of the 90"):
        cut(TEXTS, {"test": 0.9, "val": 0.9}, "the file")
    with pytest.raises(UserError, match=r"data.test_share=1.0 and data.val_share=null leaves nothing"):
        cut(TEXTS, {"test": 1.0, "val": None}, "the file")
