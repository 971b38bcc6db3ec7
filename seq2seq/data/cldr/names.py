"""Closed lists of names in two locales, and what they are combined to: countries, languages, currencies, months."""

from collections.abc import Callable, Mapping
from datetime import date
from random import Random
from typing import Any, Literal

from babel import Locale, lists, localedata, numbers

from seq2seq.data.cldr.forms import Both, Form, Name, Said, Show, plain

IN_USE = date(2020, 1, 1)  # the currencies of a fixed day, because today's would change the data over time
COUNTS, OFTEN = (2, 3, 4), (5, 3, 1)  # names in a list, and how often as many


def closed_lists(both: Both) -> tuple[dict[str, dict[Name, Said]], int]:
    """The names that both locales have, by category; and how many had to be left out because they are ambiguous.

    Those are the names that the source calls as an earlier one, of this list or of another, and the target does not.
    """
    taken: dict[str, str] = {}
    found: dict[str, dict[Name, Said]] = {}
    dropped = 0
    for category, read in _LISTS.items():
        ours, theirs = map(read, both)
        found[category] = {}
        for name in [name for name in ours if name in theirs]:
            if taken.setdefault(plain(ours[name]), theirs[name]) == theirs[name]:
                found[category][name] = (ours[name], theirs[name])
            else:
                dropped += 1
    return found, dropped


def _calendar(locale: Locale) -> dict[Name, str]:
    """Months, weekdays and quarters as they stand alone, the wide ones first."""
    found: dict[Name, str] = {}
    for width in ("wide", "abbreviated"):
        for of, table in (("months", locale.months), ("weekdays", locale.days), ("quarters", locale.quarters)):
            said = table["stand-alone"][width]
            found |= {(f"{width} {of}", code): said[code] for code in sorted(said)}
    return found


def _countries(locale: Locale) -> dict[Name, str]:
    return _coded("countries", locale.territories, _is_country)


def _currencies(locale: Locale) -> dict[Name, str]:
    """Those that were legal tender somewhere in 2020; the others are history."""
    territories = filter(_is_country, Locale("en").territories)
    in_use = {code for one in territories for code in numbers.get_territory_currencies(one, IN_USE)}
    return _coded("currencies", locale.currencies, in_use.__contains__)


def _languages(locale: Locale) -> dict[Name, str]:
    return _coded("languages", locale.languages, _is_language)


_LISTS = {"calendar": _calendar, "countries": _countries, "currencies": _currencies, "languages": _languages}


def _coded(of: str, table: Any, wanted: Callable[[str], bool]) -> dict[Name, str]:
    return {(of, code): table[code] for code in sorted(table) if wanted(code)}


def _is_country(code: str) -> bool:
    """Whether it is ISO 3166's code of one: unions, outlying Oceania, pseudo-accents and "unknown" are none."""
    return len(code) == 2 and code.isalpha() and code not in ("EU", "EZ", "QO", "UN", "XA", "XB", "ZZ")


def _is_language(code: str) -> bool:
    """Whether it is ISO 639's code of one; variants by country or script are said by `dialects`."""
    return len(code) in (2, 3) and code.isalpha() and code not in ("mis", "mul", "und", "zxx")


def enumerations(names: Mapping[Name, Said], both: Both) -> list[Form]:
    """Two to four names of one list, joined by "and" or "or"."""
    lists_of: dict[str, list[Name]] = {}
    for name in names:
        lists_of.setdefault(name[0], []).append(name)
    several = [name for name in names if len(lists_of[name[0]]) > 1]

    def draw(random: Random) -> tuple[Name, ...]:
        among = lists_of[random.choice(several)[0]]
        return tuple(random.sample(among, min(len(among), random.choices(COUNTS, OFTEN)[0])))

    def show(style: Literal["standard", "or"]) -> Show:
        return lambda locale, value: lists.format_list(
            [names[name][both.index(locale)] for name in value], style, locale
        )

    return [
        Form(
            name=name,
            kind="list",
            draw=draw,
            show=printer,
            key=lambda value: tuple(sorted(value)),  # the same names in another order are no news
            words=lambda locale, value: value,
            weight=weight,
        )
        for name, printer, weight in (("and", show("standard"), 3.0), ("or", show("or"), 1.0))
    ]


def dialects(names: Mapping[Name, Said], both: Both) -> list[Form]:
    """Languages with their country, script or both, of which CLDR has a locale: "German (Austria)"."""
    known: dict[Locale, tuple[Name, ...]] = {}
    for locale in map(Locale.parse, sorted(localedata.locale_identifiers())):
        codes = {"languages": locale.language, "countries": locale.territory, "scripts": locale.script}
        parts = tuple((of, code) for of, code in codes.items() if code)
        named = all(part in names or part[0] == "scripts" for part in parts)
        written = not locale.script or all(locale.script in one.scripts for one in both)
        if named and written and len(parts) > 1 and not locale.variant:
            known[locale] = parts
    if not known:
        return []
    choices = list(known)
    return [
        Form(
            name="dialect",
            kind="dialect",
            draw=lambda random: random.choice(choices),
            show=lambda locale, value: value.get_display_name(locale),
            key=lambda value: ("dialect", str(value)),
            words=lambda locale, value: known[value],
        )
    ]
