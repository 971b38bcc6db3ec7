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


def test_phrases_are_generated_once_at_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, sample_splits = [], phrases.sample_splits

    def recorded(*arguments: Any, **keys: Any) -> phrases.SampledSplits:
        calls.append(keys["counts"])
        return sample_splits(*arguments, **keys)

    monkeypatch.setattr(phrases, "sample_splits", recorded)
    data = cldr()
    assert not calls
    assert {split: len(data.pairs(split)) for split in COUNTS} == COUNTS
    assert {split: data.count(split) for split in COUNTS} == COUNTS
    assert calls == [COUNTS]


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


def test_samples_are_the_phrases_and_their_tokens_decode_to_them(german: Cldr) -> None:
    source, target = german.tokenizers()
    for i, pair in enumerate(german.pairs("test")):
        sample = german.sample("test", i, None)
        assert (sample["source_text"], sample["target_text"]) == pair
        assert (source.decode(sample["source"][:-1]), target.decode(sample["target"][:-1])) == pair


def test_a_phrase_is_its_own_location(german: Cldr) -> None:
    assert german.where("val", 3) == repr(german.pairs("val")[3][0])


def test_another_seed_gives_other_phrases(german: Cldr) -> None:
    assert cldr().pairs("test") == german.pairs("test")
    assert cldr(seed=1).pairs("test") != german.pairs("test")


def test_val_may_be_empty() -> None:
    data = cldr(val_count=0)
    assert data.count("val") == 0 and data.pairs("val") == [] and data.count("test") == COUNTS["test"]


def test_the_summary_counts_categories_and_says_what_is_left_out(german: Cldr) -> None:
    lines = german.summary()
    assert lines[0] == "en -> de; bpe from bytes, 600 entries for both"
    assert re.fullmatch(r"train: 2,500 pairs, .* tokens, of the Unicode CLDR tables in Babel [\d.]+", lines[1])
    counts = [int(text.replace(",", "")) for text in re.findall(r" ([\d,]+)(?:,|$)", lines[2].removeprefix("train:"))]
    assert lines[2].startswith("train: dates ") and len(counts) == 15 and sum(counts) == 2500
    assert re.fullmatch(r"train: 1,\d{3} of these are single names, which .* only in new combinations", lines[3])
    assert re.fullmatch(r"train: \d+ phrases and names left out because their source would have two targets", lines[4])
    assert not [line for line in lines if "tables:" in line]
    walloon = cldr(target="wa").summary()  # which has few tables
    assert [line for line in walloon if line.startswith("train: left out, because a locale lacks the tables: dates, ")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("de", "de"), ("zh", "zh"), ("de-CH", "de_CH"), ("zh-hant", "zh_Hant"), ("zh_TW", "zh_Hant_TW")],
)
def test_a_locale_is_found_by_its_name_in_cldr_and_on_the_web(name: str, expected: str) -> None:
    assert str(find_locale("target", name)) == expected


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
    message = str(caught.value)
    assert re.match(
        rf"data\.target={name} is not one of the 1,\d{{3}} locales of Unicode CLDR, such as en, de_CH or zh", message
    )
    assert hint in message and message[-1] in ".?"


@pytest.mark.parametrize(("source", "target"), [("de", "de"), ("zh-Hant", "zh_Hant")])
def test_one_locale_twice_is_one_sentence(source: str, target: str) -> None:
    with pytest.raises(UserError) as caught:
        cldr(source, target)
    assert str(caught.value) == (
        f"data.source={source} and data.target={target} are the same locale; expected two, such as en and de."
    )


def test_a_train_too_small_for_all_names_is_one_sentence() -> None:
    with pytest.raises(
        UserError, match=r"^data\.train_count=900: expected at least 1,.* names of countries, .* give more\.$"
    ):
        cldr(train_count=900).pairs("test")
