"""Neighbours, analogies and similarities by hand, against plain loops, and against gensim."""

import importlib.resources
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from common.machine.seeds import generator
from seq2seq.evaluation.word_vectors import (
    Judgements,
    Section,
    WordVectorMetric,
    answer_analogies,
    nearest,
    read_judgements,
    read_questions,
    similarity,
    unit_vectors,
)

WORDS = ["man", "woman", "king", "queen", "boy", "girl", "Boy", "apple"]
# queen - king = woman - man, and all four have the same norm; the vector of girl is far from boy + woman - man.
VECTORS = torch.tensor(
    [[1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1], [0, 1, 0, 1], [2, 0, 1, 1], [0, 0, 0, -1], [2, 0, 1, 1], [-1] * 4]
)
QUESTIONS = ": family\nMan WOMAN king queen\nking queen man woman\n: gram1\nman woman boy girl\nman woman boy unheard\n"


def gensim_file(name: str) -> Path:
    pytest.importorskip("gensim")
    return Path(str(importlib.resources.files("gensim") / "test" / "test_data" / name))


def gensim_vectors(words: list[str], vectors: Tensor) -> Any:
    keyed: Any = pytest.importorskip("gensim.models.keyedvectors").KeyedVectors(vectors.shape[1])
    keyed.add_vectors(words, vectors.numpy())
    return keyed


def test_the_nearest_vectors_have_the_largest_cosines_without_the_excluded() -> None:
    vectors = torch.randn(40, 5, generator=generator(0))
    queries = torch.randn(3, 5, generator=generator(1))
    excluded = [[], [4, 9], [0]]
    cosines, indices = nearest(unit_vectors(vectors), queries, excluded, 6)
    for q in range(3):
        scores = {i: float(torch.cosine_similarity(vectors[i], queries[q], dim=0)) for i in range(40)}
        expected = sorted((i for i in scores if i not in excluded[q]), key=lambda i: -scores[i])[:6]
        assert indices[q].tolist() == expected
        assert cosines[q].tolist() == pytest.approx([scores[i] for i in expected], abs=1e-5)


def test_neighbours_equal_gensims() -> None:
    words, vectors = [f"w{i}" for i in range(60)], torch.randn(60, 8, generator=generator(2))
    theirs = gensim_vectors(words, vectors)
    units = unit_vectors(vectors)
    _, indices = nearest(units, units[7:8] - units[3:4] + units[5:6], [[7, 3, 5]], 10)
    similar = theirs.most_similar(positive=["w7", "w5"], negative=["w3"], topn=10)
    assert [words[i] for i in indices[0].tolist()] == [word for word, _ in similar]


def test_a_vector_of_zeros_has_no_nan() -> None:
    assert unit_vectors(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2


def test_analogies_are_answered_without_the_words_of_the_question(tmp_path: Path) -> None:
    (tmp_path / "questions").write_text(QUESTIONS)
    results = answer_analogies(VECTORS.float(), WORDS, read_questions(tmp_path / "questions"))
    assert results == [("family", 2, 2), ("gram1", 0, 1)], "the question with an unknown word is not answered"


def test_analogies_equal_gensims_on_the_published_questions() -> None:
    """Vectors in which about half of the answers are right: those of the fourth word are moved to the answer."""
    file = gensim_file("questions-words.txt")
    sections = read_questions(file)
    assert (len(sections), sum(len(s.questions) for s in sections)) == (14, 19_544)
    words = sorted({word.lower() for section in sections for question in section.questions for word in question})
    words = [word for i, word in enumerate(words) if i % 5]  # some words are unknown
    vectors = torch.randn(len(words), 30, generator=generator(3))
    index = {word: i for i, word in enumerate(words)}
    for a, b, c, d in [tuple(w.lower() for w in q) for s in sections for q in s.questions[:40]]:
        if {a, b, c, d} <= {*words}:
            vectors[index[d]] = vectors[index[b]] - vectors[index[a]] + vectors[index[c]]
    ours = answer_analogies(vectors, words, sections)
    _, theirs = gensim_vectors(words, vectors).evaluate_word_analogies(str(file), restrict_vocab=10**6)
    expected = [(s["section"], len(s["correct"]), len(s["correct"]) + len(s["incorrect"])) for s in theirs[:-1]]
    assert ours == expected
    correct, answered = (sum(row[i] for row in ours) for i in (1, 2))
    assert 0.02 * answered < correct < 0.98 * answered


@pytest.mark.parametrize("name", ["wordsim353.tsv", "simlex999.txt"])
def test_similarities_equal_gensims_on_the_published_pairs(name: str) -> None:
    file = gensim_file(name)
    judgements = read_judgements(file)
    assert len(judgements.pairs) == {"wordsim353.tsv": 353, "simlex999.txt": 999}[name]
    words = sorted({word.lower() for pair in judgements.pairs for word in pair})[::-1]
    words = [word for i, word in enumerate(words) if i % 7]
    vectors = torch.randn(len(words), 6, generator=generator(4))
    correlation, known = similarity(vectors, words, judgements)
    _, spearman, unknown = gensim_vectors(words, vectors).evaluate_word_pairs(str(file))
    # gensim computes cosines in fp32; a rank changes only if two pairs are within its rounding
    assert correlation == pytest.approx(spearman[0], abs=1e-3)
    assert known / len(judgements.pairs) == pytest.approx(1 - unknown / 100, abs=1e-9)


def test_similarity_is_the_correlation_of_ranks() -> None:
    """Ranks of cosines 3, 2, 1, 4 and of judgements 3, 1, 2, 4: 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15) = 0.8."""
    vectors = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0], [1.0, 9.0], [9.0, 1.0]])
    pairs = [("a", "b"), ("a", "c"), ("a", "d"), ("A", "E"), ("a", "unheard")]
    assert similarity(vectors, list("abcde"), Judgements(pairs, [3, 1, 2, 9, 5])) == (pytest.approx(0.8), 4)


def test_the_correlation_of_too_few_pairs_is_not_a_number() -> None:
    correlation, known = similarity(torch.eye(2), ["a", "b"], Judgements([("a", "b"), ("a", "x")], [1, 2]))
    assert math.isnan(correlation) and known == 1


def test_columns_are_found_by_their_headings(tmp_path: Path) -> None:
    """SimLex-999 as published has the part of speech between the words and the score; WordSim-353 has commas."""
    (tmp_path / "simlex").write_text("word1\tword2\tPOS\tSimLex999\tconc(w1)\nold\tnew\tA\t1.58\t2.72\n")
    (tmp_path / "wordsim").write_text("Word 1,Word 2,Human (mean)\nlove,sex,6.77\n")
    assert read_judgements(tmp_path / "simlex") == ([("old", "new")], [1.58])
    assert read_judgements(tmp_path / "wordsim") == ([("love", "sex")], [6.77])


@pytest.mark.parametrize(
    ("read", "content", "reason"),
    [
        (read_questions, "a b c d\n", "line 1 is 'a b c d'"),
        (read_questions, ": one\na b c\n", "line 2 is 'a b c'"),
        (read_judgements, "a\tb\t1\nc\td\n", "line 2 has no number in column 3"),
        (read_judgements, "# nothing\n", "holds no pair"),
    ],
)
def test_a_file_of_another_format_is_refused(tmp_path: Path, read: Any, content: str, reason: str) -> None:
    (tmp_path / "file").write_text(content)
    with pytest.raises(UserError, match=reason):
        read(tmp_path / "file")


def metric_of(**changes: Any) -> WordVectorMetric:
    metric = WordVectorMetric(WORDS, 3, **changes)
    rows = [{"nats": 6.0, "pairs": 3, "vectors": VECTORS}, {"nats": 1.0, "pairs": 2}]
    metric.update({"ids": [2, 0]}, rows)
    metric.update({"ids": [1]}, [{"nats": 0.0, "pairs": 0, "vectors": VECTORS}])
    metric.gather()
    return metric


def test_the_loss_is_the_mean_over_all_pairs_of_all_passages() -> None:
    metric = metric_of()
    assert metric.compute() == {"loss": 7 / 5}
    assert metric.details() == [("passage", "pairs", "loss"), (0, 2, 0.5), (1, 0, 0.0), (2, 3, 2.0)]


def test_numbers_of_files_are_shares_of_what_the_vocabulary_permits(tmp_path: Path) -> None:
    (tmp_path / "questions").write_text(QUESTIONS)
    judgements = {"some": Judgements([("man", "woman"), ("king", "unheard")], [1.0, 2.0])}
    metric = metric_of(sections=read_questions(tmp_path / "questions"), judgements=judgements)
    assert metric.compute() == {
        "loss": 7 / 5,
        "analogies": 2 / 3,
        "analogies_semantic": 1.0,
        "analogies_syntactic": 0.0,
        "analogies_known": 3 / 4,
        "similarity_some_known": 0.5,
    }
    assert metric.details()[1] == ("family", 2, 1.0)


def test_analogies_may_use_only_the_most_frequent_words() -> None:
    sections = [Section("family", [("man", "woman", "king", "queen"), ("man", "woman", "boy", "girl")])]
    numbers = metric_of(sections=sections, most_frequent=4).compute()
    assert (numbers["analogies"], numbers["analogies_known"]) == (1.0, 0.5)


def test_vectors_are_written_by_the_function_that_is_given(tmp_path: Path) -> None:
    written: list[tuple[Path, Tensor]] = []
    metric_of(write_vectors=lambda *arguments: written.append(arguments)).write(tmp_path / "new")
    assert written == [(tmp_path / "new", VECTORS)] and (tmp_path / "new").is_dir()
    metric_of().write(tmp_path / "none")
    assert not (tmp_path / "none").exists()
