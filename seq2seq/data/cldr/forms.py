"""What a phrase is made of: a value, such as a date, and a form that prints it in any locale."""

import unicodedata
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from babel import Locale

Formatter = Callable[[Locale, Any], str]
Words = tuple[Hashable, ...]
Name = tuple[str, Any]  # a list of names ("countries") and a code in it ("DE")
TextPair = tuple[str, str]  # in the source and the target locale
LocalePair = tuple[Locale, Locale]  # source and target


def no_words(locale: Locale, value: Any) -> Words:
    """The words of a form that prints nothing but digits and signs."""
    return ()


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to print the values of a kind.

    name: unique within its category and kind.
    kind: forms of one kind print the same values.
    sample: returns a random value.
    format: returns the value's text in a locale; raises LookupError where the locale's tables lack an entry.
    key: identifies a value; all phrases of values with one key are in one split.
    words: the names and word forms in a locale's text; training must contain each of them.
    frequency: how often the form is sampled, relative to the other forms of its category.
    rivals: earlier forms that, for some values, print the same source with another target.
    """

    name: str
    kind: str
    sample: Callable[[Random], Any]
    format: Formatter
    key: Callable[[Any], Hashable]
    words: Callable[[Locale, Any], Words] = no_words
    frequency: float = 1.0
    rivals: "tuple[Form, ...]" = ()


@dataclass(frozen=True, kw_only=True)
class Category:
    """Forms that share a quota of phrases; `names` are the names that they combine, in both locales."""

    name: str
    forms: Sequence[Form]
    names: Mapping[Name, TextPair] = field(default_factory=dict)


DIRECTION_MARKS = dict.fromkeys(map(ord, "\u200e\u200f\u061c"))  # invisible; they only set the direction of writing


def visible_text(text: str) -> str:
    """A text as it looks: in NFKC, without direction marks, and with each run of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).translate(DIRECTION_MARKS).split())
