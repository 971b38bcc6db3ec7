"""Tokens in a file: the same as in memory, written once and atomically, and written again when damaged."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from tokenizing import BYTE_OPTIONS

from common.errors import UserError
from seq2seq.data import token_file
from seq2seq.data.token_file import file_name, tokenize, tokenize_once
from seq2seq.tokenizers.bpe import Tokenizer, TokenizerOptions
from seq2seq.tokenizers.characters import Characters

PIECES = ["größe ", "好🙂\n", "x?"]
CHARACTERS = TokenizerOptions(**{**vars(BYTE_OPTIONS), "kind": "characters"})


def characters(text: str = "größe 好🙂\nx") -> Characters:
    return Characters.train([text], CHARACTERS)


def test_the_tokens_of_the_pieces_are_those_of_the_text_and_are_counted(tmp_path: Path) -> None:
    tokenizer = characters()
    text = "".join(PIECES)
    for stream in (tokenize(PIECES, tokenizer), tokenize_once(tmp_path, "a", lambda: PIECES, tokenizer)):
        assert stream.ids.tolist() == tokenizer.encode(text) and stream.ids.dtype == np.uint16
        assert (stream.characters, stream.bytes_, stream.unknown) == (len(text), len(text.encode()), 1)


def test_a_large_vocabulary_has_four_bytes_a_token(tmp_path: Path) -> None:
    tokenizer = characters("".join(map(chr, range(0x10000, 0x10000 + 70_000))))
    text = chr(0x10000) + chr(0x10000 + 69_999)
    stream = tokenize_once(tmp_path, "a", lambda: [text], tokenizer)
    assert stream.ids.dtype == np.int32 and stream.ids.tolist() == [4, 70_003]


def test_only_the_first_piece_may_get_a_space_before_it() -> None:
    bpe = Tokenizer.train(["a b"], BYTE_OPTIONS)
    assert bpe.decode(tokenize(["a b", "c", " d"], bpe).ids.tolist()) == "a bc d"


def test_the_text_is_tokenized_once(tmp_path: Path) -> None:
    tokenizer, reads = characters(), []

    def pieces() -> Iterator[str]:
        reads.append(1)
        yield from PIECES

    for text_digest in ("a", "a", "b"):
        tokenize_once(tmp_path / "new/folder", text_digest, pieces, tokenizer)
    tokenize_once(tmp_path / "new/folder", "a", pieces, characters("xyz"))
    assert len(reads) == 3, "for each text, and for another tokenizer"
    names = {path.name for path in (tmp_path / "new/folder").iterdir()}
    expected = [file_name("a", tokenizer), file_name("b", tokenizer), file_name("a", characters("xyz"))]
    assert names == {*expected} and len(names) == 3


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"x" + b[1:], lambda b: b"", lambda b: b + b"\0\0"])
def test_a_damaged_file_is_written_again(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    tokenizer = characters()
    path = tmp_path / file_name("a", tokenizer)
    whole = tokenize_once(tmp_path, "a", lambda: PIECES, tokenizer).ids.tolist()
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert tokenize_once(tmp_path, "a", lambda: PIECES, tokenizer).ids.tolist() == whole
    assert path.read_bytes() == content


def test_an_interrupted_tokenization_leaves_no_file(tmp_path: Path) -> None:
    def pieces() -> Iterator[str]:
        yield "x"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize_once(tmp_path, "a", pieces, characters())
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, without_privileges: Callable[[], AbstractContextManager[None]]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache=.*file.*cannot be written .* data.cache=null"):
        tokenize_once(tmp_path / "file", "a", lambda: PIECES, characters())
    (tmp_path / "closed").mkdir(0o555)
    with without_privileges(), pytest.raises(UserError, match="cannot be written"):
        tokenize_once(tmp_path / "closed", "a", lambda: PIECES, characters())


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(token_file.os, "fsync", fail)
    with pytest.raises(UserError, match="No space left"):
        tokenize_once(tmp_path, "a", lambda: PIECES, characters())
    assert not [*tmp_path.iterdir()]


def test_a_text_without_tokens_has_none(tmp_path: Path) -> None:
    assert len(tokenize([], characters()).ids) == 0
    assert len(tokenize_once(tmp_path, "a", lambda: [], characters()).ids) == 0
