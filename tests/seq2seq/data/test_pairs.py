"""Sentence pairs: only train is cleaned, tokenizers learn from train only, and batches have the counted tokens."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.data import batching
from common.errors import UserError
from common.task import Split
from seq2seq.data.pairs import EMPTY_CORPUS, Corpus, SentencePairs
from seq2seq.tokenizers.bpe import BOS, EOS, PAD, Tokenizer, TokenizerOptions
from seq2seq.tokenizers.text import Lines

Pair = tuple[str, str]
WORDS = [("one", "eins"), ("two", "zwei"), ("three", "drei"), ("house", "Haus"), ("garden", "Garten"), ("old", "alt")]


def random_pairs(count: int, seed: int) -> list[Pair]:
    """Sentences of 1 to 9 words, translated word for word."""
    rng = np.random.default_rng(seed)
    sentences = [rng.integers(len(WORDS), size=rng.integers(1, 10)) for _ in range(count)]
    return [(" ".join(WORDS[i][0] for i in words), " ".join(WORDS[i][1] for i in words)) for words in sentences]


class Toy(SentencePairs):
    """Pairs from a list for each split."""

    def __init__(self, splits: dict[Split, list[Pair]], categories: list[str] | None = None, **changes: Any):
        options: dict[str, Any] = {"kind": "bpe", "pieces": "bytes", "vocabulary": 290, "joint": True, "coverage": 1.0}
        options |= {"single_digits": True, "byte_fallback": True, "normalization": "none", "lowercase": False}
        options |= {key: changes.pop(key) for key in {*changes} & {*options}}
        keys: dict[str, Any] = {"source": "en", "target": "de", "longest": 64, "too_long": "skip", "batch_size": 256}
        super().__init__(tokenizer=TokenizerOptions(**options), **keys | changes)
        self.splits, self.loaded, self.pair_categories = splits, list[Split](), categories

    def load(self, split: Split) -> dict[Split, Corpus]:
        self.loaded.append(split)
        if split not in self.splits:
            return {split: EMPTY_CORPUS}
        sides = (Lines.of([pair[side] for pair in self.splits[split]]) for side in (0, 1))
        return {split: Corpus(*sides, "a list", self.pair_categories if split == "train" else None)}


TRAIN, VAL = random_pairs(60, 0), random_pairs(9, 1)


def texts(batch: dict[str, Any]) -> list[Pair]:
    return list(zip(batch["source_texts"], batch["target_texts"], strict=True))


def batch_of(data: SentencePairs, split: Split, *indices: int) -> dict[str, Any]:
    return data.collate([data.sample(split, i, None) for i in indices])


def test_the_constructor_loads_nothing_and_each_split_is_loaded_once() -> None:
    data = Toy({"train": TRAIN, "val": VAL})
    assert data.loaded == []
    data.summary()
    assert [data.count(split) for split in ("train", "val", "test")] == [60, 9, 0]
    assert sorted(data.loaded) == ["test", "train", "val"]
    assert data.pairs("train") == TRAIN and data.pairs("val") == VAL and data.pairs("test") == []


def test_a_sample_has_its_text_and_ids_that_end_with_eos() -> None:
    data = Toy({"train": TRAIN, "val": VAL})
    source, target = data.tokenizers()
    sample = data.sample("val", 4, None)
    assert sample["id"] == 4 and (sample["source_text"], sample["target_text"]) == VAL[4]
    assert sample["source"] == [*source.encode(VAL[4][0]), EOS] and type(sample["source"]) is list
    assert sample["target"] == [*target.encode(VAL[4][1]), EOS]


def test_a_batch_is_padded_on_the_right_and_its_target_is_shifted_by_one() -> None:
    data = Toy({"train": [*TRAIN, ("a", "b")], "val": VAL})
    indices = (3, 60, 7)
    batch = batch_of(data, "train", *indices)
    samples = [data.sample("train", i, None) for i in indices]
    assert batch["ids"] == [3, 60, 7] and texts(batch) == [data.pairs("train")[i] for i in indices]
    for key in ("source", "target_in", "target_out"):
        assert batch[key].dtype == torch.int64 and len(batch[key]) == 3
    for side, key in (("source", "source"), ("target", "target_out")):
        lengths = [len(sample[side]) for sample in samples]
        assert batch[f"{side}_lengths"].tolist() == lengths and batch[key].shape[1] == max(lengths)
        for sample, padded, length in zip(samples, batch[key].tolist(), lengths, strict=True):
            assert padded == sample[side] + [PAD] * (max(lengths) - length) and padded[length - 1] == EOS
    for row_in, row_out, length in zip(batch["target_in"], batch["target_out"], batch["target_lengths"], strict=True):
        assert row_in[0] == BOS and row_in[1:length].tolist() == row_out[: length - 1].tolist()
        assert EOS not in row_in and not row_in[length:].any() and not row_out[length:].any()


def test_a_users_line_is_a_sample_without_a_target() -> None:
    data = Toy({"train": TRAIN})
    line = "old " * 100
    view = data.view(line)
    assert view["source"] == [*data.tokenizers()[0].encode(line), EOS] and view["source_text"] == line
    batch = data.collate([view, data.view("")])
    assert batch["source_lengths"].tolist() == [len(view["source"]), 1] and batch["source"][1, 0] == EOS
    assert not {*batch} & {"target_in", "target_out", "target_lengths", "target_texts"}


@pytest.mark.parametrize("too_long", ["truncate", "skip"])
def test_the_padded_tokens_of_a_batch_are_those_that_were_counted(too_long: str) -> None:
    """Sentences times the longest of source and target, for steps, micro-batches and evaluation."""
    data = Toy({"train": random_pairs(300, 2), "val": VAL}, too_long=too_long, longest=8, batch_size=70)
    costs = data.cost("train")
    assert len(costs) == data.count("train") and max(costs) == 8
    for micro_batch in (None, 20):
        order = batching.Order(costs, data.batch_size, 0)
        keys: dict[str, Any] = {"start": 0, "stop": 12, "rank": 0, "world": 1, "workers": 0, "pin": False}
        largest = 0
        for _, batches in batching.steps(data, order, micro_batch=micro_batch, **keys):
            for batch in batches:
                counted = len(batch["ids"]) * max(costs[i] for i in batch["ids"])
                width = max(batch["source"].shape[1], batch["target_out"].shape[1])
                assert batch["target_in"].shape == batch["target_out"].shape
                assert len(batch["ids"]) * width == counted <= (micro_batch or 70)
                largest = max(largest, counted)
        assert largest > 0.7 * (micro_batch or 70), "batches are filled"
    for batch in batching.evaluation(data, "val", batch_size=70, rank=0, world=1, workers=0):
        width = max(batch["source"].shape[1], batch["target_out"].shape[1])
        assert width == max(data.cost("val")[i] for i in batch["ids"])


def test_a_sentence_limit_above_the_batch_size_is_refused() -> None:
    with pytest.raises(UserError, match=r"data.longest=300 is more than data.batch_size=256, both in tokens"):
        Toy({}, longest=300)


def test_pairs_with_an_empty_side_are_left_out_of_train_only() -> None:
    with_empty = [("", "leer"), ("empty", " \t"), ("", ""), ("two", "zwei")]
    data = Toy({"train": [*TRAIN, *with_empty], "val": with_empty, "test": with_empty})
    assert data.pairs("train") == [*TRAIN, with_empty[3]] and data.pairs("val") == with_empty == data.pairs("test")
    assert data.count("val") == 4 and data.sample("val", 2, None)["source"] == [EOS]
    assert batch_of(data, "test", 2)["target_in"].tolist() == [[BOS]]
    summary = data.summary()
    assert "train: 3 pairs with an empty side left out" in summary
    for split in ("val", "test"):
        assert f"{split}: 2 empty en lines, kept" in summary
        assert f"{split}: 2 empty de lines, kept" in summary
    assert not [line for line in Toy({"train": TRAIN, "val": VAL}).summary() if "empty" in line]


def test_a_train_without_complete_pairs_is_refused() -> None:
    with pytest.raises(UserError, match="No training pair is left of a list: each of 2 has an empty side"):
        Toy({"train": [("", "a"), ("b", "")]}).count("train")
    with pytest.raises(UserError, match="each is longer than 2 tokens"):
        Toy({"train": random_pairs(50, 0)}, longest=2, vocabulary=262).count("train")


LONG = ("one " * 40).strip(), "eins"


def test_long_training_pairs_are_left_out_and_counted() -> None:
    data = Toy({"train": [LONG, *TRAIN, LONG[::-1]], "val": [LONG]}, longest=30)
    assert data.pairs("train") == TRAIN and max(data.cost("train")) <= 30
    assert "train: 2 pairs longer than 30 tokens (data.longest) left out" in data.summary()
    assert data.pairs("val") == [LONG] and data.cost("val")[0] == len(data.sample("val", 0, None)["source"]) > 30


def test_long_training_sides_are_truncated_and_counted() -> None:
    long_pair = (LONG[0], LONG[0])
    data = Toy({"train": [LONG, *TRAIN, long_pair], "val": [LONG]}, longest=30, too_long="truncate")
    first, last = data.sample("train", 0, None), data.sample("train", 61, None)
    ids = data.tokenizers()[0].encode(LONG[0])
    assert first["source"] == [*ids[:29], EOS] == last["target"] and len(first["target"]) < 30
    assert first["source_text"] == LONG[0] and data.pairs("train")[0] == LONG
    assert data.cost("train")[0] == 30 == max(data.cost("train"))
    assert "train: 3 sides longer than 30 tokens (data.longest) truncated, in 2 pairs" in data.summary()
    assert data.sample("val", 0, None)["source"] == [*ids, EOS] and [*data.cost("val")] == [len(ids) + 1]


def test_sides_at_the_limit_are_neither_truncated_nor_left_out() -> None:
    longest = max(Toy({"train": TRAIN}).cost("train"))
    for too_long in ("truncate", "skip"):
        data = Toy({"train": TRAIN}, longest=longest, too_long=too_long)
        assert data.count("train") == 60 and not [line for line in data.summary() if "longer" in line]


def test_tokenizers_learn_from_train_only() -> None:
    data = Toy({"train": TRAIN, "val": VAL})
    other_val = Toy({"train": TRAIN, "val": [("xyz " * 50, "qqq " * 50)] * 50})
    assert data.tokenizers()[0].state() == other_val.tokenizers()[0].state()
    other_train = Toy({"train": [*TRAIN, *[("xyz xyz", "qqq qqq")] * 50], "val": VAL})
    assert data.tokenizers()[0].state() != other_train.tokenizers()[0].state()


def test_a_joint_tokenizer_is_one_object_and_separate_ones_learn_their_language() -> None:
    joint, separate = Toy({"train": TRAIN}), Toy({"train": TRAIN}, joint=False, vocabulary=275)
    source, target = joint.tokenizers()
    assert source is target and source.encode("Garten") and joint.summary()[0].endswith("290 entries for both")
    source, target = separate.tokenizers()
    assert len(source.encode("garden")) < len(target.encode("garden"))
    assert len(target.encode("Garten")) < len(source.encode("Garten"))
    assert separate.sample("train", 0, None)["target"][:-1] == target.encode(TRAIN[0][1])
    assert separate.summary()[0] == "en -> de; bpe from bytes, 275 + 275 entries"
    with pytest.raises(UserError, match="the training text in en gives no more than"):
        Toy({"train": TRAIN}, joint=False, vocabulary=5000).tokenizers()


def test_a_checkpoints_tokenizers_replace_those_of_the_data() -> None:
    """With them, a split and a line can be encoded without the training text."""
    trained = Toy({"train": TRAIN}).tokenizers()
    data = Toy({"val": VAL})
    data.use(*(Tokenizer.restore(tokenizer.state()) for tokenizer in trained))
    assert data.sample("val", 0, None)["source"] == [*trained[0].encode(VAL[0][0]), EOS]
    assert data.view("old")["source"] == [*trained[0].encode("old"), EOS]
    assert data.count("val") == 9 and data.loaded == ["val"]
    data = Toy({"train": TRAIN}, vocabulary=262)
    ids_before = data.sample("train", 0, None)["source"]
    data.use(*trained)
    assert len(data.sample("train", 0, None)["source"]) < len(ids_before), (
        "the ids of the first tokenizer are discarded"
    )


def test_categories_follow_their_pairs() -> None:
    categories = [f"category {i}" for i in range(62)]
    data = Toy({"train": [("", ""), *TRAIN, LONG], "val": VAL}, categories=categories, longest=30)
    assert data.categories("train") == categories[1:61] and data.categories("val") is None


def test_the_summary_counts_the_sentences_that_normalisation_changes() -> None:
    decomposed = [*TRAIN, ("cafe\u0301", "Cafe\u0301"), ("½", "halb")]
    summary = Toy({"train": decomposed}, normalization="nfc").summary()
    assert "train: normalization=nfc lowercase=false changes 1 en sentence before encoding" in summary
    summary = Toy({"train": decomposed}, normalization="nfkc").summary()
    assert "train: normalization=nfkc lowercase=false changes 2 en sentences before encoding" in summary
    assert not [line for line in Toy({"train": decomposed}).summary() if "changes" in line]


def test_workers_give_the_same_batches() -> None:
    data = Toy({"train": TRAIN, "val": VAL})
    results = []
    for workers in (0, 2):
        batches = batching.evaluation(data, "val", batch_size=40, rank=0, world=1, workers=workers)
        results.append([(batch["ids"], batch["source"].tolist(), texts(batch)) for batch in batches])
    assert results[0] == results[1] and len(results[0]) > 1
    copy = pickle.loads(pickle.dumps(data))  # what spawned workers receive
    assert copy.sample("train", 5, None) == data.sample("train", 5, None)


def test_a_teachers_translations_replace_train_and_leave_val_and_test_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "distilled.tsv").write_text("one two\teins zwei\nold house\taltes Haus\n\told\n")
    splits: dict[Split, list[Pair]] = {"train": random_pairs(20, 0), "val": random_pairs(5, 1), "test": []}
    plain, distilled = (
        Toy(splits),
        Toy(splits, vocabulary=262, distilled=str(tmp_path / "distilled.tsv")),
    )
    assert distilled.pairs("train") == [("one two", "eins zwei"), ("old house", "altes Haus")]
    assert distilled.pairs("val") == plain.pairs("val") and distilled.count("test") == 0
    assert distilled.fingerprint("val") == plain.fingerprint("val")
    assert distilled.fingerprint("train") != plain.fingerprint("train")
    line = next(line for line in distilled.summary() if line.startswith("train: translations"))
    assert line == "train: translations of a teacher (data.distilled)"
    missing = Toy(splits, vocabulary=262, distilled=str(tmp_path / "missing.tsv"))
    with pytest.raises(UserError, match=r"missing\.tsv"):
        missing.count("train")


def test_translations_of_val_are_refused_without_a_train_of_the_data_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "distilled.tsv").write_text("shared\tgeteilt\n")
    data = Toy({"val": [("shared", "y")], "test": []}, vocabulary=262, distilled=str(tmp_path / "distilled.tsv"))
    load = data.load

    def without_train(split: Split) -> dict[Split, Corpus]:
        if split == "train":
            raise UserError("There is no training text.")
        return load(split)

    monkeypatch.setattr(data, "load", without_train)
    with pytest.raises(UserError, match=r"sources of val or test that are not in train \(1, such as 'shared'\)"):
        data.count("train")


def test_a_teachers_translations_of_val_or_test_are_refused_unless_train_has_them_too(tmp_path: Path) -> None:
    file = tmp_path / "distilled.tsv"
    file.write_text("shared\tgeteilt\nseen\tgesehen\nheld out\tverdeckt\n \tleer\n")
    splits: dict[Split, list[Pair]] = {
        "train": [("shared", "x")],
        "val": [("shared", "y"), (" ", "y")],
        "test": [("new", "z")],
    }
    assert Toy(splits, vocabulary=262, distilled=str(file)).count("train") == 3
    held_out: tuple[Split, ...] = ("val", "test")
    for split in held_out:
        leaking: dict[Split, list[Pair]] = {**splits, split: [*splits[split], ("held\tout", "y")]}
        with pytest.raises(UserError, match=r"sources of val or test that are not in train \(1, such as 'held out'\)"):
            Toy(leaking, vocabulary=262, distilled=str(file)).count("train")
