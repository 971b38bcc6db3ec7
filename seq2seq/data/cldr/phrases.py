"""Pairs of phrases that Babel prints for one value in two locales, drawn by category and cut into splits."""

import itertools
from collections.abc import Hashable, Mapping
from random import Random
from typing import NamedTuple

from babel import Locale

from common.errors import UserError
from common.machine.seeds import mix
from common.task import Split
from seq2seq.data.cldr.forms import Both, Category, Words, plain
from seq2seq.data.cldr.tables import SHARES, categories, own_tables, said_in

PARTS: dict[int, Split] = {0: "test", 1: "val"}  # of twenty parts of all values; the others are for train
PATIENCE = 5000  # draws in a row that bring nothing new


class Pair(NamedTuple):
    """One phrase in both languages; `is_closed` for a single name of a closed list, which is always in train."""

    category: str
    source: str
    target: str
    is_closed: bool


class Drawn(NamedTuple):
    """The splits, and what to tell about them."""

    splits: dict[Split, list[Pair]]
    missing: list[str]  # categories for which a locale lacks the tables
    ambiguous: int  # phrases and names left out because their source would have two targets


def pairs(source: Locale, target: Locale, *, seed: int, counts: Mapping[Split, int]) -> Drawn:
    """Phrases of every category that both locales have: a function of the arguments and Babel's tables alone.

    No source comes twice, not with other spaces either, and none has two targets. A value (a date, an amount, a set of
    names) is in one split only, and in the same one for any `counts`. Of the names and word forms in val and test there
    is none that train does not show. Each category has its share of every split; only where train has little room, its
    single names take more. Raises UserError when the counts cannot be met.
    """
    both = (own_tables(source), own_tables(target))
    found, missing, ambiguous = categories(both)
    assert found, "numbers need no tables"
    book = _Book()
    pools = [_Pool(category, both, seed, book) for category in found]
    for split, count in counts.items():
        quotas = shares(split, count, {pool.category.name: len(pool.kept[split]) for pool in pools})
        for pool in pools:
            pool.quotas[split] = quotas[pool.category.name]
    while any(pool.lacking() for pool in pools):  # more than once where categories turn out to share a source
        for pool in pools:
            pool.fill()
        book.take_stock(pools)
    splits = {split: [phrase.pair for pool in pools for phrase in pool.kept[split].values()] for split in counts}
    for split, drawn in splits.items():
        Random(mix(seed, "order", split)).shuffle(drawn)
    return Drawn(splits, missing, ambiguous + len(book.ambiguous | book.held))


def shares(split: Split, count: int, least: Mapping[str, int]) -> dict[str, int]:
    """How many of `count` phrases are of each category of `least`: by SHARES, but at least so many.

    With shares of 0.12 and 0.03, and at least 0 and 4, ten are 6 and 4, and a hundred are 80 and 20. Raises UserError
    when `count` is less than all that there must be.
    """
    if sum(least.values()) > count:
        raise UserError(
            f"data.{split}_count={count}: the names of countries, languages, currencies, months and weekdays are "
            f"{sum(least.values()):,} phrases, all of which training needs; give more."
        )
    bound: set[str] = set()
    while True:
        free = [name for name in least if name not in bound]
        scale = (count - sum(least[name] for name in bound)) / sum(SHARES[name] for name in free)
        short = {name for name in free if SHARES[name] * scale < least[name]}
        if not short:
            break
        bound |= short
    quotas = {name: least[name] if name in bound else int(SHARES[name] * scale) for name in least}
    rounded_off = sorted(free, key=lambda name: quotas[name] - SHARES[name] * scale)
    for name in rounded_off[: count - sum(quotas.values())]:
        quotas[name] += 1
    return quotas


class _Phrase(NamedTuple):
    pair: Pair
    words: Words


class _Book:
    """What the categories have to know of each other: the sources in use, and the words in train."""

    def __init__(self) -> None:
        self.places: dict[str, tuple[_Phrase, dict[str, _Phrase]]] = {}  # by source: a phrase and what it is kept in
        self.ambiguous: set[str] = set()  # sources that two categories give different targets
        self.held: set[str] = set()  # sources that a form left to an earlier one
        self.words: set[Hashable] = set()

    def enter(self, phrase: _Phrase, kept: dict[str, _Phrase]) -> bool:
        """Keep a phrase unless its source is in use; where that has another target neither stays, but for names."""
        text = plain(phrase.pair.source)
        if text in self.ambiguous:
            return False
        if text not in self.places:
            self.places[text] = phrase, kept
            kept[text] = phrase
            return True
        other, place = self.places[text]
        if other.pair.target != phrase.pair.target:
            self.ambiguous.add(text)
            if not other.pair.is_closed:
                del place[text]
        return False

    def take_stock(self, pools: "list[_Pool]") -> None:
        """Count train's words again, since phrases were taken out of it, and take what has others out of val and test.

        Usually there are none.
        """
        self.words = {word for pool in pools for phrase in pool.kept["train"].values() for word in phrase.words}
        for kept in [pool.kept[split] for pool in pools for split in PARTS.values()]:
            for text in [text for text, phrase in kept.items() if not self.words.issuperset(phrase.words)]:
                del kept[text], self.places[text]


class _Pool:
    """One category's phrases, drawn until every split has its share."""

    def __init__(self, category: Category, both: Both, seed: int, book: _Book):
        self.category, self.both, self.seed, self.book = category, both, seed, book
        self.random = Random(mix(seed, "phrases", category.name))
        self.weights = list(itertools.accumulate(form.weight for form in category.forms))
        self.kept: dict[Split, dict[str, _Phrase]] = {"train": {}, "val": {}, "test": {}}
        self.quotas: dict[Split, int] = {}
        for name, (source, target) in category.names.items():
            self._keep("train", Pair(category.name, source, target, is_closed=True), (name,))

    def lacking(self) -> list[Split]:
        """The splits that are not full."""
        return [split for split, quota in self.quotas.items() if len(self.kept[split]) < quota]

    def fill(self) -> None:
        """Draw until every split is full; raises UserError when nothing new comes any more."""
        idle = 0
        while lacking := self.lacking():
            idle = 0 if self._draw() else idle + 1
            if idle == PATIENCE:
                name, split, quota = self.category.name, lacking[0], self.quotas[lacking[0]]
                raise UserError(
                    f"data.{split}_count asks for {quota:,} phrases of {name}, and {self.both[0]} and {self.both[1]} "
                    f"give only about {len(self.kept[split]):,}; give a lower count."
                )

    def _draw(self) -> bool:
        form = self.random.choices(self.category.forms, cum_weights=self.weights)[0]
        value = form.draw(self.random)
        split = PARTS.get(mix(self.seed, "split", repr(form.key(value))) % 20, "train")
        if len(self.kept[split]) >= self.quotas.get(split, 0):
            return False
        try:
            source, target = said_in(self.both, form, value)
            rivals = [said_in(self.both, rival, value) for rival in form.rivals]
        except LookupError:  # a hole in a table that has the rest
            return False
        if any(plain(theirs) == plain(source) and meant != target for theirs, meant in rivals):
            self.book.held.add(plain(source))
            return False
        words = {word: None for locale in self.both for word in form.words(locale, value)}
        return self._keep(split, Pair(self.category.name, source, target, is_closed=False), tuple(words))

    def _keep(self, split: Split, pair: Pair, words: Words) -> bool:
        if split != "train" and not self.book.words.issuperset(words):
            return False
        kept = self.book.enter(_Phrase(pair, words), self.kept[split])
        if kept and split == "train":
            self.book.words.update(words)
        return kept
