"""Dates, times of day, both together, ranges of them, and times told from now, as any locale prints them.

The forms are CLDR's four lengths, its skeletons (Unicode Technical Standard 35, part 4, "Available Formats") and its
interval formats.
"""

from collections.abc import Callable
from datetime import date, datetime, timedelta
from functools import partial
from random import Random
from typing import Any

from babel import Locale, dates

from seq2seq.data.cldr.forms import Form, Show, Words, no_words

FIRST, LAST = date(1950, 1, 1), date(2049, 12, 31)  # a century, so that two digits of a year say which it is
LEAP = (date(2024, 1, 1), date(2024, 12, 31))  # a year with all days
CYCLE = (date(2001, 1, 1), date(2028, 12, 31))  # years with all days on all weekdays
MIDNIGHT = datetime(2024, 1, 1)  # of a day that is not printed
SECONDS = {  # as Babel counts them
    **{"year": 31_536_000, "month": 2_592_000, "week": 604_800, "day": 86_400},
    **{"hour": 3600, "minute": 60, "second": 1},
}
WIDER = {"narrow": "short", "short": "long"}
FARTHEST = 400  # of any unit, from now


def date_forms() -> list[Form]:
    """Dates with and without weekday, year and era; where words are abbreviated, the wide ones come first."""
    lengths = {"long": 2.0, "full": 2.0, "short": 1.5, "medium": 1.0}
    forms = [_dated(name, "date", _day, _length(name), weight) for name, weight in lengths.items()]
    for kind, draw, skeletons in (
        ("date", _day, {"yMMMEd": 1.0, "yMMMd": 1.0, "yMd": 1.0, "yMEd": 0.5, "GyMMMd": 0.5}),
        ("day", partial(_day, between=LEAP), {"MMMMd": 0.8, "MMMd": 0.4, "Md": 0.4}),
        ("weekday", partial(_day, between=CYCLE), {"MMMEd": 0.8, "MEd": 0.4}),
        ("month", _month, {"yMMMM": 0.8, "yMMM": 0.4, "yM": 0.3}),
        ("quarter", _quarter, {"yQQQQ": 0.2, "yQQQ": 0.2}),
    ):
        forms += [_dated(name, kind, draw, _skeleton(name), weight) for name, weight in skeletons.items()]
    return forms


def time_forms() -> list[Form]:
    """Times of day to the minute or second, in 24 and 12 hours and in parts of the day ("3:05 in the afternoon")."""
    forms = []
    for kind, step, weights in (
        ("minute", 60, {"short": 3.0, "Hm": 1.0, "hm": 1.0, "Bhm": 0.6}),
        ("second", 1, {"medium": 2.0, "Hms": 0.5, "hms": 0.5, "long": 1.0, "full": 0.6}),
        ("hour", 3600, {"h": 0.05, "Bh": 0.05}),
    ):
        for name, weight in weights.items():
            show = _time(name) if name in ("short", "medium", "long", "full") else _skeleton(name)
            draw, words = _clock(step), _clock_words(name)
            forms.append(Form(name=name, kind=kind, draw=draw, show=show, key=_clock_key, words=words, weight=weight))
    return forms


def datetime_forms() -> list[Form]:
    """A date and a time in CLDR's four lengths; UTC where the zone is told."""
    return [_dated(name, "moment", _moment, _datetime(name), 1.0) for name in ("long", "full", "medium", "short")]


def range_forms() -> list[Form]:
    """From one date or time to another."""
    forms = []
    for kind, draw, skeletons in (
        ("dates", _dates, {"yMMMd": 2.0, "yMMMEd": 1.0, "yMd": 1.0}),
        ("days", partial(_dates, between=LEAP), {"MMMd": 1.0, "Md": 0.5}),
        ("months", _months, {"yMMMM": 0.7, "yMMM": 0.4}),
        ("times", _times, {"Hm": 0.6, "hm": 0.6}),
    ):
        for name, weight in skeletons.items():
            words = no_words if kind == "times" else _range_words(name)
            key, show = partial(_range_key, kind), _interval(name)
            forms.append(Form(name=name, kind=kind, draw=draw, show=show, key=key, words=words, weight=weight))
    return forms


def relative_forms() -> list[Form]:
    """In so many hours, so many days ago, wide, abbreviated and narrow."""
    return [
        Form(
            name=length,
            kind="relative",
            draw=_distance,
            show=partial(relative, length),
            key=lambda value: (value[0], abs(value[1])),
            words=_relative_words(length),
            weight=weight,
        )
        for length, weight in (("long", 3.0), ("short", 1.0), ("narrow", 0.5))
    ]


def relative(length: Any, locale: Locale, value: tuple[str, int]) -> str:
    """A number of units from now (or ago, where it is negative), never told in a larger unit."""
    unit: Any = value[0]  # which Babel types as literals, as it does the lengths
    seconds = value[1] * SECONDS[unit]
    try:
        return dates.format_timedelta(seconds, unit, 1e9, add_direction=True, format=length, locale=locale)
    except KeyError:  # CLDR's root says where a locale leaves it open: narrow as short, short as long
        if length == "long":
            raise
        return relative(WIDER[length], locale, value)


# Values.


def _day(random: Random, between: tuple[date, date] = (FIRST, LAST)) -> date:
    return date.fromordinal(random.randint(*(day.toordinal() for day in between)))


def _month(random: Random) -> date:
    return _day(random).replace(day=1)


def _quarter(random: Random) -> date:
    return date(random.randint(FIRST.year, LAST.year), random.choice((1, 4, 7, 10)), 1)


def _moment(random: Random) -> datetime:
    return datetime.combine(_day(random), datetime.min.time()) + timedelta(seconds=random.randrange(86_400))


def _clock(step: int) -> Callable[[Random], datetime]:
    """Times of day in steps of so many seconds."""
    return lambda random: MIDNIGHT + timedelta(seconds=step * random.randrange(86_400 // step))


def _dates(random: Random, between: tuple[date, date] = (FIRST, LAST)) -> tuple[date, date]:
    """Two days within a month, a year or more, each about as often."""
    while True:
        start = _day(random, between)
        end = start + timedelta(days=random.randint(1, random.choice((20, 200, 1500))))
        if end <= between[1]:
            return start, end


def _months(random: Random) -> tuple[date, date]:
    while True:
        start, end = (_month(random) for _ in range(2))
        if start < end and end.year - start.year <= random.choice((0, 1, 5)):
            return start, end


def _times(random: Random) -> tuple[datetime, datetime]:
    start, end = sorted(random.sample(range(0, 1440, 5), 2))
    return MIDNIGHT + timedelta(minutes=start), MIDNIGHT + timedelta(minutes=end)


def _distance(random: Random) -> tuple[str, int]:
    """A unit and how many of it, small numbers more often, half of them in the past."""
    unit = random.choice([*SECONDS])
    return unit, random.choice((-1, 1)) * (1 + int((FARTHEST - 1) * random.random() ** 2))


# Printing.


def _length(style: Any) -> Show:
    return lambda locale, value: dates.format_date(value, style, locale)


def _time(style: Any) -> Show:
    return lambda locale, value: dates.format_time(value, style, locale=locale)


def _datetime(style: Any) -> Show:
    return lambda locale, value: dates.format_datetime(value, style, locale=locale)


def _skeleton(skeleton: str) -> Show:
    return lambda locale, value: dates.format_skeleton(skeleton, value, fuzzy=False, locale=locale)


def _interval(skeleton: str) -> Show:
    def show(locale: Locale, value: tuple[date, date]) -> str:
        if skeleton not in locale.interval_formats:
            raise LookupError(skeleton)  # Babel would fall back on whole dates
        return dates.format_interval(*value, skeleton, fuzzy=False, locale=locale)

    return show


# What the splits go by, and the words.


def _dated(name: str, kind: str, draw: Callable[[Random], Any], show: Show, weight: float) -> Form:
    key = partial(_date_key, "date" if kind == "moment" else kind)  # a new moment is on a new date
    return Form(name=name, kind=kind, draw=draw, show=show, key=key, words=_date_words(name), weight=weight)


def _date_key(kind: str, value: date) -> tuple[str, int]:
    return kind, value.toordinal()


def _range_key(kind: str, value: tuple[date, date]) -> tuple[str, Any]:
    return ("date", value[0].toordinal()) if kind == "dates" else (kind, str(value))


def _clock_key(value: datetime) -> str:
    return value.time().isoformat()


def _clock_words(form: str) -> Callable[[Locale, Any], Words]:
    """The part of the day, which some forms of some locales print: noon, in the afternoon."""
    return lambda locale, value: ((str(locale), form, dates.get_period_id(value, locale=locale)),)


def _date_words(form: str) -> Callable[[Locale, Any], Words]:
    return lambda locale, value: ((form, "month", value.month), (form, "weekday", value.weekday()))


def _range_words(form: str) -> Callable[[Locale, Any], Words]:
    return lambda locale, value: ((form, "from", value[0].month), (form, "to", value[1].month))


def _relative_words(length: str) -> Callable[[Locale, Any], Words]:
    return lambda locale, value: ((str(locale), length, value[0], value[1] < 0, locale.plural_form(abs(value[1]))),)
