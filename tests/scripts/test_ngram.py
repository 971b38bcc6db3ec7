"""N-gram models from the command line: numbers of each model and split, and refusals."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from scripts.ngram import main

WORDS = "zero one two three four five six seven eight nine".split()
CONTENT = "".join(f"{WORDS[n % 10]} {WORDS[n // 10 % 10]} {WORDS[n * n % 7]}\n" for n in range(300))


@pytest.fixture
def keys(tmp_path: Path) -> list[str]:
    (tmp_path / "all.txt").write_text(CONTENT)
    return [f"data.train={tmp_path / 'all.txt'}", "data.cache=null"]


def test_longer_contexts_need_fewer_bits_and_the_last_line_is_json(
    keys: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*keys, "--order", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    numbers = json.loads(lines[-1])
    for split in ("val", "test"):
        unigram, kneser_ney = (numbers[f"{split}/{name}/bits_per_character"] for name in ("unigram", "kneser_ney_4"))
        assert kneser_ney < 0.6 * unigram
    assert any(line.startswith("data      test: ") for line in lines) and any("discounts" in line for line in lines)


def test_unigrams_are_the_entropy_of_the_text_against_the_frequencies_of_train(
    keys: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without discounts to speak of: the text is long, so they change each frequency by less than a thousandth."""
    (tmp_path / "test.txt").write_text(CONTENT)
    (tmp_path / "all.txt").write_text(CONTENT * 20)
    command = [*keys, f"data.test={tmp_path / 'test.txt'}", "data.val_share=0", "--order", "1"]
    assert main(command) == 0
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
    frequencies = [count / len(CONTENT) for count in Counter(CONTENT).values()]
    entropy = -sum(f * math.log2(f) for f in frequencies)
    assert numbers["test/unigram/bits_per_character"] == pytest.approx(entropy, rel=1e-3)
    assert numbers.keys() == {f"test/unigram/bits_per_{unit}" for unit in ("token", "character", "byte")}


def test_mistakes_end_in_one_sentence(keys: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([*keys, "--order", "0"], "an order from 1 to 20"),
        (["data.train=missing.txt", "data.cache=null"], "There is no file"),
        ([*keys, "data.blocks=3"], "data.blocks"),
        (["model=seq2seq", "data=cldr"], "no text for language models"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
