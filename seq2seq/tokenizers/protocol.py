"""The interface of a tokenizer, whether it was trained by this program or imported."""

from collections.abc import Iterable
from typing import Protocol

from common.decoding.contract import SpecialIds
from seq2seq.tokenizers.bpe import TokenizerOptions
from seq2seq.tokenizers.text import Ragged


class TextTokenizer(Protocol):
    """Converts text to ids and back."""

    options: TokenizerOptions
    special: SpecialIds

    @property
    def size(self) -> int:
        """Number of entries, including the 4 special ones."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without BOS and EOS; an empty list for an empty text."""

    def encode_all(self, texts: Iterable[str]) -> Ragged:
        """Return the ids of each text as an int32 row that ends with EOS."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. PAD, BOS and EOS are left out; UNK becomes U+FFFD."""

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return each id's entry in readable form."""

    def state(self) -> str:
        """Return the tokenizer as JSON text, from which it can be rebuilt without data or other files."""
