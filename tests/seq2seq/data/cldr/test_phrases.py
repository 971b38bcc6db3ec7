"""Phrases of Unicode CLDR: texts that were written by hand, and the properties of the splits."""

import functools
import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from datetime import date, datetime
from decimal import Decimal
from itertools import permutations
from typing import Any

import pytest
from babel import Locale

from common.errors import UserError
from seq2seq.data.cldr import amounts as cldr_amounts
from seq2seq.data.cldr import names as cldr_names
from seq2seq.data.cldr import phrases
from seq2seq.data.cldr import times as cldr_times
from seq2seq.data.cldr.forms import Form, visible_text
from seq2seq.data.cldr.phrases import Pair, SampledSplits
from seq2seq.data.cldr.tables import CATEGORY_SHARES, available_categories, format_pair, independent_copy

SMALL = {"train": 4000, "val": 100, "test": 300}


@functools.cache
def sampled(source: str, target: str, seed: int = 0, **counts: int) -> SampledSplits:
    return phrases.sample_splits(Locale.parse(source), Locale.parse(target), seed=seed, counts=SMALL | counts)


def all_pairs(source: str, target: str) -> list[Pair]:
    return [pair for split in sampled(source, target).splits.values() for pair in split]


def named(forms: list[Form], name: str) -> Form:
    return next(form for form in forms if form.name == name)


# Texts.

DASH = "\u2013"  # of CLDR's ranges
AFTERNOON = datetime(2021, 5, 3, 15, 5, 9)
DAY, END, NEXT_YEAR = date(2021, 5, 3), date(2021, 5, 7), date(2022, 1, 2)
COUNTRIES = [("countries", code) for code in ("AT", "CH", "DE")]
TEXTS: list[tuple[str, str, Any, str, str, str]] = [
    ("dates", "full", DAY, "Monday, May 3, 2021", "Montag, 3. Mai 2021", "2021年5月3日星期一"),
    ("dates", "long", DAY, "May 3, 2021", "3. Mai 2021", "2021年5月3日"),
    ("dates", "short", DAY, "5/3/21", "03.05.21", "2021/5/3"),
    ("dates", "yMMMM", DAY, "May 2021", "Mai 2021", "2021年5月"),
    ("dates", "MMMEd", DAY, "Mon, May 3", "Mo., 3. Mai", "5月3日周一"),
    ("times", "short", AFTERNOON, "3:05 PM", "15:05", "15:05"),
    ("times", "medium", AFTERNOON, "3:05:09 PM", "15:05:09", "15:05:09"),
    ("datetimes", "medium", AFTERNOON, "May 3, 2021, 3:05:09 PM", "03.05.2021, 15:05:09", "2021年5月3日 15:05:09"),
    ("ranges", "yMMMd", (DAY, END), f"May 3 {DASH} 7, 2021", f"3.{DASH}7. Mai 2021", "2021年5月3日至7日"),
    (
        *("ranges", "yMMMd", (DAY, NEXT_YEAR), f"May 3, 2021 {DASH} Jan 2, 2022"),
        *(f"3. Mai 2021 {DASH} 2. Jan. 2022", "2021年5月3日至2022年1月2日"),
    ),
    ("relative", "long", ("hour", 3), "in 3 hours", "in 3 Stunden", "3小时后"),
    ("relative", "long", ("day", -2), "2 days ago", "vor 2 Tagen", "2天前"),
    ("relative", "long", ("month", 200), "in 200 months", "in 200 Monaten", "200个月后"),
    ("relative", "short", ("year", 1), "in 1 yr.", "in 1 Jahr", "1年后"),
    ("numbers", "decimal", Decimal("-1234.5"), "-1,234.5", "-1.234,5", "-1,234.5"),
    ("percentages", "percent", Decimal("0.125"), "12.5%", "12,5 %", "12.5%"),
    ("compact", "long", 1_200_000, "1.2 million", "1,2 Millionen", "120万"),
    ("compact", "long", 1_000_000, "1 million", "1 Million", "100万"),
    ("compact", "short", 345_000_000_000, "345B", "345 Mrd.", "3450亿"),
    ("money", "symbol", ("USD", Decimal("1234.50")), "$1,234.50", "1.234,50 $", "US$1,234.50"),
    ("money", "symbol", ("JPY", Decimal(1234)), "¥1,234", "1.234 ¥", "JP¥1,234"),
    ("money", "name", ("SEK", Decimal("20.00")), "20.00 Swedish kronor", "20,00 Schwedische Kronen", "20.00瑞典克朗"),
    ("money", "compact", ("EUR", 1_500_000), "€1.5M", "1,5 Mio. €", "€150万"),
    (
        "rates",
        "price per duration-hour",
        ("EUR", Decimal("9.50")),
        "€9.50 per hour",
        "9,50 € pro Stunde",
        "€9.50/小时",
    ),
    (
        *("rates", "long volume-liter per duration-minute", Decimal("2.5"), "2.5 liters per minute"),
        *("2,5 Liter pro Minute", "2.5升/分钟"),
    ),
    ("units", "long length-kilometer", 1, "1 kilometer", "1 Kilometer", "1公里"),
    ("units", "long temperature-celsius", 5, "5 degrees Celsius", "5 Grad Celsius", "5摄氏度"),
    ("units", "short mass-gram", Decimal("0.5"), "0.5 g", "0,5 g", "0.5 g"),
    (
        *("units", "duration-hour and duration-minute", (1, 30), "1 hour and 30 minutes"),
        *("1 Stunde und 30 Minuten", "1小时和30分钟"),
    ),
    (
        "countries",
        "and",
        COUNTRIES,
        "Austria, Switzerland, and Germany",
        "Österreich, Schweiz und Deutschland",
        "奥地利、瑞士和德国",
    ),
    ("countries", "or", COUNTRIES[:2], "Austria or Switzerland", "Österreich oder Schweiz", "奥地利或瑞士"),
    ("languages", "dialect", Locale("de", "AT"), "German (Austria)", "Deutsch (Österreich)", "德语 (奥地利)"),
]


@functools.cache
def forms_by_category(target: str) -> tuple[tuple[Locale, Locale], dict[str, list[Form]]]:
    locales = independent_copy(Locale("en")), independent_copy(Locale(target))
    names, _ = cldr_names.shared_names(locales)
    codes = [code for _, code in names["currencies"]]
    return locales, {
        "dates": cldr_times.date_forms(),
        "times": cldr_times.time_forms(),
        "datetimes": cldr_times.datetime_forms(),
        "ranges": cldr_times.range_forms(),
        "relative": cldr_times.relative_forms(),
        "numbers": cldr_amounts.number_forms(),
        "percentages": cldr_amounts.percent_forms(),
        "compact": cldr_amounts.compact_forms(),
        "money": cldr_amounts.money_forms(codes, locales[0]),
        "rates": cldr_amounts.rate_forms(codes, locales[0]),
        "units": cldr_amounts.unit_forms(),
        "countries": cldr_names.enumerations(names["countries"], locales),
        "languages": cldr_names.dialects(names["languages"] | names["countries"], locales),
    }


@pytest.mark.parametrize(("category", "name", "value", "english", "german", "chinese"), TEXTS)
def test_a_value_is_printed_as_people_write_it(
    category: str, name: str, value: Any, english: str, german: str, chinese: str
) -> None:
    """Written by hand; all kinds of spaces compare equal."""
    for target, expected in (("de", german), ("zh", chinese)):
        locales, forms = forms_by_category(target)
        texts = format_pair(locales, named(forms[category], name), value)
        assert tuple(map(visible_text, texts)) == (english, expected)


def test_spaces_are_those_that_babel_prints() -> None:
    locales, forms = forms_by_category("de")
    assert format_pair(locales, named(forms["times"], "short"), AFTERNOON)[0] == "3:05\u202fPM"
    assert format_pair(locales, named(forms["percentages"], "percent"), Decimal("0.5"))[1] == "50\u00a0%"


def test_using_a_locale_does_not_change_the_tables_of_another() -> None:
    """Babel's locales write into the tables that they inherit: stand-alone months in Thai became Hebrew."""
    months = [independent_copy(Locale(name)).months["stand-alone"]["wide"] for name in ("he", "th")]
    assert (months[0][3], months[1][3]) == ("מרץ", "มีนาคม")


@pytest.mark.parametrize(
    ("locale", "unit", "length", "value", "expected"),
    [
        ("zh", "length-kilometer", "long", 5, "5公里"),
        ("zh", "duration-hour", "long", 1, "1小时"),
        ("de", "length-mile", "short", 1, "1 mi"),
        ("de", "length-mile", "long", 1, "1 Meile"),
        ("fr", "volume-cup", "long", 2, "2 tasses"),
        ("ja", "length-light-year", "long", 3, "3 光年"),
    ],
)
def test_units_that_cldr_leaves_out_are_inferred(
    locale: str, unit: str, length: Any, value: int, expected: str
) -> None:
    """Babel alone prints "5 length-kilometer" and "1 Meilen"."""
    text = named(cldr_amounts.unit_forms(), f"{length} {unit}").format(independent_copy(Locale(locale)), value)
    assert visible_text(text) == expected


@pytest.mark.parametrize(
    ("source", "target", "script"),
    [
        ("en", "fr", "a-zà-ÿ"),
        ("de", "ja", "ぁ-ヿ一-鿿"),
        ("en", "ar", "\u0600-\u06ff"),
        ("zh", "en", "a-z"),
        ("he", "th", "ก-๛"),
    ],
)
def test_any_two_languages_have_all_categories(source: str, target: str, script: str) -> None:
    result = sampled(source, target)
    assert not result.missing
    assert {split: len(pairs) for split, pairs in result.splits.items()} == SMALL
    for category in ("calendar", "countries", "languages", "currencies", "units", "dates", "relative", "compact"):
        targets = [pair.target for pair in all_pairs(source, target) if pair.category == category]
        in_script = sum(bool(re.search(f"[{script}]", text, re.IGNORECASE)) for text in targets)
        assert in_script > 0.4 * len(targets), category
    assert all(pair.source.strip() and pair.target.strip() for pair in all_pairs(source, target))


def test_a_category_without_tables_is_left_out_and_the_others_fill_the_split() -> None:
    """Tuvan has no words in CLDR 47, so that Babel would print months as M01 and three days as +3 d."""
    result = sampled("en", "tyv")
    assert {"dates", "ranges", "calendar", "relative", "countries", "languages", "money"} < {*result.missing}
    assert {"numbers", "percentages", "times", "units"}.isdisjoint(result.missing)
    assert {split: len(pairs) for split, pairs in result.splits.items()} == SMALL
    assert not [pair for pair in all_pairs("en", "tyv") if re.search(r"M\d\d|^[+-]\d+ [a-z]|[a-z]-[a-z]", pair.target)]


# Splits.


def test_the_same_arguments_give_the_same_phrases_and_another_seed_others() -> None:
    again = phrases.sample_splits(Locale("en"), Locale("de"), seed=0, counts=SMALL)
    assert again == sampled("en", "de")
    other_seed = sampled("en", "de", seed=1)
    shared = {pair.source for pair in again.splits["test"]} & {pair.source for pair in other_seed.splits["test"]}
    assert len(shared) < SMALL["test"] / 4
    assert [pair for pair in other_seed.splits["train"] if pair.is_name] != []


def test_another_process_generates_the_same_phrases() -> None:
    """It has another salt for hashes of strings, and has used no other locale before."""
    code = (
        "import hashlib; from babel import Locale; from seq2seq.data.cldr import phrases; "
        f"result = phrases.sample_splits(Locale('en'), Locale('de'), seed=0, counts={SMALL}); "
        "print(hashlib.sha256(repr(result).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "LC_ALL": "fr_FR.UTF-8", "TZ": "Asia/Tokyo"}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert process.stdout.strip() == hashlib.sha256(repr(sampled("en", "de")).encode()).hexdigest()


@pytest.mark.parametrize(("source", "target"), [("en", "de"), ("ja", "en"), ("he", "th")])
def test_a_source_has_one_target_and_is_in_one_split(source: str, target: str) -> None:
    sources = Counter(visible_text(pair.source) for pair in all_pairs(source, target))
    assert sources.total() == sum(SMALL.values()) and max(sources.values()) == 1


def test_every_category_has_its_share_of_every_split() -> None:
    splits = sampled("en", "de", train=10000).splits
    for split, count in (SMALL | {"train": 10000}).items():
        counts = Counter(pair.category for pair in splits[split])
        for category, share in CATEGORY_SHARES.items():
            assert abs(counts[category] - share * count) < 1, (split, category)


def test_quotas_follow_the_shares_sum_to_the_count_and_keep_the_minimums() -> None:
    """Shares 0.12 and 0.03, at least 4 of the second: 10 are 6 and 4, 100 are 80 and 20, 101 are 81 and 20."""
    for count, expected in ((10, (6, 4)), (100, (80, 20)), (101, (81, 20))):
        assert phrases.category_quotas("train", count, {"dates": 0, "calendar": 4}) == dict(
            zip(("dates", "calendar"), expected, strict=True)
        )


def test_all_single_names_are_in_train_and_in_no_other_split() -> None:
    splits = sampled("en", "de").splits
    train = {(pair.source, pair.target) for pair in splits["train"] if pair.is_name}
    for pair in [
        *(("Germany", "Deutschland"), ("Hungary", "Ungarn"), ("Thursday", "Donnerstag"), ("Sep", "Sep")),
        *(("Japanese", "Japanisch"), ("Swiss Franc", "Schweizer Franken"), ("January", "Januar")),
    ]:
        assert pair in train
    english, german = Locale("en"), Locale("de")
    codes = {code for code in english.territories if re.fullmatch("[A-WY][A-Z]", code)} & {*german.territories}
    countries = codes - {"EU", "EZ", "UN", "QO"}
    assert len(countries) > 240
    assert {(english.territories[code], german.territories[code]) for code in countries} <= train
    assert not [pair for split in ("val", "test") for pair in splits[split] if pair.is_name]
    singles = {pair[0] for pair in train}
    assert not [pair for split in ("val", "test") for pair in splits[split] if pair.source in singles]


@pytest.mark.parametrize("category", ["countries", "currencies", "calendar", "languages"])
def test_held_out_enumerations_are_new_sets_of_known_names(category: str) -> None:
    splits = sampled("en", "de").splits
    names = sorted(
        (pair.source for pair in splits["train"] if pair.is_name), key=len, reverse=True
    )  # the longest first, so that the pattern matches "Congo - Kinshasa" as a whole
    pattern = re.compile("|".join(map(re.escape, names)))

    def name_sets(split: str) -> set[tuple[str, ...]]:
        sets = set()
        for pair in splits[split]:  # type: ignore[index]
            if pair.category == category and not pair.is_name:
                separators = {part.strip(" ,") for part in pattern.split(pair.source)}
                assert separators <= {"", "and", "or", "(", ")"} or "(" in pair.source, pair
                if "(" not in pair.source:
                    sets.add(tuple(sorted(pattern.findall(pair.source))))
        return sets

    train, held_out = name_sets("train"), name_sets("val") | name_sets("test")
    assert held_out and train.isdisjoint(held_out)


def test_every_held_out_word_is_in_train() -> None:
    """Whole words of both languages: names, units, currencies and their symbols, months, relative times."""
    splits = sampled("en", "de").splits
    for side in (1, 2):
        train, val, test = ({word for pair in splits[split] for word in _words(pair[side])} for split in SMALL)
        assert val | test <= train


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text)


def test_no_form_of_a_held_out_date_is_in_train() -> None:
    splits = sampled("en", "de").splits

    def dates_of(split: str) -> set[str]:
        """German dates with a year of four digits, as day.month.year."""
        numbers = {name: i for i, name in enumerate(Locale("de").months["format"]["wide"].values(), 1)}
        dates = set()
        for pair in splits[split]:  # type: ignore[index]
            dates |= {f"{int(d)}.{int(m)}.{y}" for d, m, y in re.findall(r"(\d+)\.(\d+)\.(\d{4})", pair.target)[:1]}
            for day, month, year in re.findall(r"(\d+)\. (\w+) (\d{4})", pair.target)[:1]:
                if month in numbers and pair.category in ("dates", "datetimes"):
                    dates.add(f"{day}.{numbers[month]}.{year}")
        return dates

    train, held_out = dates_of("train"), dates_of("val") | dates_of("test")
    assert len(train) > 400 and len(held_out) > 20 and train.isdisjoint(held_out)


def test_no_test_phrase_is_in_a_train_of_other_counts() -> None:
    results = [
        sampled("en", "de"),
        sampled("en", "de", train=8000, val=0, test=100),
        sampled("en", "de", train=2500, val=300),
    ]
    for tested, trained in permutations(results, 2):
        known = {visible_text(pair.source) for pair in trained.splits["train"]}
        assert not [pair for pair in tested.splits["test"] if visible_text(pair.source) in known]
    assert not results[1].splits["val"]


# Ambiguity.


def test_a_form_with_the_sources_of_an_earlier_one_is_left_out() -> None:
    """Japanese has one way to write a day in words, English has two: the target is always the long one."""
    locales = independent_copy(Locale("ja")), independent_copy(Locale("en"))
    names = {category.name: [form.name for form in category.forms] for category in available_categories(locales)[0]}
    assert "long" in names["dates"] and "yMMMd" not in names["dates"] and "medium" not in names["dates"][:3]
    days = [pair for pair in all_pairs("ja", "en") if re.fullmatch(r"\d+年\d+月\d+日", pair.source)]
    months = set(Locale("en").months["format"]["wide"].values())
    assert len(days) > 30 and all(pair.target.split()[0] in months for pair in days)


def test_a_source_of_two_forms_has_the_target_of_the_earlier_one() -> None:
    """May is not abbreviated: "May 3, 2021" is long ("3. Mai 2021"), but "Jun 3, 2021" is medium ("03.06.2021")."""
    by_month: dict[str, set[bool]] = {}
    for pair in all_pairs("en", "de"):
        if match := re.fullmatch(r"(May|Jun|Oct) \d+, \d{4}", pair.source):
            by_month.setdefault(match[1], set()).add("." not in pair.target.split()[-1])
    assert by_month["May"] == {True}
    assert False in by_month["Jun"] | by_month["Oct"]
    assert sampled("en", "de").ambiguous > 0


def test_currencies_that_share_a_symbol_are_not_printed_with_it() -> None:
    symbols = {"USD": "$", "CAD": "$", "EUR": "€"}
    locale = independent_copy(Locale("en"))
    for code, symbol in symbols.items():
        locale.currency_symbols[code] = symbol
    assert cldr_amounts.with_unique_symbols(["USD", "CAD", "EUR"], locale) == ["EUR"]


# Mistakes.


def test_too_few_phrases_for_all_names_is_one_sentence() -> None:
    with pytest.raises(UserError) as caught:
        sampled("en", "de", train=100)
    assert re.fullmatch(
        r"data\.train_count=100: expected at least 1,0\d\d, because training needs all names of countries, languages, "
        r"currencies, months and weekdays; give more\.",
        str(caught.value),
    )


def test_more_phrases_than_a_category_has_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are some 8,000 numbers of three digits and zeros up to a trillion, in two lengths."""

    def compact_category(locales: Any) -> Any:
        categories, missing, ambiguous = available_categories(locales)
        return [category for category in categories if category.name == "compact"], missing, ambiguous

    monkeypatch.setattr(phrases, "available_categories", compact_category)
    monkeypatch.setattr(phrases, "MAX_IDLE_SAMPLES", 50)
    with pytest.raises(UserError) as caught:
        phrases.sample_splits(Locale("en"), Locale("de"), seed=0, counts={"train": 50_000, "val": 0, "test": 10})
    assert re.fullmatch(
        r"data\.train_count asks for 50,000 phrases of compact, but en and de give only about \d,\d{3}; give a lower "
        r"count\.",
        str(caught.value),
    )
