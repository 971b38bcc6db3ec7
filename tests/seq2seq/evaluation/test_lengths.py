"""Scores by the length of the source, worked out by hand."""

import itertools
import json
from pathlib import Path

import pytest
from sacrebleu.metrics import BLEU

from seq2seq.evaluation.lengths import LIMITS, scores_by_length, source_length
from seq2seq.evaluation.scores import TranslationMetric

SENTENCES = [  # source, reference, translation
    ("a b", "x y", "x y"),
    ("a", "z", "z"),
    ("a b c", "p q r s t", "p q r s t"),
    ("a b c d", "p q r s t u", "p q r s t v"),
    ("", "empty", "full"),
    (" ".join("abcdefg"), "one two three four five", "one two three four five"),
]


def metric(sentences: list[tuple[str, str, str]], source: str = "en", target: str = "de") -> TranslationMetric:
    made = TranslationMetric(source, target, len(sentences))
    sources, references, translations = ([*column] for column in zip(*sentences, strict=True))
    ids = [*range(len(sentences))]
    made.update(
        {"ids": ids, "source_texts": sources, "target_texts": references}, [{"text": text} for text in translations]
    )
    made.gather()
    return made


def test_sentences_are_grouped_by_the_words_of_their_sources() -> None:
    """3-4: 10 of 11 words, 8 of 9 bigrams, 6 of 7 trigrams, 4 of 5 4-grams, and no brevity penalty."""
    rows = {name: (value, count) for name, value, _, _, count, _ in metric(SENTENCES).details() if "sources" in name}
    groups = ["0", "1-2", "3-4", "7-8"]
    assert [*rows] == [f"sources of {group} words: {score}" for group in groups for score in ("bleu", "exact_match")]
    bleu = 100 * (10 / 11 * 8 / 9 * 6 / 7 * 4 / 5) ** 0.25
    assert rows["sources of 3-4 words: bleu"] == (pytest.approx(bleu), 2)
    assert rows["sources of 3-4 words: exact_match"] == (0.5, 2)
    assert rows["sources of 1-2 words: exact_match"] == (1.0, 2) and rows["sources of 7-8 words: bleu"][1] == 1
    assert rows["sources of 0 words: exact_match"] == (0.0, 1)


def test_perfect_translations_of_few_words_have_a_bleu_of_100() -> None:
    """They have no 4-grams, so that BLEU with four orders would be 0."""
    rows = dict(row[:2] for row in metric(SENTENCES[:2]).details())
    assert rows["sources of 1-2 words: bleu"] == pytest.approx(100) and rows["bleu"] == 0


def test_with_4_grams_the_score_of_a_group_is_that_of_its_sentences_alone() -> None:
    parts = metric(SENTENCES[2:4])
    rows = dict(row[:2] for row in parts.details())
    assert rows["sources of 3-4 words: bleu"] == parts.compute()["bleu"]


def test_the_scores_of_all_groups_cover_every_sentence_once() -> None:
    lengths = [*range(70)]
    groups = scores_by_length(lengths, ["a"] * 70, ["a"] * 70, BLEU(effective_order=True))
    assert [group.lengths for group in groups[:3]] == ["0", "1-2", "3-4"] and groups[-1].lengths == "61+"
    assert [group.sentences for group in groups[:-1]] == [1, *(b - a for a, b in itertools.pairwise(LIMITS))]
    assert sum(group.sentences for group in groups) == 70


def test_languages_without_spaces_are_measured_in_characters() -> None:
    assert source_length(" two  words ", by_characters=False) == 2
    assert source_length("两个 人", by_characters=True) == 3
    rows = [row[0] for row in metric([("两个人在街上", "a b", "a b")], "zh_Hant").details()]
    assert "sources of 5-6 characters: bleu" in rows


def test_scores_by_length_are_written_with_their_unit_and_signature(tmp_path: Path) -> None:
    made = metric(SENTENCES)
    made.write(tmp_path)
    content = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["by_source_length"]
    assert content["unit"] == "words" and "eff:yes" in content["signature"] and "nrefs:1" in content["signature"]
    rows = {row[0]: row[1] for row in made.details()}
    assert [group["lengths"] for group in content["groups"]] == ["0", "1-2", "3-4", "7-8"]
    for group in content["groups"]:
        for score in ("bleu", "exact_match"):
            assert group[score] == rows[f"sources of {group['lengths']} words: {score}"]
