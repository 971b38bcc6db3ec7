"""Names of countries, languages, currencies, months and weekdays in two locales, and the forms that combine them."""

from collections.abc import Callable, Mapping
from datetime import date
from random import Random
from typing import Any, Literal

from babel import Locale, lists, localedata, numbers

from seq2seq.data.cldr.forms import Form, Formatter, LocalePair, Name, TextPair, visible_text

CURRENCY_DATE = date(2020, 1, 1)  # fixed: with the currencies of today, the data would change over time
# The numbers of names in an enumeration, and their relative frequencies.
LIST_LENGTHS, LIST_LENGTH_FREQUENCIES = (2, 3, 4), (5, 3, 1)


def shared_names(locales: LocalePair) -> tuple[dict[str, dict[Name, TextPair]], int]:
    """The names that both locales have, by category, and the number of ambiguous names, which are left out.

    A name is ambiguous if an earlier name, of any category, has the same source text but another target text.
    """
    targets: dict[str, str] = {}  # by visible text of the source
    names: dict[str, dict[Name, TextPair]] = {}
    ambiguous = 0
    for category, read in _LISTS.items():
        sources_by_name, targets_by_name = map(read, locales)
        names[category] = {}
        for name in [name for name in sources_by_name if name in targets_by_name]:
            source, target = sources_by_name[name], targets_by_name[name]
            if targets.setdefault(visible_text(source), target) == target:
                names[category][name] = (source, target)
            else:
                ambiguous += 1
    return names, ambiguous


def _calendar(locale: Locale) -> dict[Name, str]:
    """Months, weekdays and quarters in their stand-alone forms: first the full names ("wide"), then abbreviations."""
    names: dict[Name, str] = {}
    for width in ("wide", "abbreviated"):
        for unit, table in (("months", locale.months), ("weekdays", locale.days), ("quarters", locale.quarters)):
            texts = table["stand-alone"][width]
            names |= {(f"{width} {unit}", code): texts[code] for code in sorted(texts)}
    return names


def _countries(locale: Locale) -> dict[Name, str]:
    return _names_by_code("countries", locale.territories, _is_country)


def _currencies(locale: Locale) -> dict[Name, str]:
    """The currencies that were legal tender in some country on CURRENCY_DATE."""
    territories = filter(_is_country, Locale("en").territories)
    in_use = {code for territory in territories for code in numbers.get_territory_currencies(territory, CURRENCY_DATE)}
    return _names_by_code("currencies", locale.currencies, in_use.__contains__)


def _languages(locale: Locale) -> dict[Name, str]:
    return _names_by_code("languages", locale.languages, _is_language)


_LISTS = {"calendar": _calendar, "countries": _countries, "currencies": _currencies, "languages": _languages}


def _names_by_code(list_name: str, table: Any, is_included: Callable[[str], bool]) -> dict[Name, str]:
    return {(list_name, code): table[code] for code in sorted(table) if is_included(code)}


def _is_country(code: str) -> bool:
    """Whether a territory code of CLDR stands for a country or for a territory of a country.

    Other codes are numbers (continents and regions), unions (EU, EZ, UN), outlying Oceania (QO), pseudo-locales (XA,
    XB) and "unknown" (ZZ).
    """
    return len(code) == 2 and code.isalpha() and code not in ("EU", "EZ", "QO", "UN", "XA", "XB", "ZZ")


def _is_language(code: str) -> bool:
    """Whether a code of CLDR stands for one language without a country or script: de, but not de_AT.

    The codes mis, mul, und and zxx are excluded. They stand for an uncoded language, several languages, an undetermined
    language and no language.
    """
    return len(code) in (2, 3) and code.isalpha() and code not in ("mis", "mul", "und", "zxx")


def enumerations(names: Mapping[Name, TextPair], locales: LocalePair) -> list[Form]:
    """Forms of enumerations: two to four names of one list (countries, say), joined by "and" or by "or"."""
    names_by_list: dict[str, list[Name]] = {}
    for name in names:
        names_by_list.setdefault(name[0], []).append(name)
    candidates = [name for name in names if len(names_by_list[name[0]]) > 1]

    def sample(rng: Random) -> tuple[Name, ...]:
        members = names_by_list[rng.choice(candidates)[0]]
        return tuple(rng.sample(members, min(len(members), rng.choices(LIST_LENGTHS, LIST_LENGTH_FREQUENCIES)[0])))

    def formatter(style: Literal["standard", "or"]) -> Formatter:
        return lambda locale, value: lists.format_list(
            [names[name][locales.index(locale)] for name in value], style, locale
        )

    return [
        Form(
            name=name,
            kind="list",
            sample=sample,
            format=format,
            key=lambda value: tuple(sorted(value)),  # the same names in another order have the same key
            words=lambda locale, value: value,
            frequency=frequency,
        )
        for name, format, frequency in (("and", formatter("standard"), 3.0), ("or", formatter("or"), 1.0))
    ]


def dialects(names: Mapping[Name, TextPair], locales: LocalePair) -> list[Form]:
    """The form of languages with a country, a script or both: "German (Austria)".

    The form prints the combinations for which CLDR has a locale without a variant, and for which both `locales` have
    the names of all parts. If there are no such combinations, the list of forms is empty.
    """
    parts_by_dialect: dict[Locale, tuple[Name, ...]] = {}
    for locale in map(Locale.parse, sorted(localedata.locale_identifiers())):
        codes = {"languages": locale.language, "countries": locale.territory, "scripts": locale.script}
        parts = tuple((list_name, code) for list_name, code in codes.items() if code)
        has_names = all(part in names or part[0] == "scripts" for part in parts)
        has_script = not locale.script or all(locale.script in each.scripts for each in locales)
        if has_names and has_script and len(parts) > 1 and not locale.variant:
            parts_by_dialect[locale] = parts
    if not parts_by_dialect:
        return []
    choices = list(parts_by_dialect)
    return [
        Form(
            name="dialect",
            kind="dialect",
            sample=lambda rng: rng.choice(choices),
            format=lambda locale, value: value.get_display_name(locale),
            key=lambda value: ("dialect", str(value)),
            words=lambda locale, value: parts_by_dialect[value],
        )
    ]
