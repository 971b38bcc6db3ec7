"""Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909), trained in the run by the library `tokenizers`.

Merges start from bytes (Radford et al. 2019, GPT-2) or from characters including the space, as in SentencePiece (Kudo
and Richardson 2018, arXiv:1808.06226). In both cases `decode(encode(text)) == text` for any text.

Differs: SentencePiece replaces a space by U+2581, so that decoding cannot distinguish the two; this file keeps spaces.
"""

import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from common.decoding.contract import SpecialIds
from common.errors import UserError
from common.files import schema
from common.types import Fraction, Range
from seq2seq.tokenizers.text import Ragged

PAD, BOS, EOS, UNK = range(4)
SPECIAL = SpecialIds(begin=BOS, end=EOS, never=(PAD, BOS))
# Bytes and special entries are represented by symbols from Unicode's last private-use plane. Such symbols in a text are
# encoded in bytes, so that no text produces a special entry. (Entries like "<s>" could result from merges.)
BYTE_SYMBOLS = tuple(chr(0x100000 + byte) for byte in range(256))
SPECIAL_SYMBOLS = tuple(chr(0x100100 + special) for special in range(4))
PRIVATE_USE = r"\x{100000}-\x{100103}"  # the symbols above, as a range in regular expressions
SPECIAL_NAMES = ("<pad>", "<s>", "</s>", "<unk>")
MIN_PAIR_COUNT = 2  # a pair becomes an entry only if it occurs at least this often
ENCODING_CHUNK = 10_000  # sentences encoded at once; bounds the memory of their Python objects


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """Options of tokenization.

    kind: "bpe".
    pieces: what merges start from: "bytes" (all 256, so that nothing is unknown) or "characters".
    vocabulary: number of entries, including the 4 special ones and all bytes or characters; per language if not joint.
    joint: whether both languages share one vocabulary, which tied embeddings require.
    single_digits: whether every digit is a token of its own, without other digits or a space.
    coverage: characters only: the fraction of the training text covered by characters with entries of their own; the
        rarest characters are encoded in bytes. 1.0 = all characters of the training text have entries.
    byte_fallback: characters only: encode other characters in bytes, which takes 256 entries; otherwise as <unk>.
    normalization: Unicode form applied to text first: "nfc" composes letters with their marks, "nfkc" also replaces
        compatibility characters (full width, ligatures, superscripts). Decoding returns the normalised text.
    lowercase: convert text to lower case first; decoding returns lower case.
    """

    kind: Literal["bpe"]
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
    """The content of `Tokenizer.state`."""

    options: TokenizerOptions
    bpe: _Bpe


class Tokenizer:
    """Text to ids and back. Ids 0 to 3 are padding, begin, end and unknown; no text can produce the first three.

    Decoding restores the text, except with `normalization`, with `lowercase`, or with pieces=characters without
    `byte_fallback`.
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
        byte_of = _byte_level() if options.pieces == "bytes" else {symbol: i for i, symbol in enumerate(BYTE_SYMBOLS)}
        content_of = {symbol: bytes([byte]) for symbol, byte in byte_of.items()}
        # The UTF-8 bytes of each entry; those of a byte symbol may be a part of a character.
        self._contents = [b"".join(content_of.get(c) or c.encode() for c in entry) for entry in entries]
        self._contents[:4] = [b"", b"", b"", "\ufffd".encode()]

    @property
    def size(self) -> int:
        """Number of entries, including special ones."""
        return len(self._contents)

    @classmethod
    def train(cls, texts: Iterable[str], options: TokenizerOptions, which: str = "") -> "Tokenizer":
        """Learn merges from `texts`; equal texts in equal order give equal entries.

        `which` describes the texts in errors: " in German".
        Raises UserError when `options.vocabulary` is too small for the alphabet or too large for the texts.
        """
        prepared = [_with_space(normalize(text, options)) for text in texts]
        if options.pieces == "bytes":
            alphabet = sorted(_byte_level())
        else:
            alphabet = _characters(prepared, options.coverage)
            uncovered = _uncovered_by(alphabet)
            prepared = [_replace_uncovered(text, uncovered, options) for text in prepared]
            alphabet += BYTE_SYMBOLS if options.byte_fallback else ()
        _check_vocabulary(options, len(alphabet), which)
        bpe = _untrained_tokenizer(options)
        # `limit_alphabet` stays off: among equally rare characters, it drops different ones in each run.
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
        """Ids of a text, without special ones; none for an empty text."""
        ids: list[int] = self._bpe.encode(self._prepare(text), add_special_tokens=False).ids
        return ids

    def encode_all(self, texts: Iterable[str]) -> Ragged:
        """Ids of many texts as int32 rows, each of which ends with EOS."""
        parts, lengths = [np.empty(0, np.int32)], [0]
        remaining = iter(texts)
        while chunk := [self._prepare(text) for text in itertools.islice(remaining, ENCODING_CHUNK)]:
            rows = [encoding.ids for encoding in self._bpe.encode_batch_fast(chunk, add_special_tokens=False)]
            lengths += [len(row) + 1 for row in rows]
            parts.append(np.fromiter(itertools.chain.from_iterable((*row, EOS) for row in rows), np.int32))
        bounds = np.cumsum(lengths, dtype=np.int64)
        return Ragged(np.concatenate(parts), bounds[:-1], bounds[1:])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without PAD, BOS and EOS; UNK and invalid UTF-8 give U+FFFD."""
        text = b"".join(self._contents[i] for i in ids).decode("utf-8", "replace")
        return text.removeprefix(" ")  # the space that `_with_space` inserted

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """A readable form of each id's entry: a space as U+2581, a part of a character as <0xE4>."""
        return [SPECIAL_NAMES[i] if i < len(SPECIAL_NAMES) else _readable(self._contents[i]) for i in ids]

    def state(self) -> str:
        """The tokenizer as JSON, which `restore` reads without data."""
        return json.dumps({"options": asdict(self.options), "bpe": json.loads(self._bpe.to_str())})

    @classmethod
    def restore(cls, state: str) -> "Tokenizer":
        """The tokenizer of a `state`; raises UserError for any other text, such as one with regular expressions."""
        try:
            content = json.loads(state)
            if mistake := schema.mistake(content, TokenizerState, "tokenizer"):
                raise ValueError(mistake)
            options = TokenizerOptions(**content["options"])
            return cls(options, _rebuild(content["bpe"], options))
        except Exception as error:  # the library raises no narrower type
            raise UserError(
                "The checkpoint's tokenizer was not written by this program "
                f"({str(error)[:160] or type(error).__name__}); give a checkpoint of a seq2seq run."
            ) from error

    def _prepare(self, text: str) -> str:
        """Normalise a text and replace characters that have no entry."""
        text = _with_space(normalize(text, self.options))
        return text if self._uncovered is None else _replace_uncovered(text, self._uncovered, self.options)


def normalize(text: str, options: TokenizerOptions) -> str:
    """Apply `options.normalization` and `options.lowercase` to a text."""
    if options.normalization != "none":
        text = unicodedata.normalize("NFC" if options.normalization == "nfc" else "NFKC", text)
    return text.lower() if options.lowercase else text


def _with_space(text: str) -> str:
    """Insert a space before a text's first word, so that this word gets the tokens it has inside a sentence.

    `decode` removes one leading space. Therefore a text that already begins with a space gets a second one.
    """
    return f" {text}" if text[:1].isalpha() or text[:1] == " " else text


def _characters(texts: Iterable[str], coverage: float) -> list[str]:
    """The most frequent characters that make up a fraction `coverage` of the texts, and the space, sorted."""
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
    """A pattern that matches any character outside the alphabet."""
    return re.compile(f"[^{''.join(map(re.escape, alphabet))}]")


def _replace_uncovered(text: str, uncovered: re.Pattern[str], options: TokenizerOptions) -> str:
    """The text with its uncovered characters as byte symbols, or as the symbol of UNK without byte fallback."""
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
    """A tokenizer that splits text into runs of letters with their marks, numbers, signs or spaces; merges stay inside.

    A word includes the space before it. Private-use symbols are separate, as are digits with `single_digits`.
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
    """Rebuild a stored tokenizer; raises ValueError if it differs from `options` in more than entries and merges."""
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


def _byte_level() -> dict[str, int]:
    """Map the library's symbols to bytes: printable Latin-1 stands for itself, U+0100 and so on for the other bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unprintable = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(unprintable)}


def _readable(content: bytes) -> str:
    text = content.decode("utf-8", "surrogateescape")  # a byte of an incomplete character becomes U+DC00 + byte
    text = re.sub("[\udc80-\udcff]", lambda match: f"<0x{ord(match[0]) - 0xDC00:02X}>", text)
    return text.replace(" ", "\u2581")
