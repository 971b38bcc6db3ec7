"""Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909), computed by the package `tokenizers`.

A tokenizer is trained on a run's training text. Merges start from bytes (Radford et al. 2019, GPT-2) or from characters
including the space, as in SentencePiece (Kudo and Richardson 2018, arXiv:1808.06226). In both cases,
`decode(encode(text)) == text`, unless an option makes encoding lossy (see `Tokenizer`).

Differs: SentencePiece replaces each space by U+2581, so that a U+2581 in the text is decoded as a space. This file
keeps spaces.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypedDict

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from common.decoding.contract import SpecialIds
from common.errors import UserError
from common.files import schema
from common.types import Fraction, Range
from seq2seq.tokenizers.text import Ragged

PAD, BOS, EOS, UNK = range(4)
SPECIAL = SpecialIds(begin=BOS, end=EOS, never=(PAD, BOS))
# Characters of Unicode's last private-use plane represent the special entries and, with pieces=characters, single
# bytes. If a text contains one of these characters, the character's UTF-8 bytes are encoded or, with pieces=characters
# but without byte_fallback, <unk>. So no text is encoded to <pad>, <s> or </s>.
BYTE_SYMBOLS = tuple(chr(0x100000 + byte) for byte in range(256))
SPECIAL_SYMBOLS = tuple(chr(0x100100 + special) for special in range(4))
PRIVATE_USE = r"\x{100000}-\x{100103}"  # the symbols above, as a character range of a regular expression
SPECIAL_NAMES = ("<pad>", "<s>", "</s>", "<unk>")
MIN_PAIR_COUNT = 2  # two entries are merged into a new one only if they are adjacent at least this often
# Maximum number of sentences, and of characters, per call of the library; they limit the memory of its objects, which
# is about 100 bytes a character.
ENCODING_CHUNK, ENCODING_CHARACTERS = 10_000, 1_000_000


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """Options of a tokenizer.

    kind: the method: "bpe" (byte-pair encoding), or "characters" (each character is a token, see characters.py), which
        uses only `coverage`, `normalization` and `lowercase`, and `joint` for two languages.
    pieces: the units from which merges start: "bytes" (all 256, so that no text is unknown) or "characters" (those of
        the training text).
    vocabulary: number of entries, including the 4 special ones and all single bytes or characters. If `joint` is false,
        each language has a vocabulary of this size.
    joint: whether both languages share one vocabulary; model.tied=all requires it.
    single_digits: whether each digit is a separate token, which contains no other digit and no space.
    coverage: used with pieces=characters: the most frequent characters get an entry, as many as are needed to make up
        this fraction of the training text. 1.0 = every character of the training text gets an entry.
    byte_fallback: used with pieces=characters: whether a character without an entry is encoded as its UTF-8 bytes,
        which take 256 entries. Otherwise, it is encoded as <unk>.
    normalization: Unicode form to which text is converted first: "nfc" composes letters with their marks, "nfkc" also
        replaces compatibility characters (full width, ligatures, superscripts), "none" changes nothing. Decoding
        returns the normalised text.
    lowercase: whether text is converted to lower case first. Decoding then returns lower case.
    """

    kind: Literal["bpe", "characters"]
    pieces: Literal["bytes", "characters"]
    vocabulary: Annotated[int, Range(low=1, high=1_000_000)]  # the library reserves memory for all entries at once
    joint: bool
    single_digits: bool
    coverage: Fraction
    byte_fallback: bool
    normalization: Literal["none", "nfc", "nfkc"]
    lowercase: bool


class _Model(TypedDict):
    vocab: dict[str, int]
    merges: list[tuple[str, str]]


class _Bpe(TypedDict):
    model: _Model


class TokenizerState(TypedDict):
    """The content of the JSON text that `Tokenizer.state` returns."""

    options: TokenizerOptions
    bpe: _Bpe  # the library's JSON; it has further keys, which `_rebuild` checks


class Tokenizer:
    """Converts text to ids and back.

    Ids 0 to 3 are padding, begin, end and unknown. No text is encoded to the first three. Decoding restores the text
    exactly, with three exceptions: `normalization`, `lowercase`, and pieces=characters without `byte_fallback`.
    """

    pad, bos, eos, unk = PAD, BOS, EOS, UNK
    special = SPECIAL

    def __init__(self, options: TokenizerOptions, bpe: tokenizers.Tokenizer):
        self.options, self._bpe = options, bpe
        ids: dict[str, int] = bpe.get_vocab()
        entries = sorted(ids, key=lambda entry: ids[entry])
        assert tuple(entries[:4]) == SPECIAL_SYMBOLS and sorted(ids.values()) == [*range(len(ids))]
        alphabet = [entry for entry in entries[4:] if len(entry) == 1 and entry not in BYTE_SYMBOLS]
        self._uncovered = _uncovered_by(alphabet) if options.pieces == "characters" else None
        byte_of = byte_alphabet() if options.pieces == "bytes" else {symbol: i for i, symbol in enumerate(BYTE_SYMBOLS)}
        content_of = {symbol: bytes([byte]) for symbol, byte in byte_of.items()}
        # The bytes of each entry, in order of ids. An entry may begin or end inside a UTF-8 character.
        self._contents = [b"".join(content_of.get(c) or c.encode() for c in entry) for entry in entries]
        self._contents[:4] = [b"", b"", b"", "\ufffd".encode()]

    @property
    def size(self) -> int:
        """Number of entries, including the 4 special ones."""
        return len(self._contents)

    @classmethod
    def train(cls, texts: Iterable[str], options: TokenizerOptions, which: str = "") -> "Tokenizer":
        """Train a tokenizer on `texts`. The same texts in the same order give the same entries.

        `which` is inserted into error messages to name the texts, such as " in German". Raises UserError when
        `options.vocabulary` is too small for the special entries and all single bytes or characters, or larger than the
        number of entries that the texts give.
        """
        prepared = [_with_space(normalize(text, options)) for text in texts]
        if options.pieces == "bytes":
            alphabet = sorted(byte_alphabet())
        else:
            alphabet = _characters(prepared, options.coverage)
            uncovered = _uncovered_by(alphabet)
            prepared = [_replace_uncovered(text, uncovered, options) for text in prepared]
            alphabet += BYTE_SYMBOLS if options.byte_fallback else ()
        _check_vocabulary(options, len(alphabet), which)
        bpe = _untrained_tokenizer(options)
        # The trainer's argument `limit_alphabet` is not used: among equally rare characters, the ones that it drops
        # differ from run to run.
        trainer = trainers.BpeTrainer(
            vocab_size=options.vocabulary,
            min_frequency=MIN_PAIR_COUNT,
            special_tokens=[*SPECIAL_SYMBOLS],
            initial_alphabet=alphabet,
            show_progress=False,
        )
        bpe.train_from_iterator(prepared, trainer, length=len(prepared))
        if bpe.get_vocab_size() < options.vocabulary:
            raise UserError(
                f"data.tokenizer.vocabulary={options.vocabulary}: the training text{which} gives no more than "
                f"{bpe.get_vocab_size():,} entries that occur at least twice; give that number or less."
            )
        return cls(options, _without_special_text(bpe))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without BOS and EOS; an empty list for an empty text."""
        ids: list[int] = self._bpe.encode(self._prepare(text), add_special_tokens=False).ids
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """Return the ids of a text that follows other text, so that no space is inserted before it."""
        text = normalize(text, self.options)
        text = text if self._uncovered is None else _replace_uncovered(text, self._uncovered, self.options)
        ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        return ids

    def encode_all(self, texts: Iterable[str]) -> Ragged:
        """Return the ids of each text as an int32 row that ends with EOS."""
        return Ragged.of(encode_in_chunks(self._bpe, map(self._prepare, texts)), EOS)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. PAD, BOS and EOS are left out; UNK and invalid UTF-8 become U+FFFD."""
        text = b"".join(self._contents[i] for i in ids).decode("utf-8", "replace")
        return text.removeprefix(" ")  # the space that `_with_space` inserted

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return each id's entry in readable form: a space as U+2581, a byte of an incomplete character as <0xE4>."""
        return [SPECIAL_NAMES[i] if i < len(SPECIAL_NAMES) else readable(self._contents[i]) for i in ids]

    def state(self) -> str:
        """Return the tokenizer as JSON text, from which `restore` rebuilds it without the training text."""
        return json.dumps({"options": asdict(self.options), "bpe": json.loads(self._bpe.to_str())})

    @classmethod
    def restore(cls, state: str) -> "Tokenizer":
        """Rebuild a tokenizer from a text that `state` returned.

        Raises UserError for a text that is not the JSON of a TokenizerState, and for a state whose ids have gaps or
        whose settings, such as the regular expression for splitting, do not follow from its options. Not every change
        to the entries and merges is detected.
        """
        try:
            content = json.loads(state)
            if mistake := schema.mistake(content, TokenizerState, "tokenizer"):
                raise ValueError(mistake)
            options = TokenizerOptions(**content["options"])
            return cls(options, _rebuild(content["bpe"], options))
        except Exception as error:  # the library's errors have no narrower type
            raise UserError(
                "The checkpoint's tokenizer was not written by this program "
                f"({str(error)[:160] or type(error).__name__}); give a checkpoint of a seq2seq run."
            ) from error

    def _prepare(self, text: str) -> str:
        """Normalise a text, insert the leading space and replace characters that have no entry."""
        text = _with_space(normalize(text, self.options))
        return text if self._uncovered is None else _replace_uncovered(text, self._uncovered, self.options)


def normalize(text: str, options: TokenizerOptions) -> str:
    """Apply `options.normalization` and `options.lowercase` to a text."""
    if options.normalization != "none":
        text = unicodedata.normalize("NFC" if options.normalization == "nfc" else "NFKC", text)
    return text.lower() if options.lowercase else text


def _with_space(text: str) -> str:
    """Insert a space before a text that begins with a letter or a space.

    With the space, a first word gets the same tokens as inside a sentence. Because `decode` removes one leading space,
    a text that already begins with a space gets a second one.
    """
    return f" {text}" if text[:1].isalpha() or text[:1] == " " else text


def _characters(texts: Iterable[str], coverage: float) -> list[str]:
    """Return the space and the most frequent characters, sorted.

    They are as many as are needed to make up the fraction `coverage` of the texts. Characters that represent bytes or
    special entries are then left out.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    remaining = coverage * counts.total()
    chosen = {" "}
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if remaining <= 0:
            break
        chosen.add(character)
        remaining -= count
    return sorted(chosen - {*BYTE_SYMBOLS, *SPECIAL_SYMBOLS})


def _uncovered_by(alphabet: Iterable[str]) -> re.Pattern[str]:
    """Compile a pattern that matches any one character outside the alphabet."""
    return re.compile(f"[^{''.join(map(re.escape, alphabet))}]")


def _replace_uncovered(text: str, uncovered: re.Pattern[str], options: TokenizerOptions) -> str:
    """Replace each uncovered character by the symbols of its UTF-8 bytes, or by UNK's symbol without byte fallback."""
    if not options.byte_fallback:
        return uncovered.sub(SPECIAL_SYMBOLS[UNK], text)
    return uncovered.sub(lambda match: "".join(BYTE_SYMBOLS[byte] for byte in match[0].encode()), text)


def _check_vocabulary(options: TokenizerOptions, alphabet_count: int, which: str) -> None:
    minimum = len(SPECIAL_SYMBOLS) + alphabet_count
    if options.vocabulary >= minimum:
        return
    alternatives = (
        "" if options.pieces == "bytes" else ", or a lower data.tokenizer.coverage, or data.tokenizer.pieces=bytes"
    )
    raise UserError(
        f"data.tokenizer.vocabulary={options.vocabulary}: expected at least {minimum:,}{which}, for the special "
        f"entries and every byte or character that merges start from; give more{alternatives}."
    )


def _untrained_tokenizer(options: TokenizerOptions) -> tokenizers.Tokenizer:
    """Make a tokenizer without entries. It splits text into parts, and merges never cross the border of two parts.

    A part is a run of letters with their marks, of digits, of other signs, or of white space. A part of the first three
    kinds includes the space before it, if there is one. Each private-use symbol is a separate part. With
    `single_digits`, each digit is a separate part without a space.
    """
    number = r"\p{N}" if options.single_digits else r" ?\p{N}+"
    words = rf" ?[\p{{L}}\p{{M}}]+|{number}|[{PRIVATE_USE}]| ?[^\s\p{{L}}\p{{M}}\p{{N}}{PRIVATE_USE}]+|\s+(?!\S)|\s+"
    steps: list[Any] = [pre_tokenizers.Split(tokenizers.Regex(words), "isolated")]
    if options.pieces == "bytes":
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return bpe


def _rebuild(stored: dict[str, Any], options: TokenizerOptions) -> tokenizers.Tokenizer:
    """Rebuild a stored tokenizer of the library from its entries and merges.

    Raises ValueError if any other stored setting is not the one that follows from `options`, or if the ids have gaps or
    do not begin with the special entries.
    """
    bpe = _untrained_tokenizer(options)
    ours = json.loads(bpe.to_str())
    changed = [key for key in ours if key not in ("version", "model") and stored.get(key) != ours[key]]
    model = stored["model"]
    changed += [key for key in model if model[key] and key not in ("type", "vocab", "merges")]
    if changed:
        raise ValueError(f"its {changed[0]} is not that of its options")
    ids = model["vocab"]
    if sorted(ids.values()) != [*range(len(ids))] or any(
        ids.get(symbol) != i for i, symbol in enumerate(SPECIAL_SYMBOLS)
    ):
        raise ValueError("its ids do not begin with the special entries, or have gaps")
    bpe.model = models.BPE(ids, [tuple(pair) for pair in model["merges"]])
    return bpe


def _without_special_text(bpe: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return a copy of the tokenizer that does not recognise special entries in text."""
    content = json.loads(bpe.to_str())
    content["added_tokens"] = []
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def encode_in_chunks(library: tokenizers.Tokenizer, texts: Iterable[str]) -> Iterator[list[int]]:
    """Yield the ids of each text, which the library encodes in parallel, as many as `chunks` gives at a time."""
    for chunk in chunks(texts):
        for encoding in library.encode_batch_fast(chunk, add_special_tokens=False):
            yield encoding.ids


def chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield up to `ENCODING_CHUNK` texts at a time, or fewer that have `ENCODING_CHARACTERS` together."""
    chunk, characters = list[str](), 0
    for text in texts:
        chunk.append(text)
        characters += len(text)
        if len(chunk) == ENCODING_CHUNK or characters >= ENCODING_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


@cache
def byte_alphabet() -> dict[str, int]:
    """Return the byte that each character in byte-level entries, those of the library and of GPT-2, stands for.

    A printable Latin-1 character, except the space, stands for its own code. U+0100, U+0101 and so on stand for the
    other bytes, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unprintable = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(unprintable)}


def readable(content: bytes) -> str:
    """Return an entry's bytes as text: a space as U+2581, a byte of an incomplete character as <0xE4>."""
    text = content.decode("utf-8", "surrogateescape")  # a byte of an incomplete character becomes U+DC00 + byte
    text = re.sub("[\udc80-\udcff]", lambda match: f"<0x{ord(match[0]) - 0xDC00:02X}>", text)
    return text.replace(" ", "\u2581")
