"""What a phrase is made of: a value, such as a date, and a way to print it that is the same in every locale."""

import unicodedata
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from babel import Locale

Show = Callable[[Locale, Any], str]
Words = tuple[Hashable, ...]
Name = tuple[str, Any]  # a closed list and the name's code in it
Said = tuple[str, str]  # what the source's and the target's locale call it
Both = tuple[Locale, Locale]  # the source's and the target's


def no_words(locale: Locale, value: Any) -> Words:
    """Nothing but digits and signs."""
    return ()


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to print the values of a kind.

    name: within its category.
    kind: forms of one kind print the same values.
    draw: a value, from random numbers.
    show: what a locale prints; raises LookupError when the locale's tables do not say.
    key: what the value is to the splits: phrases with the same key come into the same one.
    words: the names and word forms in a locale's phrase, each of which training has to show.
    weight: how often it is drawn beside the others of its category.
    rivals: forms that print some values as this one does in the source, and otherwise in the target; they come first.
    """

    name: str
    kind: str
    draw: Callable[[Random], Any]
    show: Show
    key: Callable[[Any], Hashable]
    words: Callable[[Locale, Any], Words] = no_words
    weight: float = 1.0
    rivals: "tuple[Form, ...]" = ()


@dataclass(frozen=True, kw_only=True)
class Category:
    """Forms that are counted together; `names` are those of the closed lists that they combine."""

    name: str
    forms: Sequence[Form]
    names: Mapping[Name, Said] = field(default_factory=dict)


UNSEEN = dict.fromkeys(map(ord, "\u200e\u200f\u061c"))  # marks that only turn the direction of writing


def plain(text: str) -> str:
    """A text without what a reader, and some tokenizers, do not see: kinds of spaces, and marks of direction."""
    return " ".join(unicodedata.normalize("NFKC", text).translate(UNSEEN).split())
