"""Pairs of phrases that Babel prints for one value in two locales, sampled by category and divided into splits."""

import itertools
from collections.abc import Hashable, Mapping
from random import Random
from typing import NamedTuple

from babel import Locale

from common.errors import UserError
from common.machine.seeds import mix
from common.task import Split
from seq2seq.data.cldr.forms import Category, LocalePair, Words, visible_text
from seq2seq.data.cldr.tables import CATEGORY_SHARES, available_categories, format_pair, independent_copy

VALUE_PARTS = 20  # the number of parts into which a hash divides all values
HELD_OUT_PARTS: dict[int, Split] = {0: "test", 1: "val"}  # the other parts are for train
MAX_IDLE_SAMPLES = 5000  # after so many consecutive samples without a new phrase, `fill` raises an error


class Pair(NamedTuple):
    """One phrase in both locales."""

    category: str
    source: str  # the text in the source locale
    target: str
    is_name: bool  # whether the phrase is a single name, such as a country's; single names are only in train


class SampledSplits(NamedTuple):
    """The phrases of each split, and what was left out."""

    splits: dict[Split, list[Pair]]
    missing: list[str]  # categories that the locales cannot both print, or for which they share too few names
    ambiguous: int  # number of source texts with several targets; for each, a phrase or name was left out


def sample_splits(source: Locale, target: Locale, *, seed: int, counts: Mapping[Split, int]) -> SampledSplits:
    """Sample phrases of every category that both locales have.

    The result depends only on the arguments and Babel's tables. No two phrases have sources with the same
    `visible_text`. A value (a date, an amount, a set of names) is in one split only, and in the same split for any
    `counts`. Val and test contain only names and word forms that are in train. The sizes of the categories in a split
    are in proportion to CATEGORY_SHARES, with one exception: train contains all single names, so if train is small,
    categories with many names exceed their share. Raises UserError if the locales have too few phrases for one of
    `counts`, or if train's count is below the number of single names.
    """
    locales = (independent_copy(source), independent_copy(target))
    categories, missing, ambiguous = available_categories(locales)
    assert categories, "numbers need no tables, so every pair of locales has at least this category"
    registry = _Registry()
    samplers = [_CategorySampler(category, locales, seed, registry) for category in categories]
    for split, count in counts.items():
        quotas = category_quotas(
            split, count, {sampler.category.name: len(sampler.phrases[split]) for sampler in samplers}
        )
        for sampler in samplers:
            sampler.quotas[split] = quotas[sampler.category.name]
    while any(sampler.incomplete_splits() for sampler in samplers):  # repeated if phrases were removed
        for sampler in samplers:
            sampler.fill()
        registry.remove_untrained_words(samplers)
    splits = {
        split: [phrase.pair for sampler in samplers for phrase in sampler.phrases[split].values()] for split in counts
    }
    for split, pairs in splits.items():
        Random(mix(seed, "order", split)).shuffle(pairs)
    return SampledSplits(splits, missing, ambiguous + len(registry.ambiguous | registry.rivalled))


def category_quotas(split: Split, count: int, minimums: Mapping[str, int]) -> dict[str, int]:
    """The number of phrases of each category, in proportion to CATEGORY_SHARES, so that the sum is `count`.

    `minimums` holds the smallest number allowed for each category. With shares of 0.12 and 0.03 and minimums of 0 and
    4, a count of 10 gives 6 and 4, and a count of 100 gives 80 and 20. Raises UserError when `count` is less than the
    sum of the minimums.
    """
    if sum(minimums.values()) > count:
        raise UserError(
            f"data.{split}_count={count}: expected at least {sum(minimums.values()):,}, because training needs all "
            "names of countries, languages, currencies, months and weekdays; give more."
        )
    at_minimum: set[str] = set()
    while True:
        free = [name for name in minimums if name not in at_minimum]
        scale = (count - sum(minimums[name] for name in at_minimum)) / sum(CATEGORY_SHARES[name] for name in free)
        below = {name for name in free if CATEGORY_SHARES[name] * scale < minimums[name]}
        if not below:
            break
        at_minimum |= below
    quotas = {name: minimums[name] if name in at_minimum else int(CATEGORY_SHARES[name] * scale) for name in minimums}
    most_rounded_first = sorted(free, key=lambda name: quotas[name] - CATEGORY_SHARES[name] * scale)
    for name in most_rounded_first[: count - sum(quotas.values())]:
        quotas[name] += 1
    return quotas


class _Phrase(NamedTuple):
    pair: Pair
    words: Words


class _Registry:
    """The source texts in use and the words in train, of all categories together."""

    def __init__(self) -> None:
        # For each source in use, by its `visible_text`: the phrase with this source, and the dict that holds the phrase
        # (one of `_CategorySampler.phrases`).
        self.entries: dict[str, tuple[_Phrase, dict[str, _Phrase]]] = {}
        self.ambiguous: set[str] = set()  # sources that occurred with different targets
        self.rivalled: set[str] = set()  # sources that a rival (see Form.rivals) prints with another target
        self.words: set[Hashable] = set()  # of all phrases in train

    def add(self, phrase: _Phrase, phrases: dict[str, _Phrase]) -> bool:
        """Add a phrase to `phrases` unless its source is in use; returns whether it was added.

        If an earlier phrase has the same source but another target, the source is ambiguous. Then neither this phrase
        nor a later one with this source is added, and the earlier phrase is removed unless it is a single name.
        """
        text = visible_text(phrase.pair.source)
        if text in self.ambiguous:
            return False
        if text not in self.entries:
            self.entries[text] = phrase, phrases
            phrases[text] = phrase
            return True
        registered, holder = self.entries[text]
        if registered.pair.target != phrase.pair.target:
            self.ambiguous.add(text)
            if not registered.pair.is_name:
                del holder[text]
        return False

    def remove_untrained_words(self, samplers: "list[_CategorySampler]") -> None:
        """Remove the phrases of val and test that contain words which are no longer in train.

        Train loses words when `add` removes an ambiguous phrase from it. Usually no phrase has to be removed here.
        """
        train = [phrase for sampler in samplers for phrase in sampler.phrases["train"].values()]
        self.words = {word for phrase in train for word in phrase.words}
        for phrases in [sampler.phrases[split] for sampler in samplers for split in HELD_OUT_PARTS.values()]:
            for text in [text for text, phrase in phrases.items() if not self.words.issuperset(phrase.words)]:
                del phrases[text], self.entries[text]


class _CategorySampler:
    """Samples one category's phrases until every split has its quota."""

    def __init__(self, category: Category, locales: LocalePair, seed: int, registry: _Registry):
        self.category, self.locales, self.seed, self.registry = category, locales, seed, registry
        self.rng = Random(mix(seed, "phrases", category.name))
        self.cumulative_frequencies = list(itertools.accumulate(form.frequency for form in category.forms))
        self.phrases: dict[Split, dict[str, _Phrase]] = {"train": {}, "val": {}, "test": {}}  # by visible_text(source)
        self.quotas: dict[Split, int] = {}
        for name, (source, target) in category.names.items():
            self._add("train", Pair(category.name, source, target, is_name=True), (name,))

    def incomplete_splits(self) -> list[Split]:
        """The splits with fewer phrases than their quota."""
        return [split for split, quota in self.quotas.items() if len(self.phrases[split]) < quota]

    def fill(self) -> None:
        """Sample until every split is complete; raises UserError if MAX_IDLE_SAMPLES samples in a row add no phrase."""
        idle = 0
        while incomplete := self.incomplete_splits():
            idle = 0 if self._sample() else idle + 1
            if idle == MAX_IDLE_SAMPLES:
                name, split, quota = self.category.name, incomplete[0], self.quotas[incomplete[0]]
                raise UserError(
                    f"data.{split}_count asks for {quota:,} phrases of {name}, but {self.locales[0]} and "
                    f"{self.locales[1]} give only about {len(self.phrases[split]):,}; give a lower count."
                )

    def _sample(self) -> bool:
        """Sample a form and a value, and add the phrase; returns whether it was added."""
        form = self.rng.choices(self.category.forms, cum_weights=self.cumulative_frequencies)[0]
        value = form.sample(self.rng)
        split = HELD_OUT_PARTS.get(mix(self.seed, "split", repr(form.key(value))) % VALUE_PARTS, "train")
        if len(self.phrases[split]) >= self.quotas.get(split, 0):
            return False
        try:
            source, target = format_pair(self.locales, form, value)
            rivals = [format_pair(self.locales, rival, value) for rival in form.rivals]
        except LookupError:  # the tables lack an entry for this value
            return False
        text = visible_text(source)
        if any(visible_text(rival_source) == text and rival_target != target for rival_source, rival_target in rivals):
            self.registry.rivalled.add(text)
            return False
        words = {word: None for locale in self.locales for word in form.words(locale, value)}
        return self._add(split, Pair(self.category.name, source, target, is_name=False), tuple(words))

    def _add(self, split: Split, pair: Pair, words: Words) -> bool:
        if split != "train" and not self.registry.words.issuperset(words):
            return False
        is_added = self.registry.add(_Phrase(pair, words), self.phrases[split])
        if is_added and split == "train":
            self.registry.words.update(words)
        return is_added
