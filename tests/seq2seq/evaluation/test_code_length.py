"""The code length of a text: numbers worked out by hand, parts of a split, and files."""

import csv
import json
import math
from pathlib import Path

import pytest

from seq2seq.data.protocol import TextAmounts
from seq2seq.evaluation.code_length import CodeLengthMetric

AMOUNTS = TextAmounts(tokens=10, characters=20, bytes_=25, unknown=1)


def metric(nats: list[float], tokens: list[int], expected: int | None = None) -> CodeLengthMetric:
    result = CodeLengthMetric(AMOUNTS, 8, 4, expected)
    for i in reversed(range(len(nats))):
        result.update({"ids": [i]}, [{"nats": nats[i], "tokens": tokens[i]}])
    result.gather()
    return result


def test_the_numbers_are_those_worked_out_by_hand() -> None:
    """10 tokens of 3 bits each are 30 bits: 1.5 for each of 20 characters, and 1.2 for each of 25 bytes."""
    numbers = metric([4 * math.log(8), 6 * math.log(8)], [4, 6], 2).compute()
    assert numbers == {
        "loss": pytest.approx(math.log(8)),
        "perplexity": pytest.approx(8),
        "bits_per_token": pytest.approx(3),
        "bits_per_character": pytest.approx(1.5),
        "bits_per_byte": pytest.approx(1.2),
    }


def test_a_part_of_a_split_is_compared_with_its_share_of_the_text() -> None:
    part = CodeLengthMetric(AMOUNTS, 8, 4, 2)
    part.restrict(1)
    part.update({"ids": [1]}, [{"nats": 4 * math.log(8), "tokens": 4}])
    part.gather()
    assert part.compute()["bits_per_byte"] == pytest.approx(1.2)


def test_windows_that_are_missing_are_an_error() -> None:
    with pytest.raises(AssertionError, match="1 of 2"):
        metric([1.0], [4], 2)


def test_a_bad_model_has_an_infinite_perplexity_and_no_text_has_none() -> None:
    assert metric([8000.0], [4]).compute()["perplexity"] == math.inf
    assert math.isnan(metric([], []).compute()["perplexity"])


def test_the_files_state_context_and_amounts(tmp_path: Path) -> None:
    result = metric([4 * math.log(8), 6 * math.log(8)], [4, 6])
    result.write(tmp_path / "new")
    scores = json.loads((tmp_path / "new/scores.json").read_text())
    expected = {"tokens": 10, "characters": 20, "bytes": 25, "evaluated_tokens": 10, "unknown_tokens": 1}
    assert {**expected, "block": 8, "stride": 4}.items() <= scores.items()
    assert dict(result.details()[1:]) == pytest.approx(scores)
    with (tmp_path / "new/windows.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [row["id"] for row in rows] == ["0", "1"] and sum(float(row["bits"]) for row in rows) == pytest.approx(30)
