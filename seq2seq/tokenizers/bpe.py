"""Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909), learnt inside the run by the `tokenizers` library.

Merges start from bytes (Radford et al. 2019, GPT-2) or from characters with the space among them, as in SentencePiece
(Kudo and Richardson 2018, arXiv:1808.06226). Either way `decode(encode(text)) == text` for any text.

Differs: SentencePiece writes U+2581 for a space, which would make the two one in decoding; here a space is a space.
"""

import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from common.decoding.contract import SpecialIds
from common.errors import UserError
from common.types import Fraction, Positive
from seq2seq.tokenizers.text import Ragged

PAD, BOS, EOS, UNK = range(4)
SPECIAL = SpecialIds(begin=BOS, end=EOS, never=(PAD, BOS))
# Symbols of our own, out of Unicode's last plane for private use: a text that holds them is spelt in bytes, so that
# no text can produce them. The special entries' names are such symbols too, because merges could spell "<s>".
BYTE_SYMBOLS = tuple(chr(0x100000 + byte) for byte in range(256))
SPECIAL_SYMBOLS = tuple(chr(0x100100 + special) for special in range(4))
PRIVATE_USE = r"\x{100000}-\x{100103}"
SPECIAL_NAMES = ("<pad>", "<s>", "</s>", "<unk>")
MIN_PAIR_COUNT = 2  # how often a pair must be seen to become an entry; one that is seen once teaches nothing
ENCODING_CHUNK = 10_000  # sentences whose encodings, objects of Python, are there at once


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """How text becomes tokens.

    kind: "bpe".
    pieces: what merges start from: "bytes" (all 256, so that nothing is unknown) or "characters".
    vocabulary: entries, the 4 special ones and all bytes or characters included; of each language when not joint.
    joint: one vocabulary for both languages, which tied embeddings need.
    single_digits: every digit is a token by itself, apart from its neighbours and from a space.
    coverage: characters only: share of the training text that the characters with entries of their own make up; the
        rarest others are spelt in bytes. 1.0 = all that were seen.
    byte_fallback: characters only: spell others in bytes, which takes 256 entries; without it they are <unk>.
    normalization: Unicode form that text is brought to first; "nfc" joins letters with their marks, "nfkc" also makes
        compatible forms one (full width, ligatures, superscripts); decoding then gives the normalised text.
    lowercase: make text lower case first; decoding then gives lower case.
    """

    kind: Literal["bpe"]
    pieces: Literal["bytes", "characters"]
    vocabulary: Positive
    joint: bool
    single_digits: bool
    coverage: Fraction
    byte_fallback: bool
    normalization: Literal["none", "nfc", "nfkc"]
    lowercase: bool


class Tokenizer:
    """Text to ids and back. Ids 0 to 3 are padding, begin, end and unknown; no text can produce the first three.

    Reversible but where options say otherwise: `normalization` and `lowercase`, and characters without `byte_fallback`.
    """

    pad, bos, eos, unk = PAD, BOS, EOS, UNK
    special = SPECIAL

    def __init__(self, options: TokenizerOptions, bpe: tokenizers.Tokenizer):
        self.options, self._bpe = options, bpe
        numbers: dict[str, int] = bpe.get_vocab()
        entries = sorted(numbers, key=lambda entry: numbers[entry])
        assert tuple(entries[:4]) == SPECIAL_SYMBOLS and sorted(numbers.values()) == [*range(len(numbers))]
        alphabet = [entry for entry in entries[4:] if len(entry) == 1 and entry not in BYTE_SYMBOLS]
        self._foreign = _others(alphabet) if options.pieces == "characters" else None
        symbols = _byte_level() if options.pieces == "bytes" else {symbol: i for i, symbol in enumerate(BYTE_SYMBOLS)}
        spelt = {symbol: bytes([byte]) for symbol, byte in symbols.items()}
        # What each id stands for in UTF-8, of which a byte may be but a part.
        self._contents = [b"".join(spelt.get(c) or c.encode() for c in entry) for entry in entries]
        self._contents[:4] = [b"", b"", b"", "\ufffd".encode()]

    @property
    def size(self) -> int:
        """Number of entries, special ones included."""
        return len(self._contents)

    @classmethod
    def train(cls, texts: Iterable[str], options: TokenizerOptions, which: str = "") -> "Tokenizer":
        """Learn the merges of `texts`; the same texts in the same order give the same entries.

        `which` says in errors which texts they are: " in German".
        Raises UserError when `options.vocabulary` is less than the alphabet or more than the texts can give.
        """
        prepared = [_spaced(normalize(text, options)) for text in texts]
        if options.pieces == "bytes":
            alphabet = sorted(_byte_level())
        else:
            alphabet = _characters(prepared, options.coverage)
            foreign = _others(alphabet)
            prepared = [_spell(text, foreign, options) for text in prepared]
            alphabet += BYTE_SYMBOLS if options.byte_fallback else ()
        _check_least(options, len(alphabet), which)
        bpe = _untrained(options)
        # `limit_alphabet` stays off: which of equally rare characters it drops differs from run to run.
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
                f"{bpe.get_vocab_size():,} entries that occur at least twice; give that or less."
            )
        return cls(options, _without_special_text(bpe))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special ones; an empty text has none."""
        ids: list[int] = self._bpe.encode(self._prepare(text), add_special_tokens=False).ids
        return ids

    def encode_all(self, texts: Iterable[str]) -> Ragged:
        """Ids of many texts, each with EOS at its end: rows of int32."""
        parts, lengths = [np.empty(0, np.int32)], [0]
        waiting = iter(texts)
        while chunk := [self._prepare(text) for text in itertools.islice(waiting, ENCODING_CHUNK)]:
            rows = [found.ids for found in self._bpe.encode_batch_fast(chunk, add_special_tokens=False)]
            lengths += [len(row) + 1 for row in rows]
            parts.append(np.fromiter(itertools.chain.from_iterable((*row, EOS) for row in rows), np.int32))
        bounds = np.cumsum(lengths, dtype=np.int64)
        return Ragged(np.concatenate(parts), bounds[:-1], bounds[1:])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. PAD, BOS and EOS give nothing; UNK, and bytes that are no UTF-8, give U+FFFD."""
        text = b"".join(self._contents[i] for i in ids).decode("utf-8", "replace")
        return text.removeprefix(" ")  # see _spaced

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """What each id stands for, for people: spaces as U+2581, a part of a character as <0xE4>."""
        return [SPECIAL_NAMES[i] if i < len(SPECIAL_NAMES) else _shown(self._contents[i]) for i in ids]

    def state(self) -> str:
        """All of it as JSON, for `restore`; it needs no data."""
        return json.dumps({"options": asdict(self.options), "bpe": json.loads(self._bpe.to_str())})

    @classmethod
    def restore(cls, state: str) -> "Tokenizer":
        """The tokenizer of a `state`; raises UserError when it is none."""
        try:
            content: dict[str, Any] = json.loads(state)
            bpe = tokenizers.Tokenizer.from_str(json.dumps(content["bpe"]))
            return cls(TokenizerOptions(**content["options"]), bpe)
        except Exception as error:  # the library raises no narrower one
            raise UserError(
                "The checkpoint's tokenizer is none that this program wrote; give a checkpoint of a seq2seq run."
            ) from error

    def _prepare(self, text: str) -> str:
        """A text in symbols that all have entries."""
        text = _spaced(normalize(text, self.options))
        return text if self._foreign is None else _spell(text, self._foreign, self.options)


def normalize(text: str, options: TokenizerOptions) -> str:
    """The text that is encoded, and that decoding gives back: `text` itself unless options ask for another form."""
    if options.normalization != "none":
        text = unicodedata.normalize("NFC" if options.normalization == "nfc" else "NFKC", text)
    return text.lower() if options.lowercase else text


def _spaced(text: str) -> str:
    """A word that begins a sentence like one inside it: with a space before it, which `decode` takes away again.

    So a text that begins with a space must get one too.
    """
    return f" {text}" if text[:1].isalpha() or text[:1] == " " else text


def _characters(texts: Iterable[str], coverage: float) -> list[str]:
    """The most frequent characters that make up `coverage` of the texts, and the space, sorted."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    wanted = coverage * counts.total()
    chosen = {" "}
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if wanted <= 0:
            break
        chosen.add(character)
        wanted -= count
    return sorted(chosen - {*BYTE_SYMBOLS, *SPECIAL_SYMBOLS})


def _others(alphabet: Iterable[str]) -> re.Pattern[str]:
    """Any character that is not of the alphabet."""
    return re.compile(f"[^{''.join(map(re.escape, alphabet))}]")


def _spell(text: str, foreign: re.Pattern[str], options: TokenizerOptions) -> str:
    """The text with its foreign characters in bytes, or unknown."""
    if not options.byte_fallback:
        return foreign.sub(SPECIAL_SYMBOLS[UNK], text)
    return foreign.sub(lambda match: "".join(BYTE_SYMBOLS[byte] for byte in match[0].encode()), text)


def _check_least(options: TokenizerOptions, alphabet: int, which: str) -> None:
    least = len(SPECIAL_SYMBOLS) + alphabet
    if options.vocabulary >= least:
        return
    others = "" if options.pieces == "bytes" else ", or a lower data.tokenizer.coverage, or pieces=bytes"
    raise UserError(
        f"data.tokenizer.vocabulary={options.vocabulary}: expected at least {least:,}{which}, the special entries and "
        f"every byte or character that merges start from; give more{others}."
    )


def _untrained(options: TokenizerOptions) -> tokenizers.Tokenizer:
    """A tokenizer that cuts text to words, within which merges stay: letters with their marks, numbers, signs, spaces.

    A word takes the space before it along. Symbols of ours stand alone, and so do digits if wished.
    """
    number = r"\p{N}" if options.single_digits else r" ?\p{N}+"
    words = rf" ?[\p{{L}}\p{{M}}]+|{number}|[{PRIVATE_USE}]| ?[^\s\p{{L}}\p{{M}}\p{{N}}{PRIVATE_USE}]+|\s+(?!\S)|\s+"
    steps: list[Any] = [pre_tokenizers.Split(tokenizers.Regex(words), "isolated")]
    if options.pieces == "bytes":
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return bpe


def _without_special_text(bpe: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same entries, none of which is looked for in text any more as a whole: the names of special ones."""
    content = json.loads(bpe.to_str())
    content["added_tokens"] = []
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def _byte_level() -> dict[str, int]:
    """The library's symbol of each byte: itself where Latin-1 prints it, the others from U+0100 on."""
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _shown(content: bytes) -> str:
    text = content.decode("utf-8", "surrogateescape")  # a byte that is but a part becomes U+DC00 + byte
    text = re.sub("[\udc80-\udcff]", lambda match: f"<0x{ord(match[0]) - 0xDC00:02X}>", text)
    return text.replace(" ", "\u2581")
