"""The default data set of the translator: phrases of Unicode CLDR as sentence pairs."""

import re
from typing import Any

import pytest

from common.errors import UserError
from seq2seq.data.cldr import phrases
from seq2seq.data.cldr.dataset import Cldr, find_locale
from seq2seq.tokenizers.bpe import TokenizerOptions

COUNTS = {"train": 2500, "val": 40, "test": 80}


def cldr(source: str = "en", target: str = "de", **changes: Any) -> Cldr:
    options: dict[str, Any] = {"kind": "bpe", "pieces": "bytes", "vocabulary": 600, "joint": True}
    options |= {"single_digits": True, "coverage": 1.0, "byte_fallback": True, "normalization": "none"}
    keys: dict[str, Any] = {f"{split}_count": count for split, count in COUNTS.items()} | {"seed": 0}
    keys |= {"longest": 128, "too_long": "truncate", "batch_size": 4096}
    return Cldr(source=source, target=target, tokenizer=TokenizerOptions(**options, lowercase=False), **keys | changes)


@pytest.fixture(scope="module")
def german() -> Cldr:
    return cldr()


def test_nothing_is_made_before_it_is_asked_for_and_then_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, make = [], phrases.pairs

    def watched(*arguments: Any, **keys: Any) -> phrases.Drawn:
        made.append(keys["counts"])
        return make(*arguments, **keys)

    monkeypatch.setattr(phrases, "pairs", watched)
    data = cldr()
    assert not made
    assert {split: len(data.pairs(split)) for split in COUNTS} == COUNTS
    assert {split: data.count(split) for split in COUNTS} == COUNTS
    assert made == [COUNTS]


def test_every_pair_has_its_category(german: Cldr) -> None:
    for split in COUNTS:
        categories = german.categories(split)
        assert categories is not None and len(categories) == COUNTS[split]
        for (source, target), category in zip(german.pairs(split), categories, strict=True):
            if category == "percentages":
                assert re.fullmatch(r"[\d,.]+%", source) and re.fullmatch(r"[\d,.]+\u00a0%", target)
            if category == "datetimes":
                assert re.search(r"\d, \d+:\d\d", source) and re.search(r"\d, \d\d:\d\d", target)
    assert len({*categories}) == 15


def test_samples_are_the_phrases_and_come_back_out_of_their_tokens(german: Cldr) -> None:
    source, target = german.tokenizers()
    for i, pair in enumerate(german.pairs("test")):
        sample = german.sample("test", i, None)
        assert (sample["source_text"], sample["target_text"]) == pair
        assert (source.decode(sample["source"][:-1]), target.decode(sample["target"][:-1])) == pair


def test_a_drawn_phrase_lies_nowhere_and_is_said_itself(german: Cldr) -> None:
    assert german.where("val", 3) == repr(german.pairs("val")[3][0])


def test_the_seed_is_of_the_drawing(german: Cldr) -> None:
    assert cldr().pairs("test") == german.pairs("test")
    assert cldr(seed=1).pairs("test") != german.pairs("test")


def test_there_may_be_no_val() -> None:
    data = cldr(val_count=0)
    assert data.count("val") == 0 and data.pairs("val") == [] and data.count("test") == COUNTS["test"]


def test_the_summary_counts_categories_and_says_what_is_left_out(german: Cldr) -> None:
    lines = german.summary()
    assert lines[0] == "en -> de; bpe from bytes, 600 entries for both"
    assert re.fullmatch(r"train: 2,500 pairs, .* tokens, of the Unicode CLDR tables in Babel [\d.]+", lines[1])
    sizes = [int(size.replace(",", "")) for size in re.findall(r" ([\d,]+)(?:,|$)", lines[2].removeprefix("train:"))]
    assert lines[2].startswith("train: dates ") and len(sizes) == 15 and sum(sizes) == 2500
    assert re.fullmatch(r"train: 1,\d{3} of these are single names, which .* only in new combinations", lines[3])
    assert re.fullmatch(r"train: \d+ phrases and names left out whose source would have two targets", lines[4])
    assert not [line for line in lines if "tables:" in line]
    poor = cldr(target="wa").summary()
    assert [line for line in poor if line.startswith("train: left out, because a locale lacks the tables: dates, ")]


@pytest.mark.parametrize(
    ("name", "found"), [("de", "de"), ("zh", "zh"), ("de-CH", "de_CH"), ("zh-hant", "zh_Hant"), ("zh_TW", "zh_Hant_TW")]
)
def test_a_locale_is_found_by_its_name_in_cldr_and_in_the_web(name: str, found: str) -> None:
    assert str(find_locale("target", name)) == found


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        *(("german", "; did you mean de?"), ("Chinese", "; did you mean zh?"), ("germn", "; did you mean de?")),
        *(("xx", "."), ("", "."), ("de_XX", "; did you mean de"), ("root", "; did you mean ")),
    ],
)
def test_an_unknown_locale_is_one_sentence(name: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        cldr(target=name)
    said = str(caught.value)
    assert re.match(
        rf"data\.target={name} is none of the 1,\d{{3}} locales of Unicode CLDR, such as en, de_CH or zh", said
    )
    assert hint in said and said[-1] in ".?"


@pytest.mark.parametrize(("source", "target"), [("de", "de"), ("zh-Hant", "zh_Hant")])
def test_one_locale_twice_is_one_sentence(source: str, target: str) -> None:
    with pytest.raises(UserError) as caught:
        cldr(source, target)
    assert str(caught.value) == (
        f"data.source={source} and data.target={target} are the same locale; expected two, such as en and de."
    )


def test_too_small_a_train_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"^data\.train_count=900: the names of countries, .* give more\.$"):
        cldr(train_count=900).pairs("test")
