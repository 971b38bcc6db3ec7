"""The default data of the translator: phrases in any two locales of Unicode CLDR, generated in memory by Babel."""

import difflib
from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import babel
from babel import Locale, UnknownLocaleError, localedata

from common.errors import UserError
from common.task import Split
from common.types import Range
from seq2seq.data.cldr import phrases
from seq2seq.data.cldr.tables import CATEGORY_SHARES, ROOT
from seq2seq.data.pairs import Corpus, SentencePairs
from seq2seq.tokenizers.text import Lines


@dataclass(kw_only=True, eq=False)
class Cldr(SentencePairs):
    """Phrases with dates, times, money, units, numbers, and names of countries, languages, currencies and months.

    Babel prints each phrase in two locales, `source` and `target` (en, de_CH, zh_Hant ...). The splits depend on the
    locales, `seed`, the counts and Babel's tables, but not on the run's seed. The splits are generated at first use.
    `phrases.sample_splits` documents their properties.

    Args, in addition to those of SentencePairs:
        train_count: number of pairs in train.
        val_count: number of pairs in val, on which the best checkpoint is selected; 0 = no val.
        test_count: number of pairs in test, on which the reported scores are computed.
        seed: seed for sampling the phrases.
    """

    train_count: Annotated[int, Range(low=1, high=10_000_000)]
    val_count: Annotated[int, Range(low=0, high=10_000_000)]
    test_count: Annotated[int, Range(low=1, high=10_000_000)]
    seed: int

    def __post_init__(self) -> None:
        """Raise UserError for an unknown locale, or if source and target are the same."""
        if find_locale("source", self.source) == find_locale("target", self.target):
            raise UserError(
                f"data.source={self.source} and data.target={self.target} are the same locale; expected two, such as "
                "en and de."
            )
        super().__post_init__()

    def load(self, split: Split) -> dict[Split, Corpus]:
        """Generate all three splits, regardless of `split`."""
        counts: dict[Split, int] = {"train": self.train_count, "val": self.val_count, "test": self.test_count}
        locales = find_locale("source", self.source), find_locale("target", self.target)
        sampled = phrases.sample_splits(*locales, seed=self.seed, counts=counts)
        notes = {"train": _notes(sampled)}
        return {name: _corpus(pairs, notes.get(name, [])) for name, pairs in sampled.splits.items()}

    def where(self, split: Split, index: int) -> str:
        """The source phrase in quotes, for messages; there is no file to name."""
        return repr(self._used(split).source[index])


def find_locale(key: str, name: str) -> Locale:
    """Find a locale by its name in CLDR (zh_Hant) or in BCP 47 (zh-Hant).

    Raises UserError if Babel has no such locale, or if it is the root locale. `key` ("source" or "target") names the
    config key in the message.
    """
    try:
        locale = Locale.parse(name.replace("-", "_"))
        if str(locale) != ROOT:
            return locale
    except (ValueError, UnknownLocaleError):
        pass
    known = localedata.locale_identifiers()
    codes = {code.casefold(): code for code in known}
    codes |= {name.casefold(): code for code, name in Locale("en").languages.items() if code in known}
    text = name.replace("-", "_").casefold()
    language = text.partition("_")[0]
    near = [language] if language in codes else difflib.get_close_matches(text, codes, n=1)
    hint = f"; did you mean {codes[near[0]]}?" if near else "."
    raise UserError(
        f"data.{key}={name} is not one of the {len(known):,} locales of Unicode CLDR, such as en, de_CH or zh{hint}"
    )


def _corpus(pairs: list[phrases.Pair], notes: list[str]) -> Corpus:
    sources, targets = Lines.of([pair.source for pair in pairs]), Lines.of([pair.target for pair in pairs])
    origin = f"the Unicode CLDR tables in Babel {babel.__version__}"
    return Corpus(sources, targets, origin, [pair.category for pair in pairs], notes)


def _notes(sampled: phrases.SampledSplits) -> list[str]:
    """Notes for the start summary: train's phrases per category, its number of single names, and what was left out."""
    train = sampled.splits["train"]
    counts = Counter(pair.category for pair in train)
    notes = [", ".join(f"{name} {counts[name]:,}" for name in CATEGORY_SHARES if name in counts)]
    names = sum(pair.is_name for pair in train)
    notes.append(f"{names:,} of these are single names, which val and test have only in new combinations")
    if sampled.ambiguous:
        notes.append(f"{sampled.ambiguous:,} phrases and names left out because their source would have two targets")
    if sampled.missing:
        notes.append(f"left out, because a locale lacks the tables: {', '.join(sampled.missing)}")
    return notes
