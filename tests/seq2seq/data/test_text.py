"""Text in blocks: each token once in evaluation, shifted blocks in training, splits of a file, and refusals."""

import gzip
import pickle
import platform
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.config.check import build
from common.config.compose import configure
from common.data import batching
from common.errors import UserError
from common.train.data_identity import changes, fingerprints_of
from common.types import SPLITS
from seq2seq.data import text
from seq2seq.data.text import Text
from seq2seq.tokenizers.bpe import BOS
from seq2seq.tokenizers.characters import Characters

Built = Callable[..., Text]
WORDS = "zero one two three four five six seven eight nine".split()
CONTENT = "".join(f"{WORDS[n % 10]} {WORDS[n // 10 % 10]} {WORDS[n * n % 7]}\n" for n in range(300))


@pytest.fixture
def built(tmp_path: Path) -> Built:
    """Returns a function that makes the data of command-line keys, by default on CONTENT, with tokens in memory."""
    (tmp_path / "all.txt").write_text(CONTENT, encoding="utf-8")

    def make(*keys: str) -> Text:
        given = {key.partition("=")[0] for key in keys}
        defaults = {"data.train": tmp_path / "all.txt", "data.block": 16, "data.batch_size": 64, "data.cache": "null"}
        defaults = {key: value for key, value in defaults.items() if key not in given}
        config = configure("train", ["model=gpt", *(f"{key}={value}" for key, value in defaults.items()), *keys])
        data = build(config["data"])
        assert isinstance(data, Text)
        return data

    return make


def samples(data: Text, split: Any) -> list[dict[str, Any]]:
    return [data.sample(split, i, None) for i in range(data.count(split))]


def text_of(data: Text, ids: Any) -> str:
    return data.text_tokenizer().decode(np.asarray(ids).tolist())


@pytest.mark.parametrize("stride", ["null", 1, 5, 16])
@pytest.mark.parametrize("block", [1, 7, 16, 5000])
def test_each_token_of_val_and_test_is_predicted_once_from_the_stated_context(
    built: Built, block: int, stride: int | str
) -> None:
    if stride != "null" and int(stride) > block:
        pytest.skip("a stride above the block is refused")
    data = built(f"data.block={block}", f"data.stride={stride}", "data.batch_size=5000")
    for split in ("val", "test"):
        whole = data.tokens(split).tolist()
        predicted: list[int] = []
        for sample in samples(data, split):
            assert len(sample["tokens"]) == len(sample["targets"]) <= block
            new = len(sample["targets"]) - sample["first"]
            assert 0 < new <= data.evaluation_stride
            start = len(predicted) - sample["first"]  # of the window's targets
            assert sample["targets"].tolist() == whole[start : start + len(sample["targets"])]
            assert sample["tokens"].tolist() == [BOS, *whole][start : start + len(sample["targets"])]
            assert start == 0 or sample["first"] >= block - data.evaluation_stride
            predicted += sample["targets"][sample["first"] :].tolist()
        assert predicted == whole and len(data.cost(split)) == data.count(split)
    assert text_of(data, [*data.tokens("train"), *data.tokens("val"), *data.tokens("test")]) == CONTENT


def test_an_epoch_is_a_partition_into_blocks_that_begins_at_a_random_token(built: Built) -> None:
    data = built()
    whole, starts = data.tokens("train").tolist(), set()
    for seed in range(60):
        blocks = [data.epoch_sample("train", i, seed) for i in range(data.count("train"))]
        joined = [token for block in blocks for token in block["targets"].tolist()]
        start = next(s for s in range(16) if whole[s : s + len(joined)] == joined)
        assert {len(block["targets"]) for block in blocks} == {16} and len(joined) > len(whole) - 32
        assert [block["tokens"].tolist() for block in blocks[:1]] == [[BOS, *whole][start : start + 16]]
        assert all(block["first"] == 0 and block["tokens"][1:].tolist() == block["targets"][:-1].tolist()
                   for block in blocks)  # fmt: skip
        starts.add(start)
    assert len(starts) > 10
    again = data.epoch_sample("train", 3, 7)
    assert again["targets"].tolist() == data.epoch_sample("train", 3, 7)["targets"].tolist()


@pytest.mark.parametrize("length", [2, 15, 16, 17, 31, 32, 33])
def test_a_text_shorter_than_two_blocks_is_one_sample(built: Built, tmp_path: Path, length: int) -> None:
    (tmp_path / "short.txt").write_text("abcdefghijklmnopqrstuvwxyz0123456789"[: length - 1] + "\n")
    data = built(f"data.train={tmp_path / 'short.txt'}", "data.val_share=0", "data.test_share=0")
    assert len(data.tokens("train")) == length and data.count("train") == 1 and data.count("val") == 0
    assert data.cost("train").tolist() == [min(16, length)] and len(data.cost("val")) == 0
    for seed in range(20):
        sample = data.epoch_sample("train", 0, seed)
        assert len(sample["targets"]) == len(sample["tokens"]) == min(16, length)


def test_the_trainer_sees_the_same_blocks_with_and_without_workers(built: Built) -> None:
    data = built()
    order = batching.Order(data.cost("train"), data.batch_size, 3)
    keys: dict[str, Any] = {"micro_batch": None, "rank": 0, "world": 1, "pin": False}
    stop = order.steps(2)
    runs = [[*batching.steps(data, order, start=0, stop=stop, workers=n, **keys)] for n in (0, 2)]
    for (_, mine), (_, theirs) in zip(*runs, strict=True):
        assert torch.equal(mine[0]["targets"], theirs[0]["targets"])
    epochs = [torch.cat([b[0]["targets"].flatten() for e, b in runs[0] if e == epoch]) for epoch in (0, 1)]
    counts = [torch.bincount(tokens, minlength=data.text_tokenizer().size) for tokens in epochs]
    assert not torch.equal(*counts), "the phases of two epochs differ, so other tokens are left out at the ends"


def test_a_batch_is_padded_and_counts_real_targets_only(built: Built) -> None:
    data = built("data.stride=4")
    batch = data.collate([data.sample("val", i, None) for i in (0, 5)])
    assert batch["tokens"].shape == batch["targets"].shape == batch["counts"].shape == (2, 16)
    assert batch["tokens"].dtype == torch.int64 and batch["ids"] == [0, 5]
    assert batch["counts"].int().tolist() == [[1] * 4 + [0] * 12, [0] * 12 + [1] * 4]
    assert batch["tokens"][0, 4:].tolist() == [0] * 12


def test_the_end_of_the_file_is_val_and_test_and_cuts_are_at_line_ends(built: Built) -> None:
    data = built("data.val_share=0.2", "data.test_share=0.1")
    texts = [text_of(data, data.tokens(split)) for split in SPLITS]
    assert "".join(texts) == CONTENT and all(part.endswith("\n") for part in texts)
    shares = [len(part) / len(CONTENT) for part in texts]
    assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.01)  # a line is 0.3 %
    default = [len(built().tokens(split)) / len(CONTENT) for split in SPLITS]
    assert default == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    none = built("data.val_share=0", "data.test_share=0")
    assert text_of(none, none.tokens("train")) == CONTENT and none.count("val") == none.count("test") == 0


def test_the_default_share_of_a_long_file_is_limited(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_DEFAULT_BYTES", 100)
    sizes = [len(built().tokens(split)) for split in SPLITS]
    assert sizes[1] <= 100 and sizes[2] <= 100 and sum(sizes) == len(CONTENT)


def test_one_long_line_is_cut_at_spaces(built: Built, tmp_path: Path) -> None:
    (tmp_path / "line.txt").write_text("word " * 40_000)
    data = built(f"data.train={tmp_path / 'line.txt'}")
    assert all(data.count(split) for split in SPLITS)
    assert text_of(data, data.tokens("test")).startswith(" word")
    assert sum(len(data.tokens(split)) for split in SPLITS) == 200_001, "with the line feed that the file lacks"


def test_files_of_splits_are_read_whole_and_others_are_not_opened(built: Built, tmp_path: Path) -> None:
    (tmp_path / "a test.txt.gz").write_bytes(gzip.compress(b"only for testing\n"))
    (tmp_path / "part 1.txt").write_text("first\n")
    (tmp_path / "part 2.txt").write_text("second")
    keys = [f"data.test={tmp_path / 'a test.txt.gz'}", f"data.val={tmp_path}/part ?.txt"]
    data = built(*keys)
    assert text_of(data, data.tokens("train")) == CONTENT
    assert text_of(data, data.tokens("val")).count("\ufffd") == data.amounts("val").unknown
    assert data.amounts("val").characters == len("first\nsecond\n")
    evaluated = built(*keys, f"data.train={tmp_path / 'missing.txt'}")
    evaluated.use(data.text_tokenizer())
    assert evaluated.count("test") == 3 and evaluated.split_summary("test")
    with pytest.raises(UserError, match="There is no file"):
        evaluated.count("train")


def test_unknown_characters_are_counted_and_the_vocabulary_is_that_of_train(built: Built, tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("zero ß好\n", encoding="utf-8")
    data = built(f"data.val={tmp_path / 'val.txt'}", "data.test_share=0")
    assert data.amounts("val") == (8, 8, 11, 2) and data.amounts("train").unknown == 0
    assert "2 tokens are outside the vocabulary" in "\n".join(data.summary())
    assert data.text_tokenizer().size == 4 + len({*CONTENT})


def test_the_default_text_is_pythons_documentation(built: Built) -> None:
    data = built("data.train=null", "data.block=64")
    amounts = {split: data.amounts(split) for split in SPLITS}
    assert amounts["train"].bytes_ >= 500_000 and amounts["val"].tokens and amounts["test"].tokens
    assert platform.python_version() in "\n".join(data.summary())
    assert data.fingerprint("test")["Python version"] == platform.python_version()
    assert "documentation" in data.where("train", 3)


def test_bpe_tokenizes_the_same_text_and_its_splits_join(built: Built) -> None:
    keys = ["data.tokenizer.kind=bpe", "data.tokenizer.vocabulary=290"]
    data = built(*keys)
    assert sum(data.amounts(split).characters for split in SPLITS) == len(CONTENT)
    assert text_of(data, data.tokens("train")) == CONTENT[: data.amounts("train").characters]
    assert data.amounts("train").tokens < 0.6 * data.amounts("train").characters
    assert data.text_tokenizer().state() == built(*keys).text_tokenizer().state()


def test_tokens_in_a_folder_are_those_in_memory_and_are_written_once(built: Built, tmp_path: Path) -> None:
    keys = [f"data.cache={tmp_path / 'tokens'}"]
    data = built(*keys)
    assert all(np.array_equal(data.tokens(split), built().tokens(split)) for split in SPLITS)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").iterdir()}
    assert len(files) == 3 and str(tmp_path / "tokens") in "\n".join(data.summary())
    built(*keys).summary()
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").iterdir()}
    copy = pickle.loads(pickle.dumps(data))
    assert copy.sample("val", 1, None)["targets"].tolist() == data.sample("val", 1, None)["targets"].tolist()
    assert len(pickle.dumps(data)) < 5000, "the text is not part of what a spawned worker receives"


def test_another_text_has_another_fingerprint(built: Built, tmp_path: Path) -> None:
    before = fingerprints_of(built())
    assert changes(before, fingerprints_of(built("data.block=8"))) == []
    (tmp_path / "all.txt").write_text(CONTENT[:-4] + "one\n")
    assert changes(before, fingerprints_of(built())) == ["the text of test differ"]


def test_a_checkpoints_tokenizer_replaces_that_of_the_data(built: Built) -> None:
    data = built()
    data.count("train")
    other = Characters.train(["none"], data.tokenizer)
    data.use(other)
    assert data.text_tokenizer() is other and data.amounts("train").unknown > 0
    assert data.encode("one") == other.encode("one")


def test_mistakes_are_named(built: Built, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.block=65 is more than data.batch_size=64"):
        built("data.block=65")
    with pytest.raises(UserError, match=r"data.stride=17 is more than data.block=16"):
        built("data.stride=17")
    with pytest.raises(UserError, match="no file matches this pattern"):
        built(f"data.train={tmp_path}/*.md").count("train")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match="there is no text"):
        built(f"data.train={tmp_path / 'empty.txt'}").count("train")
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    with pytest.raises(UserError, match="line 1 is not valid UTF-8"):
        built(f"data.train={tmp_path / 'latin.txt'}").count("train")
    with pytest.raises(UserError, match="leave nothing of its"):
        built("data.val_share=0.9", "data.test_share=0.9").count("train")


@pytest.mark.slow
def test_ten_million_blocks_cost_no_list(tmp_path: Path) -> None:
    """Blocks of one token; their costs take 8 bytes together."""
    (tmp_path / "long.txt").write_bytes(b"abcdefgh\n" * 1_200_000)
    keys = [f"data.train={tmp_path / 'long.txt'}", "data.block=1", "data.val_share=0", "data.test_share=0"]
    config = configure("train", ["model=gpt", *keys, "data.batch_size=100000", f"data.cache={tmp_path}"])
    data = build(config["data"])
    assert data.count("train") > 10_000_000
    costs = data.cost("train")
    assert costs.strides == (0,) and len(costs) == data.count("train")
    tracemalloc.start()
    order = batching.Order(costs, data.batch_size, 0)
    assert order.steps(1) == data.count("train") // 100_000
    assert len(next(order.after(0))[1]) == 100_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6  # an order is an array of 43 MB; lists of 9 million samples took 1.1 GiB


def test_a_text_with_lines_longer_than_val_and_test_has_both_of_about_their_share(built: Built, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("\n".join(["ab cd " * 2000] * 3 + ["the end"]) + "\n", encoding="utf-8")
    data = built(f"data.train={tmp_path / 'long.txt'}")
    counts = [data.amounts(split).bytes_ for split in SPLITS]
    assert sum(counts) == (tmp_path / "long.txt").stat().st_size
    assert all(count == pytest.approx(0.1 * sum(counts), rel=0.5) for count in counts[1:])


def test_without_val_no_part_of_train_is_also_in_test(built: Built, tmp_path: Path) -> None:
    content = "a" * 20_000 + "b" * 40_000 + " " + "c" * 60_000 + "\nd\n"
    (tmp_path / "long.txt").write_text(content, encoding="utf-8")
    data = built(f"data.train={tmp_path / 'long.txt'}", "data.val_share=0", "data.test_share=0.55")
    assert sum(data.amounts(split).bytes_ for split in SPLITS) == len(content)
