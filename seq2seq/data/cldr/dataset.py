"""The default data of the translator: phrases in any two locales of Unicode CLDR, made in memory with Babel."""

import difflib
from collections import Counter
from dataclasses import dataclass

import babel
from babel import Locale, UnknownLocaleError, localedata

from common.errors import UserError
from common.task import Split
from common.types import Count, Positive
from seq2seq.data.cldr import phrases
from seq2seq.data.cldr.tables import ROOT, SHARES
from seq2seq.data.pairs import Corpus, SentencePairs
from seq2seq.tokenizers.text import Lines


@dataclass(kw_only=True, eq=False)
class Cldr(SentencePairs):
    """Dates, times, money, units, numbers, and names of countries, languages, currencies and months.

    Every phrase is what Babel prints for a locale; `source` and `target` are locales (en, de_CH, zh_Hant ...). The
    splits are a function of the locales, `seed` and the counts, whatever the seed of a run; see
    seq2seq/data/cldr/phrases.py for what they promise. They are made at first use.

    Args, beside those of SentencePairs:
        train_count: phrases to learn from.
        val_count: phrases that choose the checkpoint; 0 = no val.
        test_count: phrases that are reported.
        seed: of the drawing; the run's seed does not change the phrases.
    """

    train_count: Positive
    val_count: Count
    test_count: Positive
    seed: int

    def __post_init__(self) -> None:
        """Refuse unknown locales, and a pair of one locale."""
        if find_locale("source", self.source) == find_locale("target", self.target):
            raise UserError(
                f"data.source={self.source} and data.target={self.target} are the same locale; expected two, such as "
                "en and de."
            )
        super().__post_init__()

    def load(self, split: Split) -> dict[Split, Corpus]:
        """All three splits."""
        counts: dict[Split, int] = {"train": self.train_count, "val": self.val_count, "test": self.test_count}
        locales = find_locale("source", self.source), find_locale("target", self.target)
        drawn = phrases.pairs(*locales, seed=self.seed, counts=counts)
        notes = {"train": _notes(drawn)}
        return {name: _corpus(pairs, notes.get(name, [])) for name, pairs in drawn.splits.items()}

    def where(self, split: Split, index: int) -> str:
        """The phrase itself, for messages: it comes out of no file."""
        return repr(self._used(split).source[index])


def find_locale(key: str, name: str) -> Locale:
    """A locale by CLDR's name for it (zh_Hant) or the web's (zh-Hant); raises UserError when Babel has none."""
    try:
        locale = Locale.parse(name.replace("-", "_"))
        if str(locale) != ROOT:
            return locale
    except (ValueError, UnknownLocaleError):
        pass
    known = localedata.locale_identifiers()
    called = {code.casefold(): code for code in known}
    called |= {said.casefold(): code for code, said in Locale("en").languages.items() if code in known}
    text = name.replace("-", "_").casefold()
    language = text.partition("_")[0]
    near = [language] if language in called else difflib.get_close_matches(text, called, n=1)
    hint = f"; did you mean {called[near[0]]}?" if near else "."
    raise UserError(
        f"data.{key}={name} is none of the {len(known):,} locales of Unicode CLDR, such as en, de_CH or zh{hint}"
    )


def _corpus(pairs: list[phrases.Pair], notes: list[str]) -> Corpus:
    sources, targets = Lines.of([pair.source for pair in pairs]), Lines.of([pair.target for pair in pairs])
    origin = f"the Unicode CLDR tables in Babel {babel.__version__}"
    return Corpus(sources, targets, origin, [pair.category for pair in pairs], notes)


def _notes(drawn: phrases.Drawn) -> list[str]:
    """How many of each category there are in train, and what is left out."""
    train = drawn.splits["train"]
    sizes = Counter(pair.category for pair in train)
    notes = [", ".join(f"{name} {sizes[name]:,}" for name in SHARES if name in sizes)]
    names = sum(pair.is_closed for pair in train)
    notes.append(f"{names:,} of these are single names, which val and test have only in new combinations")
    if drawn.ambiguous:
        notes.append(f"{drawn.ambiguous:,} phrases and names left out whose source would have two targets")
    if drawn.missing:
        notes.append(f"left out, because a locale lacks the tables: {', '.join(drawn.missing)}")
    return notes
