"""Forms (ways to print values, see forms.py) of numbers, percentages, money and measures in any locale.

The formats are those of Unicode Technical Standard 35, parts 2 and 3, as Babel implements them.
"""

from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from random import Random
from typing import Any

from babel import Locale, lists, numbers, units

from seq2seq.data.cldr.forms import Form, Words, visible_text

Length = Any  # "long" or "short"; Any, because Babel annotates it as a Literal
Price = tuple[str, Decimal]  # a currency's code and an amount

MEASURES = {
    "length": "kilometer meter centimeter millimeter mile yard foot inch nautical-mile light-year",
    "mass": "tonne kilogram gram milligram pound ounce",
    "volume": "liter milliliter cubic-meter gallon pint cup tablespoon teaspoon",
    "area": "square-kilometer square-meter hectare acre",
    "temperature": "celsius fahrenheit kelvin",
    "speed": "kilometer-per-hour meter-per-second mile-per-hour knot",
    "duration": "century year month week day hour minute second millisecond",
    "digital": "terabyte gigabyte megabyte kilobyte byte bit",
    "energy": "kilowatt-hour joule",
    "power": "kilowatt watt horsepower",
    "frequency": "hertz megahertz",
    "pressure": "bar hectopascal",
    "electric": "volt ampere",
    "angle": "degree",
}
UNITS = [f"{quantity}-{name}" for quantity, names in MEASURES.items() for name in names.split()]
MIXED_UNITS = (  # for amounts such as 5 feet 3 inches: the larger unit, the smaller unit, and their ratio
    *(("duration-day", "duration-hour", 24), ("duration-hour", "duration-minute", 60)),
    *(("duration-minute", "duration-second", 60), ("duration-year", "duration-month", 12)),
    *(("length-foot", "length-inch", 12), ("mass-pound", "mass-ounce", 16)),
    *(("length-kilometer", "length-meter", 1000), ("mass-kilogram", "mass-gram", 1000)),
)
PRICED_UNITS = ("mass-kilogram", "volume-liter", "duration-hour", "duration-day", "duration-month", "area-square-meter")
UNIT_RATES = (  # units of rates such as liters per minute: numerator and denominator
    *(("volume-liter", "duration-minute"), ("volume-liter", "duration-hour"), ("mass-gram", "volume-liter")),
    *(("digital-megabyte", "duration-second"), ("energy-kilowatt-hour", "duration-day")),
    *(("length-meter", "duration-minute"), ("mass-kilogram", "area-square-meter")),
)


def number_forms() -> list[Form]:
    """Forms of whole numbers and of decimal numbers; both are negative with a probability of 1/4."""
    format = lambda locale, value: numbers.format_decimal(value, locale=locale)  # noqa: E731
    return [
        Form(name="whole", kind="whole", sample=_sample_whole, format=format, key=_key("number")),
        Form(name="decimal", kind="decimal", sample=_sample_decimal, format=format, key=_key("number")),
    ]


def percent_forms() -> list[Form]:
    """Forms of percentages with up to two decimals."""

    def format(locale: Locale, value: Decimal) -> str:
        return numbers.format_percent(value, locale=locale, decimal_quantization=False)  # keeps all decimals

    return [Form(name="percent", kind="percent", sample=_sample_share, format=format, key=_key("percent"))]


def compact_forms() -> list[Form]:
    """Forms of numbers from thousands to billions in words ("1.2 million") and abbreviated ("1.2M").

    Values have at most three significant digits, all of which are printed.
    """

    def format(length: Length, locale: Locale, value: int) -> str:
        length = length if length in locale.compact_decimal_formats else "short"  # "long" may be an alias of "short"
        return numbers.format_compact_decimal(value, format_type=length, locale=locale, fraction_digits=2)

    def words(length: str, locale: Locale, value: int) -> Words:
        leading = Decimal(value).scaleb(-3 * ((len(str(value)) - 1) // 3))
        return ((str(locale), length, len(str(value)), locale.plural_form(leading)),)

    return [
        Form(
            name=length,
            kind="compact",
            sample=_sample_round,
            format=partial(format, length),
            key=_key("compact"),
            words=partial(words, length),
            frequency=frequency,
        )
        for length, frequency in (("long", 2.0), ("short", 1.0))
    ]


def money_forms(currencies: Sequence[str], source: Locale) -> list[Form]:
    """Forms of amounts of money: with the currency's symbol, with its name, and compact ("$1.2M").

    `currencies` are codes (EUR). Only currencies with a unique symbol in the locale `source` are printed by symbol or
    in compact form.
    """
    distinct = with_unique_symbols(currencies, source)
    return [
        Form(
            name="symbol",
            kind="money",
            sample=_amount_sampler(distinct),
            format=lambda locale, value: numbers.format_currency(value[1], value[0], locale=locale),
            key=_key("money"),
            words=_symbol_word,
            frequency=2.0,
        ),
        Form(
            name="name",
            kind="named money",
            sample=_amount_sampler(currencies),
            format=lambda locale, value: numbers.format_currency(value[1], value[0], locale=locale, format_type="name"),
            key=_key("money"),
            words=lambda locale, value: (("name", str(locale), value[0], locale.plural_form(value[1])),),
            frequency=2.0,
        ),
        Form(
            name="compact",
            kind="compact money",
            sample=lambda rng: (rng.choice(distinct), _sample_round(rng)),
            format=_format_compact_currency,
            key=_key("money"),
            words=lambda locale, value: (*_symbol_word(locale, value), ("compact", len(str(value[1])))),
        ),
    ]


def rate_forms(currencies: Sequence[str], source: Locale) -> list[Form]:
    """Forms of prices per unit ("$5 per hour") and of measures per unit ("3 grams per liter").

    The arguments are those of `money_forms`.
    """
    distinct = with_unique_symbols(currencies, source)
    forms = [
        Form(
            name=f"price per {unit}",
            kind="price",
            sample=_amount_sampler(distinct, max_exponent=4),
            format=partial(_format_price, unit),
            key=_key(f"price per {unit}"),
            words=partial(_price_words, unit),
        )
        for unit in PRICED_UNITS
    ]
    for unit, per in UNIT_RATES:
        for length in ("long", "short"):
            forms.append(
                Form(
                    name=f"{length} {unit} per {per}",
                    kind="flow",
                    sample=_sample_quantity,
                    format=partial(_format_unit_rate, unit, per, length),
                    key=_key(f"{unit} per {per}"),
                    words=_plural_word(f"{length} {unit} per {per}"),
                    frequency=0.5,
                )
            )
    return forms


def unit_forms() -> list[Form]:
    """Forms of measures: with the unit's name, with its abbreviation, and in two units ("5 hours and 3 minutes")."""
    single = [
        Form(
            name=f"{length} {unit}",
            kind="unit",
            sample=_sample_quantity,
            format=partial(_format_unit, unit, length),
            key=_key(unit),
            words=_plural_word(f"{length} {unit}"),
            frequency=frequency,
        )
        for length, frequency in (("long", 2.0), ("short", 1.0))
        for unit in UNITS
    ]
    mixed = [
        Form(
            name=f"{first} and {second}",
            kind="mixed",
            sample=partial(_sample_parts, ratio),
            format=partial(_format_mixed, first, second),
            key=_key(f"{first} and {second}"),
            words=partial(_mixed_words, first, second),
            frequency=3.0,
        )
        for first, second, ratio in MIXED_UNITS
    ]
    return single + mixed


def with_unique_symbols(currencies: Sequence[str], locale: Locale) -> list[str]:
    """The currencies whose symbol in this locale differs from the symbols of all other `currencies`."""
    symbols = [visible_text(numbers.get_currency_symbol(code, locale)) for code in currencies]
    return [code for code, symbol in zip(currencies, symbols, strict=True) if symbols.count(symbol) == 1]


# Random values.


def _sample_whole(rng: Random) -> int:
    return rng.choice((1, 1, 1, -1)) * int(10 ** rng.uniform(0, 9))


def _sample_decimal(rng: Random) -> Decimal:
    """A positive or negative number with one to three decimals, the last of which is not zero."""
    places = rng.randint(1, 3)
    digits = int(10 ** rng.uniform(places, places + 5))
    return rng.choice((1, 1, 1, -1)) * Decimal(digits + (digits % 10 == 0)).scaleb(-places)


def _sample_share(rng: Random) -> Decimal:
    """A percentage as a fraction of 1 (0.05 is 5 %).

    Half of the values are whole percentages up to 1,000; the others are percentages up to 100 with up to two decimals.
    """
    places = rng.choice((0, 0, 1, 2))
    digits = rng.randint(1, 10 ** (3 if places == 0 else 2 + places))
    return Decimal(digits).scaleb(-places - 2).normalize()


def _sample_round(rng: Random) -> int:
    """A whole number of one to three digits followed by zeros, from a thousand to below a trillion."""
    digits = rng.randint(1, 10 ** rng.choice((1, 2, 3, 3)) - 1)
    return digits * int(10 ** rng.randint(4 - len(str(digits)), 12 - len(str(digits))))


def _amount_sampler(currencies: Sequence[str], max_exponent: int = 6) -> Callable[[Random], Price]:
    """A function that samples a currency and an amount from 1 to 10 ** max_exponent.

    The amount is whole or has the currency's usual number of decimals.
    """

    def sample(rng: Random) -> Price:
        code = rng.choice(currencies)
        places = numbers.get_currency_precision(code)
        amount = Decimal(str(10 ** rng.uniform(0, max_exponent))).quantize(Decimal(1).scaleb(-places))
        return code, amount if rng.random() < 0.7 else amount.quantize(Decimal(1))

    return sample


def _sample_quantity(rng: Random) -> int | Decimal:
    """A number of units: mostly whole, sometimes with one decimal; small numbers are more frequent."""
    if rng.random() < 0.35:
        digits = int(10 ** rng.uniform(0, 3))
        return Decimal(digits + (digits % 10 == 0)).scaleb(-1)
    return int(10 ** rng.uniform(0, rng.choice((2, 3, 5))))


def _sample_parts(ratio: int, rng: Random) -> tuple[int, int]:
    """Counts of a larger and a smaller unit; one larger unit equals `ratio` smaller units."""
    return rng.randint(1, 99), rng.randrange(1, ratio)


# Formatters.


def _format_unit(unit: str, length: Length, locale: Locale, value: int | Decimal) -> str:
    return _require_translation(unit, units.format_unit(value, unit, length, locale=locale))


def _format_mixed(first: str, second: str, locale: Locale, value: tuple[int, int]) -> str:
    parts = [_format_unit(unit, "long", locale, count) for unit, count in zip((first, second), value, strict=True)]
    return lists.format_list(parts, "standard", locale)


def _format_price(unit: str, locale: Locale, value: Price) -> str:
    amount = numbers.format_currency(value[1], value[0], locale=locale)
    return _require_translation(unit, units.format_compound_unit(amount, denominator_unit=unit, locale=locale))


def _format_unit_rate(unit: str, per: str, length: Length, locale: Locale, value: int | Decimal) -> str:
    text = units.format_compound_unit(value, unit, denominator_unit=per, length=length, locale=locale)
    return _require_translation(unit, _require_translation(per, text))


def _require_translation(unit: str, text: str | None) -> str:
    """Return `text`; raises LookupError if it is empty or contains the unit's identifier instead of a translation."""
    if not text or unit in text:
        raise LookupError(unit)
    return text


def _format_compact_currency(locale: Locale, value: tuple[str, int]) -> str:
    return numbers.format_compact_currency(value[1], value[0], locale=locale, fraction_digits=2)


# Keys and words of values; see Form.


def _key(name: str) -> Callable[[Any], tuple[str, str]]:
    return lambda value: (name, str(value))


def _symbol_word(locale: Locale, value: tuple[str, Any]) -> Words:
    return (("symbol", value[0]),)


def _price_words(unit: str, locale: Locale, value: Price) -> Words:
    return (*_symbol_word(locale, value), ("per", unit))


def _plural_word(name: str) -> Callable[[Locale, Any], Words]:
    return lambda locale, value: ((str(locale), name, locale.plural_form(value)),)


def _mixed_words(first: str, second: str, locale: Locale, value: tuple[int, int]) -> Words:
    return tuple(
        (str(locale), f"mixed {unit}", locale.plural_form(count))
        for unit, count in zip((first, second), value, strict=True)
    )
