"""A benchmark's report against an earlier one, made by hand."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from scripts import benchmark
from scripts.benchmarks import against


def ratio(one: str, other: str, value: float, low: float, high: float) -> dict[str, Any]:
    return {"one": one, "other": other, "among": [other], "ratio": value, "quartiles": [low, high]}


THEN: dict[str, Any] = {
    "machine": {"cpu": "a", "cores": 2, "threads": 2, "device": "cpu", "load": 0.1, "system": "s"},
    "versions": {"torch": "2.15.0", "timm": "1.0"},
    "options": {"suite": "vit", "rounds": "20", "batch": "None", "out": "then.json"},
    "rows": [
        {"row": "forward", "ratios": [ratio("ours", "timm", 0.50, 0.49, 0.51), ratio("ours", "slow", 0.3, 0.2, 0.4)]},
        {"row": "train", "ratios": [ratio("ours", "timm", 0.60, 0.55, 0.65)]},
        {"row": "old", "ratios": [ratio("ours", "timm", 0.9, 0.9, 0.9)]},
    ],
}


def changed() -> dict[str, Any]:
    """Forward is slower, training as it was, one row has another name, and one contender is new."""
    now = copy.deepcopy(THEN)
    now["rows"][0]["ratios"] = [ratio("ours", "timm", 0.55, 0.54, 0.56), ratio("ours", "fast", 1.1, 1.0, 1.2)]
    now["rows"][1]["ratios"] = [ratio("ours", "timm", 0.57, 0.53, 0.61)]
    now["rows"][2]["row"] = "new"
    return now


def test_ratios_beyond_both_spreads_have_changed_and_others_are_new_or_gone() -> None:
    compared = against.compare(THEN, changed())
    [forward, train] = compared["pairs"]
    assert (forward["row"], forward["one"], forward["other"], forward["change"]) == (
        "forward",
        "ours",
        "timm",
        "slower",
    )
    assert (forward["then"]["ratio"], forward["now"]["ratio"]) == (0.50, 0.55)
    assert train["row"] == "train" and train["change"] == ""
    assert compared["new"] == [["forward", "ours", "fast"], ["new", "ours", "timm"]]
    assert compared["gone"] == [["forward", "ours", "slow"], ["old", "ours", "timm"]]
    assert against.compare(changed(), THEN)["pairs"][0]["change"] == "faster"
    printed = against.text(compared, Path("then.json"))
    [line] = [line for line in printed.splitlines() if line.startswith("forward")]
    assert line.split() == [
        "forward",
        "ours",
        "timm",
        "0.500",
        "0.490-0.510",
        "0.550",
        "0.540-0.560",
        "1.100",
        "slower",
    ]
    assert "new: forward: ours over fast" in printed and "gone: forward: ours over slow" in printed
    assert "new: new" in printed.splitlines() and "gone: old" in printed.splitlines(), "a whole row has one word"
    assert "Warning" not in printed


def test_the_fastest_of_several_is_the_same_pair_whichever_it_is() -> None:
    then, now = copy.deepcopy(THEN), copy.deepcopy(THEN)
    for report, fastest in ((then, "timm"), (now, "torchvision")):
        report["rows"][0]["ratios"] = [{**ratio("ours", fastest, 0.5, 0.5, 0.5), "among": ["timm", "torchvision"]}]
    compared = against.compare(then, now)
    assert compared["pairs"][0]["other"] == "timm or torchvision" and not compared["new"]


def test_another_machine_and_other_versions_are_warned_of_and_the_load_is_not() -> None:
    now = changed()
    now["machine"] |= {"cpu": "b", "load": 3.0}
    now["versions"] = {"torch": "2.16.0", "scipy": "1.0"}
    now["options"] |= {"rounds": "5", "out": "now.json", "suite": "all"}
    compared = against.compare(THEN, now)
    assert compared["machine"] == {"cpu": ["a", "b"]}
    assert compared["versions"] == {"torch": ["2.15.0", "2.16.0"], "timm": ["1.0", None], "scipy": [None, "1.0"]}
    assert compared["options"] == {"rounds": ["20", "5"]}
    printed = against.text(compared, Path("then.json"))
    assert "Warning: another machine: cpu a -> b." in printed
    assert "Warning: other versions: torch 2.15.0 -> 2.16.0, timm 1.0 -> none, scipy none -> 1.0." in printed
    assert "Other options: rounds 20 -> 5." in printed


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "then.json"
    file.write_text(json.dumps(THEN))
    assert against.read(file) == THEN


@pytest.mark.parametrize(
    "text",
    [
        "",
        json.dumps(THEN)[:-20],
        "[]",
        "{}",
        "null",
        json.dumps({**THEN, "rows": [{"row": "forward"}]}),
        json.dumps({**THEN, "rows": "forward"}),
        json.dumps({**THEN, "rows": [{"row": "r", "ratios": [{**ratio("a", "b", 1, 1, 1), "quartiles": [1]}]}]}),
        json.dumps({**THEN, "rows": [{"row": "r", "ratios": [{**ratio("a", "b", 1, 1, 1), "ratio": None}]}]}),
        json.dumps({**THEN, "rows": [{"row": "r", "ratios": [{**ratio("a", "b", 1, 1, 1), "quartiles": ["x", 1]}]}]}),
        json.dumps({**THEN, "machine": ["a"]}),
        "\udcff",
    ],
)
def test_a_damaged_or_foreign_file_ends_in_one_sentence_before_anything_is_timed(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "then.json"
    file.write_text(text, encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(benchmark, "_run", lambda options: pytest.fail("timed"))
    assert benchmark.main(["vit", "--against", str(file)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"--against {file} is no report of a benchmark") and "--out" in line


def test_a_missing_file_or_folder_ends_in_one_sentence_before_anything_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "_run", lambda options: pytest.fail("timed"))
    assert benchmark.main(["vit", "--against", str(tmp_path / "no.json")]) == 2
    assert "cannot be read (No such file or directory)" in capsys.readouterr().err
    assert benchmark.main(["vit", "--out", str(tmp_path / "no" / "out.json")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "there is no folder" in line
