"""The tokenizer: reversible for any text, no special token from text, deterministic, and an error for each mistake."""

import json
import pickle
import random
import unicodedata
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from common.errors import UserError
from seq2seq.tokenizers.bpe import (
    BOS,
    BYTE_SYMBOLS,
    EOS,
    PAD,
    SPECIAL_SYMBOLS,
    UNK,
    Tokenizer,
    TokenizerOptions,
    normalize,
)
from seq2seq.tokenizers.text import Lines

PIECES = ("bytes", "characters")
TRAINING_TEXTS = [
    "The old house on the hill was sold in 2019 for 1,250,000 dollars.",
    "Das alte Haus auf dem Hügel wurde 2019 für 1.250.000 Dollar verkauft.",
    "the children play in the garden of the house, the dog plays in the house",
    "die Kinder spielen im Garten des Hauses, der Hund spielt im Haus",
    "老房子在山上\uff0c孩子们在花园里玩。老房子",
    "<s> and </s> and <pad> and <unk> <s> </s> <pad> <unk> <s> </s> <pad> <unk>",
] * 4
UNSEEN_TEXTS = [
    "",
    " ",
    "   ",
    "a",
    " a",
    "  two  and   three spaces ",
    "\u2581under\u2581score\u2581",
    "tab\tfeed\nreturn\r\u2028\u2029\x85\x0b",
    "cafe\u0301 A\u030a\u0323 \u0301",
    "e\u0301t\u00e9 ﬁne ½ x² \uff21\uff22\uff23",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽",
    "日本語とかな 한국어 ไทย العربية עברית हिन्दी",
    "繁體字與简体字\uff0c没有空格。",
    "5 Tage, 12.5% ٣٤ Ⅻ ௧",
    "Ġ Ċ Â <0xE4> Ā",
    "<s>",
    "a<s>b</s>c<pad>d<unk>",
    "\x00\x01\x7f\ufeff\ufffd\U0010ffff",
    *(f"a{symbol}b" for symbol in (BYTE_SYMBOLS[0], BYTE_SYMBOLS[0xE4], BYTE_SYMBOLS[255], *SPECIAL_SYMBOLS)),
    "".join(SPECIAL_SYMBOLS),
]


def options(**changes: Any) -> TokenizerOptions:
    defaults: dict[str, Any] = {"kind": "bpe", "pieces": "bytes", "vocabulary": 340, "joint": True, "coverage": 1.0}
    defaults |= {"single_digits": True, "byte_fallback": True, "normalization": "none", "lowercase": False}
    return TokenizerOptions(**defaults | changes)


def trained(**changes: Any) -> Tokenizer:
    return Tokenizer.train(TRAINING_TEXTS, options(**changes))


@pytest.mark.parametrize("single_digits", [True, False])
@pytest.mark.parametrize("coverage", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("pieces", PIECES)
def test_decoding_returns_any_text(pieces: str, coverage: float, single_digits: bool) -> None:
    vocabulary = 340 if coverage or pieces == "bytes" else 261  # without characters there is nothing to merge
    tokenizer = trained(pieces=pieces, coverage=coverage, single_digits=single_digits, vocabulary=vocabulary)
    rng = random.Random(0)
    noise = ["".join(chr(n + 0x800 * (n >= 0xD800)) for n in rng.choices(range(0x10F800), k=30)) for _ in range(50)]
    for text in [*TRAINING_TEXTS, *UNSEEN_TEXTS, *noise]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("pieces", PIECES)
def test_no_text_produces_a_special_token(pieces: str) -> None:
    """Not even if the training text contains their usual names so often that these become entries."""
    tokenizer = trained(pieces=pieces)
    for text in [*TRAINING_TEXTS, *UNSEEN_TEXTS, "".join(map(chr, range(0x100000, 0x100110)))]:
        assert not {PAD, BOS, EOS, UNK} & {*tokenizer.encode(text)}
    assert "▁<" in "".join(tokenizer.pieces(tokenizer.encode("a <s> b")))


def test_special_ids_are_those_that_models_expect() -> None:
    tokenizer = trained()
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.unk) == (0, 1, 2, 3) == (PAD, BOS, EOS, UNK)
    house = tokenizer.encode("house")
    assert tokenizer.decode([BOS, *house, EOS, PAD, PAD]) == "house"
    assert tokenizer.decode([*house, UNK]) == "house\ufffd"
    assert tokenizer.pieces([PAD, BOS, EOS, UNK]) == ["<pad>", "<s>", "</s>", "<unk>"]


def test_the_vocabulary_has_the_requested_number_of_entries() -> None:
    for pieces in PIECES:
        tokenizer = trained(pieces=pieces)
        assert tokenizer.size == 340
        ids = {i for text in [*TRAINING_TEXTS, *UNSEEN_TEXTS] for i in tokenizer.encode(text)}
        assert max(ids) < 340 and len(ids) > 100


@pytest.mark.parametrize("pieces", PIECES)
def test_every_digit_is_a_token_with_single_digits(pieces: str) -> None:
    single = trained(pieces=pieces)
    for text in ("x2019 in 2019, 12.5%", "2019"):
        ids = single.encode(text)
        assert [piece for piece in single.pieces(ids) if any(map(str.isdigit, piece))] == [*filter(str.isdigit, text)]
    vocabulary = {"bytes": 262, "characters": 263}[pieces]  # all that this text gives, here and below
    single = Tokenizer.train(["٣٤"] * 9, options(pieces=pieces, vocabulary=vocabulary))
    assert single.pieces(single.encode("٣٤")) == ["٣", "٤"], "in any script"
    vocabulary = {"bytes": 266, "characters": 273}[pieces]
    several = Tokenizer.train(["in 2019"] * 9, options(pieces=pieces, vocabulary=vocabulary, single_digits=False))
    assert several.pieces(several.encode("in 2019")) == ["▁in", "▁2019"]


@pytest.mark.parametrize("pieces", PIECES)
def test_a_word_has_the_same_tokens_at_the_start_and_inside(pieces: str) -> None:
    tokenizer = trained(pieces=pieces)
    assert tokenizer.encode("house the house")[-1:] == tokenizer.encode("house")
    assert tokenizer.pieces(tokenizer.encode("house")) == ["▁house"]


def test_merges_stay_within_words_and_letters_keep_their_marks() -> None:
    text = ["Hau\u0308ser, Häuser. Häuser! (Häuser)"] * 9
    tokenizer = Tokenizer.train(text, options(pieces="characters", vocabulary=286))
    pieces = tokenizer.pieces(tokenizer.encode(text[0]))
    assert pieces == ["▁Hau\u0308ser", ",", "▁Häuser", ".", "▁Häuser", "!", "▁(", "Häuser", ")"]


def test_the_byte_symbols_are_those_of_the_library() -> None:
    tokenizer = trained(vocabulary=260)
    assert tokenizer.size == 4 + len(pre_tokenizers.ByteLevel.alphabet())
    for text in UNSEEN_TEXTS:
        count = len((" " if text[:1].isalpha() or text[:1] == " " else "").encode() + text.encode())
        assert len(tokenizer.encode(text)) == count, "one token per byte"


def test_characters_without_entries_are_encoded_in_bytes_or_unknown() -> None:
    with_fallback = trained(pieces="characters", byte_fallback=True)
    without_fallback = trained(pieces="characters", byte_fallback=False, vocabulary=180)
    assert with_fallback.pieces(with_fallback.encode("☃")) == ["<0xE2>", "<0x98>", "<0x83>"]
    assert (
        without_fallback.encode("☃")[-1:] == [UNK]
        and without_fallback.decode(without_fallback.encode("a☃e ☃☃")) == "a\ufffde \ufffd\ufffd"
    )
    assert with_fallback.decode(with_fallback.encode("☃")[:2]) == "\ufffd", "an incomplete character"
    assert without_fallback.decode(without_fallback.encode(TRAINING_TEXTS[4])) == TRAINING_TEXTS[4]


def test_the_rarest_characters_below_the_coverage_are_encoded_in_bytes() -> None:
    texts = ["ä" * 90 + "ö" * 6 + "ü" * 4]  # with the space before a word: 101 characters
    for coverage, alphabet in ((1.0, " äöü"), (0.95, " äö"), (0.5, " ä"), (0.0, " ")):
        vocabulary = 4 + 256 + len(alphabet)
        tokenizer = Tokenizer.train(texts, options(pieces="characters", coverage=coverage, vocabulary=vocabulary))
        own_entries = {c for c in "äöü" if tokenizer.pieces(tokenizer.encode(f".{c}"))[-1:] == [c]}
        assert own_entries == {*alphabet} - {" "}
        assert tokenizer.decode(tokenizer.encode("üäö")) == "üäö"


@pytest.mark.parametrize("pieces", PIECES)
def test_the_same_text_gives_the_same_tokenizer(pieces: str) -> None:
    assert trained(pieces=pieces).state() == trained(pieces=pieces).state()
    assert (
        trained(pieces=pieces).state()
        != Tokenizer.train(TRAINING_TEXTS[:3] * 9, options(pieces=pieces, vocabulary=300)).state()
    )


@pytest.mark.parametrize("pieces", PIECES)
def test_a_state_is_text_that_restores_an_equal_tokenizer_without_data(pieces: str) -> None:
    tokenizer = trained(pieces=pieces, coverage=0.95, lowercase=True)
    state = tokenizer.state()
    assert type(state) is str and state.isascii()
    restored, copy = Tokenizer.restore(state), pickle.loads(pickle.dumps(tokenizer))
    assert restored.options == tokenizer.options and restored.size == tokenizer.size and restored.state() == state
    for text in [*TRAINING_TEXTS, *UNSEEN_TEXTS]:
        assert restored.encode(text) == tokenizer.encode(text) == copy.encode(text)
        assert restored.decode(restored.encode(text)) == tokenizer.decode(tokenizer.encode(text))


@pytest.mark.parametrize("state", ["", "{}", "[1]", '{"options": {}, "bpe": {}}', "no json"])
def test_another_programs_state_is_one_sentence(state: str) -> None:
    with pytest.raises(UserError, match="tokenizer was not written by this program"):
        Tokenizer.restore(state)


@pytest.mark.parametrize("pieces", PIECES)
def test_encoding_many_texts_gives_the_same_ids_and_eos(pieces: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seq2seq.tokenizers.bpe.ENCODING_CHUNK", 7)  # several chunks, the last of them not full
    tokenizer, texts = trained(pieces=pieces), [*UNSEEN_TEXTS, *TRAINING_TEXTS]
    rows = tokenizer.encode_all(Lines.of(texts))
    assert [rows[i].tolist() for i in range(len(rows))] == [[*tokenizer.encode(text), EOS] for text in texts]
    assert rows.lengths.sum() == len(rows.flat) and rows.flat.dtype.itemsize == 4
    assert len(tokenizer.encode_all([])) == 0


@pytest.mark.parametrize("pieces", PIECES)
def test_decoding_returns_normalised_and_lower_case_text(pieces: str) -> None:
    for form in ("nfc", "nfkc"):
        tokenizer = trained(pieces=pieces, normalization=form)
        for text in UNSEEN_TEXTS:
            expected = unicodedata.normalize(form.upper(), text)
            assert tokenizer.decode(tokenizer.encode(text)) == expected == normalize(text, tokenizer.options)
            assert tokenizer.encode(text) == tokenizer.encode(expected)
    lower = trained(pieces=pieces, lowercase=True)
    assert lower.decode(lower.encode("Das HAUS ÄÖ")) == "das haus äö" == normalize("Das HAUS ÄÖ", lower.options)


def test_more_entries_than_the_text_gives_are_refused_with_the_maximum() -> None:
    with pytest.raises(UserError) as caught:
        trained(vocabulary=5000)
    message = str(caught.value)
    assert message.startswith("data.tokenizer.vocabulary=5000: the training text gives no more than ")
    maximum = int(message.partition("no more than ")[2].split()[0].replace(",", ""))
    assert trained(vocabulary=maximum).size == maximum
    with pytest.raises(UserError, match="the training text in de gives no more than"):
        Tokenizer.train(TRAINING_TEXTS, options(vocabulary=5000), " in de")


def test_fewer_entries_than_the_alphabet_are_refused_with_the_minimum() -> None:
    with pytest.raises(
        UserError, match=r"vocabulary=259: expected at least 260, for the special .* start from; give more.$"
    ):
        trained(vocabulary=259)
    with pytest.raises(UserError) as caught:
        trained(vocabulary=50, pieces="characters")
    assert "or a lower data.tokenizer.coverage, or data.tokenizer.pieces=bytes" in str(caught.value)
    minimum = int(str(caught.value).partition("at least ")[2].split(",")[0])
    assert minimum == 4 + 256 + len({*"".join(TRAINING_TEXTS), " "})
    assert trained(vocabulary=minimum, pieces="characters").size == minimum


EXPONENTIAL = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [EXPONENTIAL]}},
        {"pre_tokenizer": EXPONENTIAL},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}},
        {"decoder": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}},
        {"truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}},
        {"added_tokens": [{"id": 5, "content": "x"}]},
    ],
)
def test_only_the_forms_that_are_written_are_restored(change):
    """A regular expression of a stranger may need exponential time."""
    content = json.loads(Tokenizer.train(TRAINING_TEXTS, options()).state())
    content["bpe"] |= change
    with pytest.raises(UserError, match=f"its {next(iter(change))} is not that of its options"):
        Tokenizer.restore(json.dumps(content))


def test_a_restored_tokenizer_is_that_which_was_written():
    for pieces in PIECES:
        tokenizer = Tokenizer.train(TRAINING_TEXTS, options(pieces=pieces))
        restored = Tokenizer.restore(tokenizer.state())
        assert restored.state() == tokenizer.state()
        assert restored.encode("the house, 1234") == tokenizer.encode("the house, 1234")
