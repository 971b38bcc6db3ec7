"""Forms and categories of phrases. A form is a way to print values of one kind, such as dates, in any locale."""

import unicodedata
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from babel import Locale

Formatter = Callable[[Locale, Any], str]  # prints a value in a locale
Words = tuple[Hashable, ...]  # identifiers of the names and word forms in a text; see Form.words
Name = tuple[str, Any]  # the name of a list ("countries") and a code in this list ("DE")
TextPair = tuple[str, str]  # a text in the source locale and its translation in the target locale
LocalePair = tuple[Locale, Locale]  # source and target


def no_words(locale: Locale, value: Any) -> Words:
    """Return no words, so that a form's values may be in val and test even if train lacks them; see `Form.words`."""
    return ()


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to print values of one kind.

    name: unique among the forms of the same category and kind.
    kind: the kind of value that the form prints, such as "date"; several forms may print the same kind.
    sample: returns a value sampled with the given random generator.
    format: returns a value's text in a locale; raises LookupError if the locale's tables lack an entry for it.
    key: returns a value's key. All values with the same key are in the same split.
    words: returns the names and word forms in a value's text in a locale. A phrase is in val or test only if train
        contains all its words of both locales.
    frequency: how often the form is sampled, relative to the other forms of its category.
    rivals: earlier forms of the category that print, for some values, the same source text as this form but another
        target text. This form does not print these values.
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
    """A category of phrases: forms that share one quota of phrases in each split.

    `names` are the names that the forms combine, such as those of countries, with their texts in both locales. Each
    name alone is a phrase, too.
    """

    name: str
    forms: Sequence[Form]
    names: Mapping[Name, TextPair] = field(default_factory=dict)


DIRECTION_MARKS = dict.fromkeys(map(ord, "\u200e\u200f\u061c"))  # invisible; they only set the direction of writing


def visible_text(text: str) -> str:
    """Reduce a text to what a reader sees: NFKC, no direction marks, and each run of white space as one space.

    White space at both ends is removed.
    """
    return " ".join(unicodedata.normalize("NFKC", text).translate(DIRECTION_MARKS).split())
