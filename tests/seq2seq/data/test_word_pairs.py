"""Windows against plain loops, subsampling against its formula and gensim, and which passages are which split."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.machine.seeds import generator
from seq2seq.data import docstrings
from seq2seq.data.word_pairs import WordPairs, held_out, keep_probabilities, passage_bounds, windows
from seq2seq.tokenizers.text import Ragged
from seq2seq.tokenizers.words import WordOptions

OPTIONS = WordOptions(split="spaces", lowercase=False, min_count=1)


def data(**changes: Any) -> WordPairs:
    values: dict[str, Any] = {"train": None, "val": None, "test": None, "words": OPTIONS}
    values |= {"window": 3, "subsample": 0.0, "passage": 20, "batch_size": 1}
    return WordPairs(**{**values, **changes})


def ragged(sentences: list[list[int]]) -> Ragged:
    ends = np.cumsum([len(sentence) for sentence in sentences])
    starts = ends - [len(sentence) for sentence in sentences]
    return Ragged(np.array([word for sentence in sentences for word in sentence], np.int32), starts, ends)


def write(path: Path, sentences: int, seed: int = 0) -> Path:
    """Sentences of 1 to 9 of 30 words, one per line."""
    rng = np.random.default_rng(seed)
    path.write_text(
        "".join(" ".join(f"w{i}" for i in rng.integers(0, 30, n)) + "\n" for n in rng.integers(1, 10, sentences))
    )
    return path


SENTENCES = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7], [9, 3]]


def test_windows_equal_those_of_a_plain_loop() -> None:
    """The random numbers are those of `windows`: one for each word, then the reach of each kept word."""
    keep = np.linspace(0.3, 1.0, 10)
    drawn = windows(ragged(SENTENCES), keep, 3, generator("test"))
    random = generator("test")
    uniform = torch.rand(16, generator=random, dtype=torch.float64).tolist()
    kept = [[word for word in sentence if uniform.pop(0) < keep[word]] for sentence in SENTENCES]
    count = sum(map(len, kept))
    assert 4 < count < 16, "some words are left out"
    reach = torch.randint(1, 4, (count,), generator=random).tolist()
    expected = []
    for sentence in kept:
        for position, word in enumerate(sentence):
            own = reach.pop(0)
            left = len([i for i in range(position) if i >= position - own])
            right = len([i for i in range(position + 1, len(sentence)) if i <= position + own])
            expected.append((word, left, right))
    assert list(zip(*(part.tolist() for part in drawn), strict=True)) == expected


def test_sentences_may_lie_anywhere_in_memory() -> None:
    rows = ragged([*SENTENCES, [7, 7, 7]])
    part = rows.take(np.array([2, 0]))
    drawn = windows(part, np.ones(10), 3, generator("test"))
    assert drawn.words.tolist() == SENTENCES[2] + SENTENCES[0]
    assert drawn.left[8] == 0 and drawn.right[7] == 0, "a window ends with its sentence"


def test_the_reach_is_uniform_from_one_to_the_window() -> None:
    drawn = windows(ragged([[0] * 30_000]), np.ones(1), 5, generator("test"))
    shares = torch.bincount(drawn.left[5:-5], minlength=7) / len(drawn.left)
    # five standard deviations of a share of 30,000 draws are 0.012
    assert shares[1:6].tolist() == pytest.approx([0.2] * 5, abs=0.012) and shares[0] == shares[6] == 0
    assert torch.equal(drawn.left[5:-5], drawn.right[5:-5])


def test_a_passage_without_a_kept_word_is_empty() -> None:
    drawn = windows(ragged([[0, 0], [0]]), np.zeros(1), 3, generator("test"))
    assert [len(part) for part in drawn] == [0, 0, 0]


def test_words_are_kept_as_often_as_in_word2vec() -> None:
    """word2vec.c: (sqrt(count / (t * total)) + 1) * (t * total) / count, written out for each word."""
    counts, t = np.array([5000, 900, 90, 7, 3]), 1e-2
    expected = [min(1.0, ((n / (t * 6000)) ** 0.5 + 1) * (t * 6000) / n) for n in counts.tolist()]
    assert keep_probabilities(counts, t).tolist() == pytest.approx(expected, rel=1e-12)
    assert expected[0] < 0.2 and expected[-1] == 1.0
    assert keep_probabilities(counts, 0.0).tolist() == [1.0] * 5


def test_words_are_kept_as_often_as_in_gensim() -> None:
    """Its probabilities are integers out of 2^32, stored for each word."""
    word2vec = pytest.importorskip("gensim.models.word2vec")
    sentences = [["the"] * 60 + ["cat"] * 9 + ["sat"] * 2, ["the", "mat"]]
    model = word2vec.Word2Vec(sentences, min_count=1, sample=0.05, vector_size=4)
    theirs = np.array([model.wv.get_vecattr(word, "sample_int") for word in model.wv.index_to_key]) / 2.0**32
    counts = np.array([model.wv.get_vecattr(word, "count") for word in model.wv.index_to_key])
    np.testing.assert_allclose(keep_probabilities(counts, 0.05), np.minimum(theirs, 1.0), atol=1e-8)


def test_passages_hold_whole_sentences_and_each_sentence_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 12, 200)
    bounds = passage_bounds(lengths, 20)
    assert bounds[0] == 0 and bounds[-1] == 200 and (np.diff(bounds) > 0).all()
    words = np.add.reduceat(lengths, bounds[:-1])
    assert (words[:-1] > 20 - 12).all() and (words < 20 + 12).all()
    assert passage_bounds(np.array([50, 30, 50]), 20).tolist() == [0, 1, 2, 3], "no passage is empty"


def test_val_and_test_are_cut_from_train_and_share_no_passage() -> None:
    parts = held_out(np.arange(100), ["val", "test"])
    assert sorted(np.concatenate([*parts.values()]).tolist()) == list(range(100))
    assert [len(part) for part in parts.values()] == [90, 5, 5]
    assert [*held_out(np.arange(100), []).keys()] == ["train"]


def test_a_sample_depends_on_its_generator_and_on_nothing_else(tmp_path: Path) -> None:
    keys = {"train": str(write(tmp_path / "text", 300)), "subsample": 0.02}
    first, second = data(**keys), data(**keys)
    second.sample("train", 0, generator(9))
    for i in (0, 3):
        a, b = first.sample("train", i, generator(i)), second.sample("train", i, generator(i))
        assert all(torch.equal(a[name], b[name]) for name in ("words", "left", "right"))
    assert len({tuple(first.sample("train", 0, generator(i))["left"].tolist()) for i in range(3)}) == 3
    fixed = [first.sample("val", 0, None)["left"] for _ in range(2)]
    assert torch.equal(*fixed), "evaluation samples the same windows each time"


def test_a_batch_holds_its_passages_one_after_the_other(tmp_path: Path) -> None:
    words = data(train=str(write(tmp_path / "text", 300)))
    samples = [words.sample("train", i, generator(i)) for i in (2, 0)]
    batch = words.collate(samples)
    assert batch["ids"] == [2, 0] and batch["lengths"].tolist() == [len(sample["words"]) for sample in samples]
    assert torch.equal(batch["right"], torch.cat([sample["right"] for sample in samples]))


def test_all_words_of_the_files_are_in_the_splits(tmp_path: Path) -> None:
    train, val = write(tmp_path / "train", 400), write(tmp_path / "val", 50, seed=1)
    words = data(train=str(train), val=str(val))
    read = {
        split: [words.vocabulary.words[i] for n in range(words.count(split)) for i in flat(words.indices(split, n))]
        for split in ("train", "val", "test")
    }
    assert read["val"] == val.read_text().split()
    assert sorted(read["train"] + read["test"]) == sorted(train.read_text().split()) and read["test"]


def flat(rows: Ragged) -> list[int]:
    return [int(word) for i in range(len(rows)) for word in rows[i]]


def test_words_of_val_that_are_not_in_train_are_left_out(tmp_path: Path) -> None:
    train, val = write(tmp_path / "train", 100), tmp_path / "val"
    val.write_text("w1 unheard w2\nunheard\n")
    words = data(train=str(train), val=str(val))
    assert [words.vocabulary.words[i] for i in flat(words.indices("val", 0))] == ["w1", "w2"]
    assert "2 unknown words are left out" in words.split_summary("val")[0]


def test_a_file_without_a_known_word_is_refused(tmp_path: Path) -> None:
    val = tmp_path / "val"
    val.write_text("unheard words\n")
    words = data(train=str(write(tmp_path / "train", 100)), val=str(val))
    with pytest.raises(UserError, match=r"none of the 2 words of .*val is in the vocabulary"):
        words.count("val")


def test_a_pattern_names_several_files_and_a_file_without_line_ends_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", 20), write(tmp_path / "b.txt", 20)
    (tmp_path / "c.txt").write_text("w1 w2 " * 3000)  # as text8: one line
    words = data(train=str(tmp_path / "*.txt"), passage=500)
    expected = sum(len(path.read_text().split()) for path in tmp_path.iterdir())
    assert int(words.vocabulary.counts.sum()) == expected
    assert words.count("train") >= 6


def test_without_files_the_words_are_pythons_documentation() -> None:
    words = data(words=WordOptions(split="letters", lowercase=True, min_count=5), passage=2000, subsample=1e-3)
    assert all(words.count(split) > 0 for split in ("train", "val", "test"))
    text = " ".join(docstrings.docstrings("train")).lower()
    assert set(words.vocabulary.words[:300]) & {"the", "is", "return"} and words.vocabulary.words[0] in text
    assert docstrings.origin() in words.summary()[0]


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"val": "x"}, "data.val=x, but data.train=null"),
        ({"train": "missing.txt"}, "There is no file"),
        ({"train": "missing*.txt"}, "no file matches"),
    ],
)
def test_a_mistake_is_one_sentence(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        data(**keys).count("train")


def test_a_text_without_two_words_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("one one one\n")
    with pytest.raises(UserError, match="1 words that occur at least 1 times, and word vectors need two"):
        data(train=str(tmp_path / "text")).count("train")


def test_the_fingerprint_follows_the_words(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one", 100), write(tmp_path / "other", 100, seed=1)
    copy = tmp_path / "copy"
    copy.write_bytes(one.read_bytes())
    prints = [data(train=str(path)).fingerprint("train") for path in (one, copy, other)]
    assert prints[0] == prints[1] != prints[2]
