"""Forms of dates, times of day, dates with a time of day, ranges, and relative times, in any locale.

Each form (see forms.py) prints one format of CLDR: one of the four lengths of dates and times (full, long, medium,
short), a skeleton (a list of fields such as yMMMd, Unicode Technical Standard 35, part 4, "Available Formats"), an
interval format, or one of the three lengths of relative times (long, short, narrow).
"""

from collections.abc import Callable
from datetime import date, datetime, timedelta
from functools import partial
from random import Random
from typing import Any

from babel import Locale, dates

from seq2seq.data.cldr.forms import Form, Formatter, Words, no_words

CENTURY = (date(1950, 1, 1), date(2049, 12, 31))  # 100 years, each identified by its last two digits
LEAP_YEAR = (date(2024, 1, 1), date(2024, 12, 31))  # contains every day of the year
WEEKDAY_CYCLE = (date(2001, 1, 1), date(2028, 12, 31))  # contains every day of the year on every weekday
MIDNIGHT = datetime(2024, 1, 1)  # times of day are added to it; its date is never printed
UNIT_SECONDS = {  # the number of seconds that Babel counts for each unit
    **{"year": 31_536_000, "month": 2_592_000, "week": 604_800, "day": 86_400},
    **{"hour": 3600, "minute": 60, "second": 1},
}
NEXT_LONGER = {"narrow": "short", "short": "long"}  # the length that replaces a missing one in relative times
MAX_DISTANCE = 400  # counts of relative times, in any unit, are below this number


def date_forms() -> list[Form]:
    """Forms of dates, days without a year, months and quarters, with and without weekday and era.

    Among forms of one kind, those with full words come before abbreviated ones, so that `printable_forms` prefers them.
    """
    lengths = {"long": 2.0, "full": 2.0, "short": 1.5, "medium": 1.0}
    forms = [
        _date_form(name, "date", _sample_day, _date_formatter(name), frequency) for name, frequency in lengths.items()
    ]
    for kind, sample, skeletons in (
        ("date", _sample_day, {"yMMMEd": 1.0, "yMMMd": 1.0, "yMd": 1.0, "yMEd": 0.5, "GyMMMd": 0.5}),
        ("day", partial(_sample_day, between=LEAP_YEAR), {"MMMMd": 0.8, "MMMd": 0.4, "Md": 0.4}),
        ("weekday", partial(_sample_day, between=WEEKDAY_CYCLE), {"MMMEd": 0.8, "MEd": 0.4}),
        ("month", _sample_month, {"yMMMM": 0.8, "yMMM": 0.4, "yM": 0.3}),
        ("quarter", _sample_quarter, {"yQQQQ": 0.2, "yQQQ": 0.2}),
    ):
        forms += [
            _date_form(name, kind, sample, _skeleton_formatter(name), frequency)
            for name, frequency in skeletons.items()
        ]
    return forms


def time_forms() -> list[Form]:
    """Forms of times of day to the hour, minute or second.

    The clock has 24 or 12 hours; some forms print the part of the day ("3:05 in the afternoon").
    """
    forms = []
    for kind, step, frequencies in (
        ("minute", 60, {"short": 3.0, "Hm": 1.0, "hm": 1.0, "Bhm": 0.6}),
        ("second", 1, {"medium": 2.0, "Hms": 0.5, "hms": 0.5, "long": 1.0, "full": 0.6}),
        ("hour", 3600, {"h": 0.05, "Bh": 0.05}),
    ):
        for name, frequency in frequencies.items():
            format = _time_formatter(name) if name in ("short", "medium", "long", "full") else _skeleton_formatter(name)
            sample, words = _clock_sampler(step), _clock_words(name)
            forms.append(
                Form(
                    name=name, kind=kind, sample=sample, format=format, key=_clock_key, words=words, frequency=frequency
                )
            )
    return forms


def datetime_forms() -> list[Form]:
    """Forms of a date with a time of day in CLDR's four lengths; lengths that print a time zone print UTC."""
    return [
        _date_form(name, "moment", _sample_moment, _datetime_formatter(name), 1.0)
        for name in ("long", "full", "medium", "short")
    ]


def range_forms() -> list[Form]:
    """Forms of ranges from one date, day, month or time of day to another."""
    forms = []
    for kind, sample, skeletons in (
        ("dates", _sample_dates, {"yMMMd": 2.0, "yMMMEd": 1.0, "yMd": 1.0}),
        ("days", partial(_sample_dates, between=LEAP_YEAR), {"MMMd": 1.0, "Md": 0.5}),
        ("months", _sample_months, {"yMMMM": 0.7, "yMMM": 0.4}),
        ("times", _sample_times, {"Hm": 0.6, "hm": 0.6}),
    ):
        for name, frequency in skeletons.items():
            words = no_words if kind == "times" else _range_words(name)
            key, format = partial(_range_key, kind), _interval_formatter(name)
            forms.append(
                Form(name=name, kind=kind, sample=sample, format=format, key=key, words=words, frequency=frequency)
            )
    return forms


def relative_forms() -> list[Form]:
    """Forms of relative times ("in 3 hours", "2 days ago") in CLDR's lengths long, short and narrow."""
    return [
        Form(
            name=length,
            kind="relative",
            sample=_sample_distance,
            format=partial(format_relative, length),
            key=lambda value: (value[0], abs(value[1])),
            words=_relative_words(length),
            frequency=frequency,
        )
        for length, frequency in (("long", 3.0), ("short", 1.0), ("narrow", 0.5))
    ]


def format_relative(length: Any, locale: Locale, value: tuple[str, int]) -> str:
    """Print a relative time, such as "in 3 hours"; `value` is a unit and a count, which is negative for the past.

    The unit is never replaced by a larger one: 48 hours are not printed as 2 days.
    """
    unit: Any = value[0]  # Any, like `length`, because Babel annotates both as Literals
    seconds = value[1] * UNIT_SECONDS[unit]
    try:
        return dates.format_timedelta(seconds, unit, 1e9, add_direction=True, format=length, locale=locale)
    except KeyError:  # CLDR's root aliases a missing narrow form to short, and short to long
        if length == "long":
            raise
        return format_relative(NEXT_LONGER[length], locale, value)


# Random values.


def _sample_day(rng: Random, between: tuple[date, date] = CENTURY) -> date:
    return date.fromordinal(rng.randint(*(day.toordinal() for day in between)))


def _sample_month(rng: Random) -> date:
    return _sample_day(rng).replace(day=1)


def _sample_quarter(rng: Random) -> date:
    return date(rng.randint(CENTURY[0].year, CENTURY[1].year), rng.choice((1, 4, 7, 10)), 1)


def _sample_moment(rng: Random) -> datetime:
    return datetime.combine(_sample_day(rng), datetime.min.time()) + timedelta(seconds=rng.randrange(86_400))


def _clock_sampler(step: int) -> Callable[[Random], datetime]:
    """A function that samples times of day at multiples of `step` seconds."""
    return lambda rng: MIDNIGHT + timedelta(seconds=step * rng.randrange(86_400 // step))


def _sample_dates(rng: Random, between: tuple[date, date] = CENTURY) -> tuple[date, date]:
    """Sample two different days in `between`, the earlier one first.

    Their distance is at most 20, 200 or 1,500 days; one of these limits is chosen at random. If the second day is after
    `between`, both days are sampled again.
    """
    while True:
        start = _sample_day(rng, between)
        end = start + timedelta(days=rng.randint(1, rng.choice((20, 200, 1500))))
        if end <= between[1]:
            return start, end


def _sample_months(rng: Random) -> tuple[date, date]:
    while True:
        start, end = (_sample_month(rng) for _ in range(2))
        if start < end and end.year - start.year <= rng.choice((0, 1, 5)):
            return start, end


def _sample_times(rng: Random) -> tuple[datetime, datetime]:
    start, end = sorted(rng.sample(range(0, 1440, 5), 2))
    return MIDNIGHT + timedelta(minutes=start), MIDNIGHT + timedelta(minutes=end)


def _sample_distance(rng: Random) -> tuple[str, int]:
    """A unit and a count from 1 to MAX_DISTANCE - 1, with a random sign; a negative count is in the past.

    Small counts are more frequent.
    """
    unit = rng.choice([*UNIT_SECONDS])
    return unit, rng.choice((-1, 1)) * (1 + int((MAX_DISTANCE - 1) * rng.random() ** 2))


# Formatters.


def _date_formatter(style: Any) -> Formatter:
    return lambda locale, value: dates.format_date(value, style, locale)


def _time_formatter(style: Any) -> Formatter:
    return lambda locale, value: dates.format_time(value, style, locale=locale)


def _datetime_formatter(style: Any) -> Formatter:
    return lambda locale, value: dates.format_datetime(value, style, locale=locale)


def _skeleton_formatter(skeleton: str) -> Formatter:
    return lambda locale, value: dates.format_skeleton(skeleton, value, fuzzy=False, locale=locale)


def _interval_formatter(skeleton: str) -> Formatter:
    def format(locale: Locale, value: tuple[date, date]) -> str:
        if skeleton not in locale.interval_formats:
            raise LookupError(skeleton)  # Babel would print both dates or times in full
        return dates.format_interval(*value, skeleton, fuzzy=False, locale=locale)

    return format


# Keys and words of values; see Form.


def _date_form(name: str, kind: str, sample: Callable[[Random], Any], format: Formatter, frequency: float) -> Form:
    # A date with a time (kind "moment") has the key of its date, so that it is in the same split as the date alone.
    key = partial(_date_key, "date" if kind == "moment" else kind)
    return Form(
        name=name, kind=kind, sample=sample, format=format, key=key, words=_date_words(name), frequency=frequency
    )


def _date_key(kind: str, value: date) -> tuple[str, int]:
    return kind, value.toordinal()


def _range_key(kind: str, value: tuple[date, date]) -> tuple[str, Any]:
    return ("date", value[0].toordinal()) if kind == "dates" else (kind, str(value))


def _clock_key(value: datetime) -> str:
    return value.time().isoformat()


def _clock_words(form: str) -> Callable[[Locale, Any], Words]:
    """A function for `Form.words`; it returns the part of the day (noon, afternoon), which some locales print."""
    return lambda locale, value: ((str(locale), form, dates.get_period_id(value, locale=locale)),)


def _date_words(form: str) -> Callable[[Locale, Any], Words]:
    return lambda locale, value: ((form, "month", value.month), (form, "weekday", value.weekday()))


def _range_words(form: str) -> Callable[[Locale, Any], Words]:
    return lambda locale, value: ((form, "from", value[0].month), (form, "to", value[1].month))


def _relative_words(length: str) -> Callable[[Locale, Any], Words]:
    return lambda locale, value: ((str(locale), length, value[0], value[1] < 0, locale.plural_form(abs(value[1]))),)
