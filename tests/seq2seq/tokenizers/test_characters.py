"""Characters as tokens: reversible for known characters, unknown ones, coverage, state, and refusals."""

import json
import random
from typing import Any

import pytest
from tokenizing import BYTE_OPTIONS

from common.errors import UserError
from seq2seq.tokenizers import stored, training
from seq2seq.tokenizers.bpe import BOS, EOS, PAD, SPECIAL, UNK, Tokenizer, TokenizerOptions
from seq2seq.tokenizers.characters import FIRST, Characters

TEXTS = ["def f(x):\n    return x", "über 好\u2028 🙂", "\x00\ufffd\U0010ffff"]


def options(**changes: Any) -> TokenizerOptions:
    return TokenizerOptions(**{**vars(BYTE_OPTIONS), "kind": "characters", **changes})


def trained(texts: list[str] = TEXTS, **changes: Any) -> Characters:
    return Characters.train(texts, options(**changes))


def test_every_character_of_the_training_text_is_one_token() -> None:
    tokenizer = trained()
    alphabet = sorted({*"".join(TEXTS)})
    assert tokenizer.size == FIRST + len(alphabet) and tokenizer.special == SPECIAL
    assert tokenizer.encode("".join(alphabet)) == [*range(FIRST, tokenizer.size)]
    rng = random.Random(0)
    for text in [*TEXTS, "", *("".join(rng.choices(alphabet, k=20)) for _ in range(20))]:
        assert tokenizer.decode(tokenizer.encode(text)) == text and len(tokenizer.encode(text)) == len(text)


def test_other_characters_are_unknown_and_no_text_gives_a_special_token() -> None:
    tokenizer = trained(["abc"])
    assert tokenizer.encode("a`d\x00\U0010ffffc") == [FIRST, UNK, UNK, UNK, UNK, FIRST + 2]
    assert tokenizer.encode("\ud800") == [UNK], "half of a surrogate pair, which a str of Python may hold"
    assert tokenizer.unknown("dabd\n") == ["d", "\n"] and tokenizer.unknown("cab") == []
    assert not {PAD, BOS, EOS} & {*tokenizer.encode("<pad><s></s>" + "".join(map(chr, range(300))))}
    assert tokenizer.decode([BOS, FIRST, UNK, PAD, EOS]) == "a\ufffd"
    assert tokenizer.pieces([PAD, FIRST + 1]) == ["<pad>", "b"]


def test_all_texts_are_encoded_with_an_end() -> None:
    tokenizer = trained()
    rows = tokenizer.encode_all([*TEXTS, ""])
    assert [rows[i].tolist() for i in range(4)] == [[*tokenizer.encode(text), EOS] for text in [*TEXTS, ""]]
    assert rows.flat.dtype == "int32" and len(tokenizer.encode_all([])) == 0


def test_coverage_keeps_the_most_frequent_characters() -> None:
    assert trained(["aaaabbbccd"], coverage=0.9).unknown("abcd") == ["d"]
    assert trained(["aaaabbbccd"], coverage=0.71).unknown("abcd") == ["d"]
    assert trained(["aaaabbbccd"], coverage=0.7).unknown("abcd") == ["c", "d"]
    assert trained(["ba"], coverage=0.5).unknown("ab") == ["b"], "of equally frequent ones, the first"


def test_normalization_and_lowercase_are_applied_before_encoding() -> None:
    tokenizer = trained(["e\u0301A"], normalization="nfc", lowercase=True)
    assert tokenizer.decode(tokenizer.encode("\u00c9a")) == "\u00e9a" and tokenizer.size == FIRST + 2


def test_the_state_restores_the_tokenizer() -> None:
    tokenizer = trained(lowercase=True)
    restored = stored.restore(tokenizer.state())
    assert isinstance(restored, Characters) and restored.state() == tokenizer.state()
    assert restored.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1]) and restored.options == tokenizer.options


@pytest.mark.parametrize(
    ("key", "value"),
    [("characters", ["a"]), ("characters", "aa"), ("characters", "\ud800"), ("options", {"kind": "characters"})],
)
def test_a_damaged_state_is_refused(key: str, value: Any) -> None:
    content = json.loads(trained().state())
    with pytest.raises(UserError, match="was not written by this program"):
        stored.restore(json.dumps({**content, key: value}))


def test_a_text_without_characters_is_refused() -> None:
    with pytest.raises(UserError, match="The training text in German is empty"):
        Characters.train(["", ""], options(), " in German")


def test_the_kind_chooses_the_tokenizer() -> None:
    assert isinstance(training.train(["abc"], options()), Characters)
    assert isinstance(training.train(["abc"], BYTE_OPTIONS), Tokenizer)


@pytest.mark.parametrize(("pieces", "vocabulary"), [("bytes", 260), ("characters", 271)])
def test_a_continuation_has_no_space_before_it(pieces: str, vocabulary: int) -> None:
    """So pieces of a text that are encoded one after the other decode to the text, unlike texts of their own."""
    text = "one two\nthree  four"
    bpe = Tokenizer.train(
        [text], TokenizerOptions(**{**vars(BYTE_OPTIONS), "pieces": pieces, "vocabulary": vocabulary})
    )
    parts = ["one two\n", "three", "  four"]
    ids = [*bpe.encode(parts[0]), *(id for part in parts[1:] for id in bpe.encode_continuation(part))]
    assert bpe.decode(ids) == text
    assert bpe.decode([id for part in parts for id in bpe.encode(part)]) != text
