"""Word vectors as the first values of embeddings: rows by word, and files that do not fit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.config.compose import configure
from common.errors import UserError
from common.train.assembly import assemble
from seq2seq.importing.word2vec import write_vectors

PAIRS = [
    ("the cat sees the dog", "die Katze sieht den Hund"),
    ("the dog sees the cat", "der Hund sieht die Katze"),
    ("the bird hears the dog and the cat", "der Vogel findet den Hund und die Katze"),
] * 3
WIDTH = 8


def config(folder: Path, *more: str) -> dict[str, Any]:
    file = folder / "pairs.tsv"
    file.write_text("\n".join("\t".join(pair) for pair in PAIRS), encoding="utf-8")
    data = ["data=parallel_text", f"data.train.pairs={file}", "data.val_count=0", "data.test_count=0"]
    sizes = ["data.tokenizer.vocabulary=296", f"model.embedding_width={WIDTH}", f"model.width={WIDTH}"]
    return configure("train", ["model=rnn", "trainer.device=cpu", *data, *sizes, *more])


def vectors(folder: Path, words: list[str], width: int = WIDTH) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(len(words), width)).astype(np.float32)
    write_vectors(folder / "vectors.bin", words, values, binary=True)
    return values


@pytest.mark.parametrize("tied", ["all", "none"])
def test_rows_of_known_words_are_their_vectors_and_all_others_are_those_of_a_run_without(
    tmp_path: Path, tied: str
) -> None:
    """The entries of both languages begin with the mark of a space; the file has plain words and one with the mark."""
    more = [] if tied == "all" else ["model.tied=none", "data.tokenizer.joint=false"]
    plain = assemble(config(tmp_path, *more))
    words = ["the", "\u2581die", "dog", "Hund", "sieht", "den", "der", "elsewhere", "</s>"]
    values = dict(zip(words, vectors(tmp_path, words), strict=True))
    run = assemble(config(tmp_path, *more, f"model.embedding_weights={tmp_path / 'vectors.bin'}"))
    source, target = run.data.tokenizers()
    tables = {"embedding": target} if tied == "all" else {"embedding": target, "source_embedding": source}
    state, expected = run.model.state_dict(), plain.model.state_dict()
    for name, tokenizer in tables.items():
        count = 0
        for i, piece in enumerate(tokenizer.pieces(range(tokenizer.size))):
            value = values.get(piece, values.get(piece.removeprefix("\u2581"))) if i > 3 else None
            row = expected[f"{name}.weight"][i] if value is None else torch.from_numpy(value)
            torch.testing.assert_close(state[f"{name}.weight"][i], row, rtol=0, atol=0)
            count += value is not None
        assert 0 < count < tokenizer.size / 2
        assert f"{count} of {tokenizer.size} rows of {name}" in run.weights_line
    for name in expected.keys() - {f"{name}.weight" for name in tables}:
        torch.testing.assert_close(state[name], expected[name], rtol=0, atol=0)
    assert run.weights_line.endswith(f"from {tmp_path / 'vectors.bin'}")


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    key = f"model.embedding_weights={tmp_path / 'vectors.bin'}"
    with pytest.raises(UserError, match=r"vectors\.bin"):
        assemble(config(tmp_path, key))
    vectors(tmp_path, ["the", "cat"], width=5)
    with pytest.raises(
        UserError, match=r"of width 5, and the embeddings have the width 8; set model.embedding_width=5"
    ):
        assemble(config(tmp_path, key))
    vectors(tmp_path, ["xyzzy", "</s>"])
    with pytest.raises(UserError, match=r"none of the \d+ entries of the vocabulary of embedding; give vectors of its"):
        assemble(config(tmp_path, key))
