"""Which categories of phrases two locales have in common, found out by printing."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from random import Random
from typing import Any

from babel import Locale
from babel.units import UnknownUnitError

from common.machine.seeds import mix
from seq2seq.data.cldr.amounts import compact_forms, money_forms, number_forms, percent_forms, rate_forms, unit_forms
from seq2seq.data.cldr.forms import Both, Category, Form, Said, plain
from seq2seq.data.cldr.names import closed_lists, dialects, enumerations
from seq2seq.data.cldr.times import date_forms, datetime_forms, range_forms, relative, relative_forms, time_forms

SHARES = {  # of every split
    **{"dates": 0.12, "times": 0.05, "datetimes": 0.07, "ranges": 0.08, "relative": 0.05},
    **{"money": 0.10, "rates": 0.05, "units": 0.11, "percentages": 0.04, "numbers": 0.05, "compact": 0.05},
    **{"countries": 0.07, "languages": 0.08, "currencies": 0.05, "calendar": 0.03},
}
LEAST_NAMES = 12  # of a closed list; fewer give hardly any combinations
PROBES = 60  # values that show whether a form is there and says the same as another one
ROOT, UNNAMED = "root", "M01"  # the locale of what is not translated, and what it calls January


def categories(both: Both) -> tuple[list[Category], list[str], int]:
    """Those for which both locales have tables; the names of the others; and how many ambiguous names were left out."""
    names, ambiguous = closed_lists(both)
    if not _has_months(both):
        names["calendar"] = {}
    names = {name: said if len(said) >= LEAST_NAMES else {} for name, said in names.items()}
    forms = _dated_forms(both) | _amount_forms(both, [code for _, code in names["currencies"]])
    forms |= {name: enumerations(said, both) for name, said in names.items() if said}
    if names["languages"]:
        forms["languages"] += dialects(names["languages"] | names["countries"], both)
    found = [Category(name=name, forms=usable(forms.get(name, []), both), names=names.get(name, {})) for name in SHARES]
    return (
        [category for category in found if category.forms],
        [category.name for category in found if not category.forms],
        ambiguous,
    )


def _dated_forms(both: Both) -> dict[str, list[Form]]:
    """Nothing that has months where they have no names, nor distances in time where they are as in the root: +3 d."""
    root = own_tables(Locale(ROOT))
    forms = {"times": time_forms()}
    if _has_months(both):
        forms |= {"dates": date_forms(), "datetimes": datetime_forms(), "ranges": range_forms()}
    if all(relative("long", locale, ("day", 3)) != relative("long", root, ("day", 3)) for locale in both):
        forms["relative"] = relative_forms()
    return forms


def _has_months(both: Both) -> bool:
    return all(locale.months["format"]["wide"][1] != UNNAMED for locale in both)


def _amount_forms(both: Both, currencies: list[Any]) -> dict[str, list[Form]]:
    forms = {"numbers": number_forms(), "percentages": percent_forms(), "compact": compact_forms()}
    forms["units"] = unit_forms()
    if currencies:
        forms |= {"money": money_forms(currencies, both[0]), "rates": rate_forms(currencies, both[0])}
    return forms


def own_tables(locale: Locale) -> Locale:
    """The same locale with tables that no other one shares, and with the units that it inherits from itself.

    Babel's locales share what they inherit from the root, and whichever first looks up an alias there ("months that
    stand alone are called as in a date") writes its own words into all others: after `he`, `th` has Hebrew months.

    CLDR leaves out what can be inferred (Unicode Technical Standard 35, part 1, "Lateral Inheritance" and the root's
    aliases): a plural form that is like "other", and a long unit that is like the short one. Where it does, Babel would
    print an amount and the unit's name in place of a phrase ("5 length-kilometer" in Chinese), and so it is filled in.
    """
    locale.languages  # noqa: B018 - the tables are read at first use, and this one has no alias
    own = copy.deepcopy(locale)
    plurals = {*own.plural_form.tags, "other"}
    for lengths in own._data["unit_patterns"].values():
        short = _all_plurals(lengths.get("short", {}), plurals)
        for length in ("short", "long"):
            lengths[length] = short | _all_plurals(lengths.get(length, {}), plurals)
    return own


def _all_plurals(patterns: Mapping[str, str], plurals: Iterable[str]) -> dict[str, str]:
    """A unit's patterns by plural form, those that are missing as the one for "other"."""
    return dict.fromkeys(plurals, patterns["other"]) | dict(patterns) if "other" in patterns else dict(patterns)


def usable(forms: list[Form], both: Both) -> list[Form]:
    """The forms that both locales can print, each with its rivals: earlier ones that sometimes are the same text.

    A form is left out if most of its values are, in the source, the same text as those of earlier forms, but not in the
    target: "2021年1月3日" is both "January 3, 2021" and "Jan 3, 2021".
    """
    probes: dict[str, list[Any]] = {}
    holders: dict[tuple[str, int, str], tuple[str, Form]] = {}
    kept = []
    for form in forms:
        random = Random(mix("probes", form.kind))
        values = probes.setdefault(form.kind, [form.draw(random) for _ in range(PROBES)])
        try:
            said = [said_in(both, form, value) for value in values]
        except LookupError:
            continue
        rivals = []
        for number, (source, target) in enumerate(said):
            held, holder = holders.get((form.kind, number, plain(source)), (target, form))
            rivals += [holder] if held != target else []
        if 2 * len(rivals) >= PROBES:
            continue
        for number, (source, target) in enumerate(said):
            holders.setdefault((form.kind, number, plain(source)), (target, form))
        kept.append(replace(form, rivals=tuple({rival.name: rival for rival in rivals}.values())))
    return kept


def said_in(both: Both, form: Form, value: Any) -> Said:
    """What both locales print; raises LookupError where the tables of one, or Babel, do not cover it."""
    try:
        source, target = (form.show(locale, value) for locale in both)
    except (UnknownUnitError, NotImplementedError) as error:
        raise LookupError(form.name) from error
    if not (source.strip() and target.strip()):
        raise LookupError(form.name)
    return source, target
