"""Words as tokens: the vocabulary against a count by hand, and long sentences."""

import random
from collections import Counter

import numpy as np
import pytest

from seq2seq.tokenizers.words import MAX_SENTENCE, Vocabulary, WordOptions, count_words


def options(**changes: object) -> WordOptions:
    values: dict[str, object] = {"split": "letters", "lowercase": True, "min_count": 1}
    return WordOptions(**{**values, **changes})  # type: ignore[arg-type]


def test_letters_leave_punctuation_out_and_keep_apostrophes_inside_words() -> None:
    assert options().words("Don't stop_at e-mail: 'naïve' 42.") == ["don't", "stop", "at", "e", "mail", "naïve", "42"]


def test_spaces_keep_everything_between_white_space() -> None:
    assert options(split="spaces", lowercase=False).words("A man\tsits .\r") == ["A", "man", "sits", "."]


def test_the_vocabulary_is_that_of_a_counter_and_encoding_restores_the_known_words() -> None:
    rng = random.Random(0)
    sentences = [[f"w{int(rng.paretovariate(0.7))}" for _ in range(rng.randint(0, 9))] for _ in range(300)]
    counts = Counter(word for words in sentences for word in words)
    expected = [(word, count) for word, count in counts.most_common() if count >= 3]
    vocabulary, rows, unknown = count_words(iter(sentences), min_count=3)
    assert list(zip(vocabulary.words, vocabulary.counts.tolist(), strict=True)) == expected
    known = [[word for word in words if counts[word] >= 3] for words in sentences]
    assert [[vocabulary.words[i] for i in rows[n]] for n in range(len(rows))] == [words for words in known if words]
    assert unknown == sum(count for count in counts.values() if count < 3) > 0
    again, unknown_again = vocabulary.encode(sentences)
    assert unknown_again == unknown and again.flat.tolist() == rows.flat.tolist()
    assert again.ends.tolist() == rows.ends.tolist()


def test_a_long_sentence_is_cut_and_no_word_is_lost() -> None:
    rows = Vocabulary(["a", "b"], np.array([2, 1])).encode([["a"] * (2 * MAX_SENTENCE + 7), ["b"]])[0]
    assert rows.lengths.tolist() == [MAX_SENTENCE, MAX_SENTENCE, 7, 1]
    assert len(rows.flat) == 2 * MAX_SENTENCE + 8 and rows[3].tolist() == [1]


def test_a_text_without_words_has_an_empty_vocabulary() -> None:
    vocabulary, rows, unknown = count_words([[], []], min_count=1)
    assert (len(vocabulary), len(rows), unknown) == (0, 0, 0)


def test_the_vocabulary_equals_gensims() -> None:
    """Apart from the order of words of equal count."""
    word2vec = pytest.importorskip("gensim.models.word2vec")
    rng = random.Random(1)
    sentences = [[f"w{int(rng.paretovariate(0.7))}" for _ in range(8)] for _ in range(200)]
    model = word2vec.Word2Vec(min_count=2, vector_size=4)
    model.build_vocab(sentences)
    ours = count_words(sentences, min_count=2)[0]
    assert {*ours.words} == {*model.wv.index_to_key}
    assert ours.counts.tolist() == [model.wv.get_vecattr(word, "count") for word in ours.words]
