"""Find the categories of phrases that two locales can both print, by printing sampled values."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from random import Random
from typing import Any

from babel import Locale
from babel.units import UnknownUnitError

from common.machine.seeds import mix
from seq2seq.data.cldr.amounts import compact_forms, money_forms, number_forms, percent_forms, rate_forms, unit_forms
from seq2seq.data.cldr.forms import Category, Form, LocalePair, TextPair, visible_text
from seq2seq.data.cldr.names import dialects, enumerations, shared_names
from seq2seq.data.cldr.times import (
    date_forms,
    datetime_forms,
    format_relative,
    range_forms,
    relative_forms,
    time_forms,
)

CATEGORY_SHARES = {  # each category's fraction of the phrases of a split, if no category is left out
    **{"dates": 0.12, "times": 0.05, "datetimes": 0.07, "ranges": 0.08, "relative": 0.05},
    **{"money": 0.10, "rates": 0.05, "units": 0.11, "percentages": 0.04, "numbers": 0.05, "compact": 0.05},
    **{"countries": 0.07, "languages": 0.08, "currencies": 0.05, "calendar": 0.03},
}
MIN_NAMES = 12  # categories of names (countries, ...) with fewer are left out: they give hardly any combinations
PROBE_COUNT = 60  # number of sampled values with which each form is tested; see `printable_forms`
ROOT, JANUARY_IN_ROOT = "root", "M01"  # CLDR's root locale has no language; "M01" is its name of January


def available_categories(locales: LocalePair) -> tuple[list[Category], list[str], int]:
    """The categories that both locales can print, the names of all other categories, and the number of ambiguous names.

    Ambiguous names are left out of the categories; see `shared_names`.
    """
    names, ambiguous = shared_names(locales)
    if not _have_months(locales):
        names["calendar"] = {}
    names = {category: texts if len(texts) >= MIN_NAMES else {} for category, texts in names.items()}
    forms = _date_and_time_forms(locales) | _amount_forms(locales, [code for _, code in names["currencies"]])
    forms |= {category: enumerations(texts, locales) for category, texts in names.items() if texts}
    if names["languages"]:
        forms["languages"] += dialects(names["languages"] | names["countries"], locales)
    categories = [
        Category(name=name, forms=printable_forms(forms.get(name, []), locales), names=names.get(name, {}))
        for name in CATEGORY_SHARES
    ]
    return (
        [category for category in categories if category.forms],
        [category.name for category in categories if not category.forms],
        ambiguous,
    )


def _date_and_time_forms(locales: LocalePair) -> dict[str, list[Form]]:
    """The forms of each category of dates and times that both locales have.

    Times are always included. Dates, datetimes and ranges are included if both locales have names of months, and
    relative times if both have words for them.
    """
    root = independent_copy(Locale(ROOT))
    forms = {"times": time_forms()}
    if _have_months(locales):
        forms |= {"dates": date_forms(), "datetimes": datetime_forms(), "ranges": range_forms()}
    probe = ("day", 3)  # the root, and locales without words for relative times, print "+3 d"
    if all(format_relative("long", locale, probe) != format_relative("long", root, probe) for locale in locales):
        forms["relative"] = relative_forms()
    return forms


def _have_months(locales: LocalePair) -> bool:
    return all(locale.months["format"]["wide"][1] != JANUARY_IN_ROOT for locale in locales)


def _amount_forms(locales: LocalePair, currencies: list[Any]) -> dict[str, list[Form]]:
    forms = {"numbers": number_forms(), "percentages": percent_forms(), "compact": compact_forms()}
    forms["units"] = unit_forms()
    if currencies:
        forms |= {"money": money_forms(currencies, locales[0]), "rates": rate_forms(currencies, locales[0])}
    return forms


def independent_copy(locale: Locale) -> Locale:
    """A copy of the locale that shares no tables with other locales and in which omitted forms of units are filled in.

    In Babel, locales share the tables that they inherit from the root. Some entries of these tables are aliases:
    stand-alone months are an alias of months in a date. When a locale looks up an alias, Babel stores the locale's own
    words in the shared table. If `he` is used before `th`, `th` has Hebrew months.

    CLDR omits entries that can be inferred: a plural form that equals "other", and a unit's long form that equals its
    short form (Unicode Technical Standard 35, part 1, "Lateral Inheritance", and the root's aliases). Babel does not
    infer them: it prints the unit's identifier ("5 length-kilometer" in Chinese).
    """
    locale.languages  # noqa: B018 - loads all tables; `languages` itself contains no alias
    own = copy.deepcopy(locale)
    plurals = {*own.plural_form.tags, "other"}
    for lengths in own._data["unit_patterns"].values():
        short = _with_all_plurals(lengths.get("short", {}), plurals)
        for length in ("short", "long"):
            lengths[length] = short | _with_all_plurals(lengths.get(length, {}), plurals)
    return own


def _with_all_plurals(patterns: Mapping[str, str], plurals: Iterable[str]) -> dict[str, str]:
    """A unit's patterns by plural form; a missing pattern is replaced by that of "other", if "other" is present."""
    return dict.fromkeys(plurals, patterns["other"]) | dict(patterns) if "other" in patterns else dict(patterns)


def printable_forms(forms: list[Form], locales: LocalePair) -> list[Form]:
    """The forms of a category that both locales can print, with their rivals (Form.rivals) set.

    Each form prints PROBE_COUNT values. It is left out if it fails for any of them. It is also left out if, for at
    least half of them, the first form that prints the same source prints another target. For example, two forms print
    the Japanese source "2021年1月3日", one with the target "January 3, 2021" and the other with "Jan 3, 2021".
    """
    probes: dict[str, list[Any]] = {}  # values by kind
    earlier: dict[tuple[str, int, str], tuple[str, Form]] = {}  # (kind, number of the probe, source): (target, form)
    printable = []
    for form in forms:
        rng = Random(mix("probes", form.kind))
        values = probes.setdefault(form.kind, [form.sample(rng) for _ in range(PROBE_COUNT)])
        try:
            pairs = [format_pair(locales, form, value) for value in values]
        except LookupError:
            continue
        rivals = []
        for number, (source, target) in enumerate(pairs):
            earlier_target, earlier_form = earlier.get((form.kind, number, visible_text(source)), (target, form))
            rivals += [earlier_form] if earlier_target != target else []
        if 2 * len(rivals) >= PROBE_COUNT:
            continue
        for number, (source, target) in enumerate(pairs):
            earlier.setdefault((form.kind, number, visible_text(source)), (target, form))
        printable.append(replace(form, rivals=tuple({rival.name: rival for rival in rivals}.values())))
    return printable


def format_pair(locales: LocalePair, form: Form, value: Any) -> TextPair:
    """The value's text in both locales; raises LookupError if a locale cannot print it or prints only white space."""
    try:
        source, target = (form.format(locale, value) for locale in locales)
    except (UnknownUnitError, NotImplementedError) as error:
        raise LookupError(form.name) from error
    if not (source.strip() and target.strip()):
        raise LookupError(form.name)
    return source, target
