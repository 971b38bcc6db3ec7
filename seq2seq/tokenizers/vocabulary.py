"""The base class of tokenizers that the package `tokenizers` computes from a list of entries, as published models do.

The entries keep the ids that the published files give them, unlike those of bpe.py and marian.py. So the rows of a
published model's embeddings are used as they are.
"""

import itertools
import json
import re
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import tokenizers

from common.decoding.contract import SpecialIds
from common.errors import UserError
from seq2seq.tokenizers.bpe import TokenizerOptions, encode_in_chunks
from seq2seq.tokenizers.text import Ragged

CONTINUATION = "##"  # begins the name of an entry that is joined to what is before it
MAX_PART = 1 << 18  # characters of a text that are encoded at once
WORD_BREAK = re.compile(r"\w (?=\w)")


class SpecialEntries(NamedTuple):
    """The ids of the special entries. No text is encoded to any of them except `unknown`."""

    begin: int  # precedes a text: [CLS], <s> or <|endoftext|>
    end: int  # follows a text: [SEP], </s> or <|endoftext|>
    pad: int | None
    unknown: int | None
    mask: int | None  # stands for a token that a masked language model predicts

    @property
    def ids(self) -> frozenset[int]:
        """The ids of all special entries that there are."""
        return frozenset(id for id in self if id is not None)


class VocabularyTokenizer(ABC):
    """Converts text to ids and back; implements `TextTokenizer`.

    A subclass says how the entries are joined to a text, and which entry begins a word. `options` describe the
    tokenizer to callers; encoding and decoding do not use them.
    """

    kind: str  # distinguishes the states of the subclasses
    units: Literal["bytes", "characters"]  # of which entries are made
    mask_text: str  # what stands for a blank in a user's text
    mask_takes_space: bool  # whether the white space before a blank belongs to the blank

    def __init__(self, entries: Sequence[str], special: SpecialEntries, library: tokenizers.Tokenizer):
        """Make a tokenizer of `entries`, in the order of their ids, which `library` encodes."""
        self.entries = list(entries)
        self.special_entries = special
        never = special.ids - {special.end}
        self.special = SpecialIds(special.begin, special.end, tuple(sorted(never)))
        self.library = library
        self.options = TokenizerOptions(
            kind=self.kind,  # type: ignore[arg-type]
            pieces=self.units,
            vocabulary=len(self.entries),
            joint=False,
            single_digits=False,
            coverage=1.0,
            byte_fallback=False,
            normalization="none",
            lowercase=False,
        )

    @property
    def size(self) -> int:
        """Number of entries, including the special ones."""
        return len(self.entries)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without `begin` and `end`; an empty list for an empty text."""
        ids: list[int] = self.library.encode(text, add_special_tokens=False).ids
        return ids

    def encode_with_blanks(self, text: str) -> list[int]:
        """Return the ids of a text in which each `mask_text` is a blank, the mask entry. It needs a mask entry."""
        assert self.special_entries.mask is not None
        *before, last = text.split(self.mask_text)
        ids: list[int] = []
        for part in before:
            ids += [*self.encode(part.rstrip() if self.mask_takes_space else part), self.special_entries.mask]
        return ids + self.encode(last)

    def encode_all(self, texts: Iterable[str]) -> Ragged:
        """Return the ids of each text as an int32 row that ends with `special.end`."""
        ends_text = deque[bool]()

        def parts() -> Iterator[str]:
            for text in texts:
                for start, stop in spans(text):
                    ends_text.append(stop == len(text))
                    yield text[start:stop]

        encoded = encode_in_chunks(self.library, parts())
        return Ragged.of_parts(((ids, ends_text.popleft()) for ids in encoded), self.special.end)

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. Special entries are left out; the unknown entry becomes U+FFFD."""

    @abstractmethod
    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return each id's entry in readable form."""

    @abstractmethod
    def filling(self, id: int) -> str:
        """Return an entry as the filling of a blank in a text; with ## before it if it has no space before it."""

    @abstractmethod
    def begins_word(self, id: int) -> bool:
        """Whether an entry begins a word, unless it is the first of a text, which always does."""

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """Return what `state` stores besides the kind and the entries."""

    def state(self) -> str:
        """Return the tokenizer as JSON text, from which it can be rebuilt without other files."""
        return json.dumps({"kind": self.kind, "entries": self.entries, **self.content()})


def spans(text: str) -> Iterator[tuple[int, int]]:
    """Yield the starts and ends of the parts of a text, of at most `MAX_PART` characters, that are encoded separately.

    A part ends before a space between two words, so that the ids are those of the whole text. In a part without such a
    space, the last word may be cut.
    """
    start = 0
    while len(text) - start > MAX_PART:
        *_, space = itertools.chain([None], WORD_BREAK.finditer(text, start + MAX_PART // 2, start + MAX_PART))
        stop = start + MAX_PART if space is None else space.start() + 1
        yield start, stop
        start = stop
    yield start, len(text)


def in_order_of_ids(ids: dict[str, int], origin: str) -> list[str]:
    """Return the entries of a vocabulary in the order of their ids; raises UserError unless these are 0, 1, 2, ...

    `origin` names the file or the state in the message.
    """
    entries = sorted(ids, key=lambda entry: ids[entry])
    if [ids[entry] for entry in entries] != [*range(len(entries))]:
        raise UserError(
            f"{origin}: the ids of its {len(entries):,} entries are not 0 to {len(entries) - 1:,}, each once; copy or "
            "download the file again."
        )
    return entries


def entries_mistake(entries: Sequence[str]) -> str | None:
    """Return a mistake in a list of entries, or None: an entry that occurs twice, or half of a surrogate pair."""
    try:
        "".join(entries).encode()
    except UnicodeEncodeError:
        return "an entry has half of a surrogate pair"
    counts = Counter(entries)
    return None if len(counts) == len(entries) else f"the entry {counts.most_common(1)[0][0]!r} occurs twice"


def find_special(
    entries: Sequence[str], names: Mapping[str, tuple[str, ...]], origin: str, required: Sequence[str]
) -> SpecialEntries:
    """Find the special entries by their names: for each field, the first of its `names` that is an entry.

    Raises UserError, which names `origin`, if there is no entry for one of the fields `required`.
    """
    ids = {entry: id for id, entry in enumerate(entries)}
    special = {field: next((ids[name] for name in names[field] if name in ids), None) for field in names}
    for field in required:
        if special[field] is None:
            raise UserError(
                f"{origin}: it has no entry {' or '.join(names[field])}, so it belongs to another tokenizer; give the "
                "files that were published with the model."
            )
    return SpecialEntries(**special)  # type: ignore[arg-type]
