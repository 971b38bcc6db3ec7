"""Numbers, percentages, money and measures, as any locale prints them (Unicode Technical Standard 35, parts 2, 3)."""

from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from random import Random
from typing import Any

from babel import Locale, lists, numbers, units

from seq2seq.data.cldr.forms import Form, Words, plain

Length = Any  # "long" or "short", which Babel types as literals
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
MIXED = (  # one amount in two units, and how many of the smaller one make one of the larger
    *(("duration-day", "duration-hour", 24), ("duration-hour", "duration-minute", 60)),
    *(("duration-minute", "duration-second", 60), ("duration-year", "duration-month", 12)),
    *(("length-foot", "length-inch", 12), ("mass-pound", "mass-ounce", 16)),
    *(("length-kilometer", "length-meter", 1000), ("mass-kilogram", "mass-gram", 1000)),
)
PRICED = ("mass-kilogram", "volume-liter", "duration-hour", "duration-day", "duration-month", "area-square-meter")
FLOWS = (
    *(("volume-liter", "duration-minute"), ("volume-liter", "duration-hour"), ("mass-gram", "volume-liter")),
    *(("digital-megabyte", "duration-second"), ("energy-kilowatt-hour", "duration-day")),
    *(("length-meter", "duration-minute"), ("mass-kilogram", "area-square-meter")),
)


def number_forms() -> list[Form]:
    """Whole and decimal numbers, some of them negative."""
    show = lambda locale, value: numbers.format_decimal(value, locale=locale)  # noqa: E731
    return [
        Form(name="whole", kind="whole", draw=_whole, show=show, key=_named("number")),
        Form(name="decimal", kind="decimal", draw=_decimal, show=show, key=_named("number")),
    ]


def percent_forms() -> list[Form]:
    """Percentages with up to two decimals."""

    def show(locale: Locale, value: Decimal) -> str:
        return numbers.format_percent(value, locale=locale, decimal_quantization=False)  # keeps all decimals

    return [Form(name="percent", kind="percent", draw=_share, show=show, key=_named("percent"))]


def compact_forms() -> list[Form]:
    """Thousands to billions in words and in short, with three digits that both languages print in full."""

    def show(length: Length, locale: Locale, value: int) -> str:
        length = length if length in locale.compact_decimal_formats else "short"  # CLDR's own alias in the root
        return numbers.format_compact_decimal(value, format_type=length, locale=locale, fraction_digits=2)

    def words(length: str, locale: Locale, value: int) -> Words:
        leading = Decimal(value).scaleb(-3 * ((len(str(value)) - 1) // 3))
        return ((str(locale), length, len(str(value)), locale.plural_form(leading)),)

    return [
        Form(
            name=length,
            kind="compact",
            draw=_round,
            show=partial(show, length),
            key=_named("compact"),
            words=partial(words, length),
            weight=weight,
        )
        for length, weight in (("long", 2.0), ("short", 1.0))
    ]


def money_forms(currencies: Sequence[str], source: Locale) -> list[Form]:
    """Amounts with the currency's symbol, with its name, and in short."""
    known = told_apart(currencies, source)
    return [
        Form(
            name="symbol",
            kind="money",
            draw=_amount(known),
            show=lambda locale, value: numbers.format_currency(value[1], value[0], locale=locale),
            key=_named("money"),
            words=_symbol,
            weight=2.0,
        ),
        Form(
            name="name",
            kind="named money",
            draw=_amount(currencies),
            show=lambda locale, value: numbers.format_currency(value[1], value[0], locale=locale, format_type="name"),
            key=_named("money"),
            words=lambda locale, value: (("name", str(locale), value[0], locale.plural_form(value[1])),),
            weight=2.0,
        ),
        Form(
            name="compact",
            kind="compact money",
            draw=lambda random: (random.choice(known), _round(random)),
            show=_compact_currency,
            key=_named("money"),
            words=lambda locale, value: (*_symbol(locale, value), ("compact", len(str(value[1])))),
        ),
    ]


def rate_forms(currencies: Sequence[str], source: Locale) -> list[Form]:
    """Prices and measures per unit: by the hour, per liter."""
    known = told_apart(currencies, source)
    forms = [
        Form(
            name=f"price per {unit}",
            kind="price",
            draw=_amount(known, most=4),
            show=partial(_price, unit),
            key=_named(f"price per {unit}"),
            words=partial(_price_words, unit),
        )
        for unit in PRICED
    ]
    for unit, per in FLOWS:
        for length in ("long", "short"):
            forms.append(
                Form(
                    name=f"{length} {unit} per {per}",
                    kind="flow",
                    draw=_quantity,
                    show=partial(_flow, unit, per, length),
                    key=_named(f"{unit} per {per}"),
                    words=_plural(f"{length} {unit} per {per}"),
                    weight=0.5,
                )
            )
    return forms


def unit_forms() -> list[Form]:
    """Measures in long and short, and in two units at once ("5 hours and 3 minutes")."""
    single = [
        Form(
            name=f"{length} {unit}",
            kind="unit",
            draw=_quantity,
            show=partial(_unit, unit, length),
            key=_named(unit),
            words=_plural(f"{length} {unit}"),
            weight=weight,
        )
        for length, weight in (("long", 2.0), ("short", 1.0))
        for unit in UNITS
    ]
    mixed = [
        Form(
            name=f"{first} and {second}",
            kind="mixed",
            draw=partial(_parts, most),
            show=partial(_mixed, first, second),
            key=_named(f"{first} and {second}"),
            words=partial(_mixed_words, first, second),
            weight=3.0,
        )
        for first, second, most in MIXED
    ]
    return single + mixed


def told_apart(currencies: Sequence[str], locale: Locale) -> list[str]:
    """The currencies whose symbol in this locale is no other one's."""
    symbols = [plain(numbers.get_currency_symbol(code, locale)) for code in currencies]
    return [code for code, symbol in zip(currencies, symbols, strict=True) if symbols.count(symbol) == 1]


# Values.


def _whole(random: Random) -> int:
    return random.choice((1, 1, 1, -1)) * int(10 ** random.uniform(0, 9))


def _decimal(random: Random) -> Decimal:
    """One to three decimals, the last of them not zero."""
    places = random.randint(1, 3)
    digits = int(10 ** random.uniform(places, places + 5))
    return random.choice((1, 1, 1, -1)) * Decimal(digits + (digits % 10 == 0)).scaleb(-places)


def _share(random: Random) -> Decimal:
    """Half of them whole percents up to 1,000, half with one or two decimals up to 100."""
    places = random.choice((0, 0, 1, 2))
    digits = random.randint(1, 10 ** (3 if places == 0 else 2 + places))
    return Decimal(digits).scaleb(-places - 2).normalize()


def _round(random: Random) -> int:
    """One to three digits and zeros, from a thousand to below a trillion."""
    digits = random.randint(1, 10 ** random.choice((1, 2, 3, 3)) - 1)
    return digits * int(10 ** random.randint(4 - len(str(digits)), 12 - len(str(digits))))


def _amount(currencies: Sequence[str], most: int = 6) -> Callable[[Random], Price]:
    """Up to 10 ** most of a currency, in its smallest units or whole."""

    def draw(random: Random) -> Price:
        code = random.choice(currencies)
        places = numbers.get_currency_precision(code)
        amount = Decimal(str(10 ** random.uniform(0, most))).quantize(Decimal(1).scaleb(-places))
        return code, amount if random.random() < 0.7 else amount.quantize(Decimal(1))

    return draw


def _quantity(random: Random) -> int | Decimal:
    """Mostly whole numbers, small ones more often; some have one decimal."""
    if random.random() < 0.35:
        digits = int(10 ** random.uniform(0, 3))
        return Decimal(digits + (digits % 10 == 0)).scaleb(-1)
    return int(10 ** random.uniform(0, random.choice((2, 3, 5))))


def _parts(most: int, random: Random) -> tuple[int, int]:
    """So many of a larger unit and of a smaller one, of which `most` make a larger one."""
    return random.randint(1, 99), random.randrange(1, most)


# Printing.


def _unit(unit: str, length: Length, locale: Locale, value: int | Decimal) -> str:
    return _said(unit, units.format_unit(value, unit, length, locale=locale))


def _mixed(first: str, second: str, locale: Locale, value: tuple[int, int]) -> str:
    parts = [_unit(unit, "long", locale, count) for unit, count in zip((first, second), value, strict=True)]
    return lists.format_list(parts, "standard", locale)


def _price(unit: str, locale: Locale, value: Price) -> str:
    amount = numbers.format_currency(value[1], value[0], locale=locale)
    return _said(unit, units.format_compound_unit(amount, denominator_unit=unit, locale=locale))


def _flow(unit: str, per: str, length: Length, locale: Locale, value: int | Decimal) -> str:
    text = units.format_compound_unit(value, unit, denominator_unit=per, length=length, locale=locale)
    return _said(unit, _said(per, text))


def _said(unit: str, text: str | None) -> str:
    """The text, unless Babel had to fall back on the unit's identifier, or found nothing."""
    if not text or unit in text:
        raise LookupError(unit)
    return text


def _compact_currency(locale: Locale, value: tuple[str, int]) -> str:
    return numbers.format_compact_currency(value[1], value[0], locale=locale, fraction_digits=2)


# What the splits go by, and the words.


def _named(name: str) -> Callable[[Any], tuple[str, str]]:
    return lambda value: (name, str(value))


def _symbol(locale: Locale, value: tuple[str, Any]) -> Words:
    return (("symbol", value[0]),)


def _price_words(unit: str, locale: Locale, value: Price) -> Words:
    return (*_symbol(locale, value), ("per", unit))


def _plural(name: str) -> Callable[[Locale, Any], Words]:
    return lambda locale, value: ((str(locale), name, locale.plural_form(value)),)


def _mixed_words(first: str, second: str, locale: Locale, value: tuple[int, int]) -> Words:
    return tuple(
        (str(locale), f"mixed {unit}", locale.plural_form(count))
        for unit, count in zip((first, second), value, strict=True)
    )
