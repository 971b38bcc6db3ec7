"""Characters as tokens: each Unicode character of the training text is a vocabulary entry."""

import itertools
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.files import schema
from seq2seq.tokenizers.bpe import (
    BOS,
    EOS,
    PAD,
    SPECIAL,
    SPECIAL_NAMES,
    UNK,
    TokenizerOptions,
    normalize,
    readable,
)
from seq2seq.tokenizers.text import Ragged
from seq2seq.tokenizers.vocabulary import entries_mistake

FIRST = len(SPECIAL_NAMES)  # the id of the first character


class CharactersState(TypedDict):
    """The content of the JSON text that `Characters.state` returns, except its key "kind"."""

    options: TokenizerOptions
    characters: str  # the entries from id 4 on, sorted by code point


class Characters:
    """Converts text to ids and back, one id for each character; implements `TextTokenizer`.

    Ids 0 to 3 are padding, begin, end and unknown. A character that is not an entry becomes unknown. Of the options,
    `coverage`, `normalization` and `lowercase` are used.
    """

    kind = "characters"
    pad, bos, eos, unk = PAD, BOS, EOS, UNK
    special = SPECIAL

    def __init__(self, content: dict[str, Any]):
        """Restore a tokenizer from the parsed JSON of `state`; raises UserError if it is malformed."""
        mistake = schema.mistake(content, CharactersState, "tokenizer")
        if mistake is None:
            mistake = entries_mistake(content["characters"])
        if mistake:
            raise UserError(
                f"The checkpoint's tokenizer was not written by this program ({mistake}); give a checkpoint of a run "
                "with data.tokenizer.kind=characters."
            )
        names = [field.name for field in fields(TokenizerOptions)]
        self.options = TokenizerOptions(**{name: content["options"][name] for name in names})
        self._characters: str = content["characters"]
        codes = _code_points(self._characters)
        self._ids = np.full(int(codes.max(initial=0)) + 2, UNK, np.int32)  # by code point; the last one is no entry
        self._ids[codes] = np.arange(FIRST, self.size)

    @property
    def size(self) -> int:
        """Number of entries, including the 4 special ones."""
        return FIRST + len(self._characters)

    @classmethod
    def train(cls, texts: Iterable[str], options: TokenizerOptions, which: str = "") -> "Characters":
        """Take the characters of `texts` as entries, or the most frequent ones that make up `options.coverage` of them.

        `which` names the texts in error messages, such as " in German". Raises UserError if there are no characters.
        """
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(normalize(text, options))
        if not counts:
            raise UserError(f"The training text{which} is empty, and has no characters; give files with text.")
        chosen, remaining = set(), options.coverage * counts.total()
        for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            if remaining <= 0:
                break
            chosen.add(character)
            remaining -= count
        return cls({"options": asdict(options), "characters": "".join(sorted(chosen))})

    def encode(self, text: str) -> list[int]:
        """Return the id of each character, without BOS and EOS; an empty list for an empty text."""
        ids: list[int] = self._encode(text).tolist()
        return ids

    def encode_all(self, texts: Iterable[str]) -> Ragged:
        """Return the ids of each text as an int32 row that ends with EOS."""
        return Ragged.of(map(self.encode, texts), EOS)

    def unknown(self, text: str) -> list[str]:
        """Return the different characters of a text that are not entries, in the order of their first occurrence."""
        text = normalize(text, self.options)
        return list(dict.fromkeys(itertools.compress(text, self._encode(text) == UNK)))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. PAD, BOS and EOS are left out; UNK becomes U+FFFD."""
        return "".join("\ufffd" if i == UNK else self._characters[i - FIRST] for i in ids if i == UNK or i >= FIRST)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return each id's character in readable form: a space as U+2581."""
        return [SPECIAL_NAMES[i] if i < FIRST else readable(self._characters[i - FIRST].encode()) for i in ids]

    def state(self) -> str:
        """Return the tokenizer as JSON text, from which it can be rebuilt without the training text."""
        content = {"kind": self.kind, "options": asdict(self.options), "characters": self._characters}
        return json.dumps(content)

    def _encode(self, text: str) -> NDArray[np.int32]:
        codes = _code_points(normalize(text, self.options))
        return self._ids[np.minimum(codes, len(self._ids) - 1)]


def _code_points(text: str) -> NDArray[np.int64]:
    """The code points of a text: (n,). Halves of surrogate pairs, which Python permits in a str, count as one each."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int64)
