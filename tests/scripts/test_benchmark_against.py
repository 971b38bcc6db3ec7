"""Comparison of a benchmark's report with an earlier one; both are made by hand."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from scripts import benchmark
from scripts.benchmarks import against


def ratio(contender: str, reference: str, value: float, low: float, high: float) -> dict[str, Any]:
    return {"one": contender, "other": reference, "among": [reference], "ratio": value, "quartiles": [low, high]}


EARLIER: dict[str, Any] = {
    "machine": {"cpu": "a", "cores": 2, "threads": 2, "device": "cpu", "load": 0.1, "system": "s"},
    "versions": {"torch": "2.15.0", "timm": "1.0"},
    "options": {"suite": "vit", "rounds": "20", "batch": "None", "out": "earlier.json"},
    "rows": [
        {"row": "forward", "ratios": [ratio("ours", "timm", 0.50, 0.49, 0.51), ratio("ours", "slow", 0.3, 0.2, 0.4)]},
        {"row": "train", "ratios": [ratio("ours", "timm", 0.60, 0.55, 0.65)]},
        {"row": "old", "ratios": [ratio("ours", "timm", 0.9, 0.9, 0.9)]},
    ],
}


def with_ratio(content: dict[str, Any]) -> str:
    """The earlier report with a single ratio, as JSON."""
    return json.dumps({**EARLIER, "rows": [{"row": "r", "ratios": [content]}]})


def changed_report() -> dict[str, Any]:
    """Forward is slower, training unchanged, one row is renamed, and one contender is new."""
    current = copy.deepcopy(EARLIER)
    current["rows"][0]["ratios"] = [ratio("ours", "timm", 0.55, 0.54, 0.56), ratio("ours", "fast", 1.1, 1.0, 1.2)]
    current["rows"][1]["ratios"] = [ratio("ours", "timm", 0.57, 0.53, 0.61)]
    current["rows"][2]["row"] = "new"
    return current


def test_a_ratio_has_changed_if_the_interquartile_ranges_do_not_overlap() -> None:
    comparison = against.compare(EARLIER, changed_report())
    [forward, train] = comparison["pairs"]
    assert (forward["row"], forward["one"], forward["other"], forward["change"]) == (
        "forward",
        "ours",
        "timm",
        "slower",
    )
    assert (forward["then"]["ratio"], forward["now"]["ratio"]) == (0.50, 0.55)
    assert train["row"] == "train" and train["change"] == ""
    assert comparison["new"] == [["forward", "ours", "fast"], ["new", "ours", "timm"]]
    assert comparison["gone"] == [["forward", "ours", "slow"], ["old", "ours", "timm"]]
    assert against.compare(changed_report(), EARLIER)["pairs"][0]["change"] == "faster"
    printed = against.text(comparison, Path("earlier.json"))
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
    assert "new: new" in printed.splitlines() and "gone: old" in printed.splitlines(), (
        "of a whole row only the name is printed"
    )
    assert "Warning" not in printed


def test_the_fastest_of_several_references_is_one_pair_whichever_it_is() -> None:
    earlier, current = copy.deepcopy(EARLIER), copy.deepcopy(EARLIER)
    for report, fastest in ((earlier, "timm"), (current, "torchvision")):
        report["rows"][0]["ratios"] = [{**ratio("ours", fastest, 0.5, 0.5, 0.5), "among": ["timm", "torchvision"]}]
    comparison = against.compare(earlier, current)
    assert comparison["pairs"][0]["other"] == "timm or torchvision" and not comparison["new"]


def test_another_machine_and_other_versions_give_warnings_but_another_load_does_not() -> None:
    current = changed_report()
    current["machine"] |= {"cpu": "b", "load": 3.0}
    current["versions"] = {"torch": "2.16.0", "scipy": "1.0"}
    current["options"] |= {"rounds": "5", "out": "current.json", "suite": "all"}
    comparison = against.compare(EARLIER, current)
    assert comparison["machine"] == {"cpu": ["a", "b"]}
    assert comparison["versions"] == {"torch": ["2.15.0", "2.16.0"], "timm": ["1.0", None], "scipy": [None, "1.0"]}
    assert comparison["options"] == {"rounds": ["20", "5"]}
    printed = against.text(comparison, Path("earlier.json"))
    assert "Warning: another machine: cpu a -> b." in printed
    assert "Warning: other versions: torch 2.15.0 -> 2.16.0, timm 1.0 -> none, scipy none -> 1.0." in printed
    assert "Other options: rounds 20 -> 5." in printed


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "earlier.json"
    file.write_text(json.dumps(EARLIER))
    assert against.read(file) == EARLIER


@pytest.mark.parametrize(
    "text",
    [
        "",
        json.dumps(EARLIER)[:-20],
        "[]",
        "{}",
        "null",
        json.dumps({**EARLIER, "rows": [{"row": "forward"}]}),
        json.dumps({**EARLIER, "rows": "forward"}),
        json.dumps({**EARLIER, "rows": [{"row": "r", "ratios": [{**ratio("a", "b", 1, 1, 1), "quartiles": [1]}]}]}),
        json.dumps({**EARLIER, "rows": [{"row": "r", "ratios": [{**ratio("a", "b", 1, 1, 1), "ratio": None}]}]}),
        json.dumps(
            {**EARLIER, "rows": [{"row": "r", "ratios": [{**ratio("a", "b", 1, 1, 1), "quartiles": ["x", 1]}]}]}
        ),
        json.dumps({**EARLIER, "machine": ["a"]}),
        "\udcff",
    ],
)
def test_a_damaged_or_foreign_file_ends_in_one_sentence_before_anything_is_timed(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "earlier.json"
    file.write_text(text, encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(benchmark, "_run", lambda options: pytest.fail("timed"))
    assert benchmark.main(["vit", "--against", str(file)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"--against {file} is not a benchmark report") and "--out" in line


def test_a_missing_file_or_folder_ends_in_one_sentence_before_anything_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "_run", lambda options: pytest.fail("timed"))
    assert benchmark.main(["vit", "--against", str(tmp_path / "no.json")]) == 2
    assert "cannot be read (No such file or directory)" in capsys.readouterr().err
    assert benchmark.main(["vit", "--out", str(tmp_path / "no" / "out.json")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "there is no folder" in line
