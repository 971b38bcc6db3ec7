"""The interface of tokenizers, trained here or imported, for data, task and scores."""

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
        """Number of entries, including special ones."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special ones; none for an empty text."""

    def encode_all(self, texts: Iterable[str]) -> Ragged:
        """Ids of many texts as int32 rows, each of which ends with EOS."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ones are left out."""

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """A readable form of each id's entry."""

    def state(self) -> str:
        """The tokenizer as JSON, which restores it without data."""
