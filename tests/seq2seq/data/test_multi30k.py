"""Multi30k: the real files if they exist, and small ones of the same layout for mistakes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from seq2seq.data.multi30k import Multi30k
from seq2seq.tokenizers.bpe import TokenizerOptions


def multi30k(root: Path, **changes: Any) -> Multi30k:
    options: dict[str, Any] = {"kind": "bpe", "pieces": "characters", "vocabulary": 2000, "joint": True}
    options |= {"single_digits": True, "coverage": 1.0, "byte_fallback": True, "normalization": "none"}
    keys: dict[str, Any] = {"root": str(root), "test": "test_2016_flickr", "source": "en", "target": "de"}
    keys |= {"longest": 128, "too_long": "truncate", "batch_size": 4096}
    return Multi30k(tokenizer=TokenizerOptions(**options, lowercase=False), **keys | changes)


def test_any_two_languages_have_the_published_splits(real_data: Callable[[str], Path]) -> None:
    """29,000, 1,014 and 1,000 lines (Elliott et al. 2016); the first line is that of the files."""
    root = real_data("multi30k_task1")
    data = multi30k(root)
    assert [data.count(split) for split in ("train", "val", "test")] == [29000, 1014, 1000]
    assert data.pairs("train")[0] == (
        "Two young, White males are outside near many bushes.",
        "Zwei junge weiße Männer sind im Freien in der Nähe vieler Büsche.",
    )
    czech = multi30k(root, source="cs", target="fr")
    assert len(czech.pairs("test")) == 1000
    assert czech.pairs("val")[0][1] == multi30k(root, source="fr").pairs("val")[0][0]


def test_real_sentences_are_reversible_and_cost_their_tokens(real_data: Callable[[str], Path]) -> None:
    data = multi30k(real_data("multi30k_task1"))
    source, target = data.tokenizers()
    assert source is target and source.size == 2000
    pairs, costs = data.pairs("test"), data.cost("test")
    for i, pair in enumerate(pairs):
        ids = [source.encode(text) for text in pair]
        assert tuple(map(source.decode, ids)) == pair and costs[i] == max(map(len, ids)) + 1
    assert data.summary()[1].startswith("train: 29,000 pairs, ")


def test_files_may_be_uncompressed(tmp_path: Path) -> None:
    for name in ("train", "val", "test_2017_flickr"):
        for language in ("en", "de"):
            (tmp_path / f"{name}.{language}").write_text(f"{name} {language}\n")
    data = multi30k(tmp_path, test="test_2017_flickr", source="de", target="en")
    assert data.pairs("test") == [("test_2017_flickr de", "test_2017_flickr en")]
    assert data.pairs("val") == [("val de", "val en")]


def test_mistakes_are_one_sentence_each(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no val.en.gz in data.root=.*; put the files of Multi30k's task 1"):
        multi30k(tmp_path).count("val")
    for language in ("en", "de", "fr"):
        (tmp_path / f"val.{language}").write_text("one\ntwo\n"[: 8 if language != "fr" else 4])
    with pytest.raises(UserError, match=r"data.target=es: expected a language of val in data.root=.*: de, en, fr\."):
        multi30k(tmp_path, target="es").count("val")
    with pytest.raises(UserError, match=r"val.en has 2 lines and .*val.fr has 1"):
        multi30k(tmp_path, target="fr").count("val")
    with pytest.raises(UserError, match=r"data.source=de and data.target=de: expected two languages"):
        multi30k(tmp_path, source="de")
