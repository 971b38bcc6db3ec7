"""What data, task and scores ask of a tokenizer, learnt by ourselves or imported."""

from collections.abc import Iterable
from typing import Protocol

from common.decoding.contract import SpecialIds
from seq2seq.tokenizers.bpe import TokenizerOptions
from seq2seq.tokenizers.text import Ragged


class TextTokenizer(Protocol):
    """Text to ids and back."""

    options: TokenizerOptions
    special: SpecialIds

    @property
    def size(self) -> int:
        """Number of entries, special ones included."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special ones; an empty text has none."""

    def encode_all(self, texts: Iterable[str]) -> Ragged:
        """Ids of many texts, each with EOS at its end: rows of int32."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ones give nothing."""

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """What each id stands for, for people."""

    def state(self) -> str:
        """All of it as JSON, from which it is restored without data."""
