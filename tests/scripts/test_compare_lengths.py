"""Tables and a picture of translators' scores by the length of the source."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from common.config.compose import configure
from scripts import compare

GROUPS = {"1-2": (100, 90.0, 0.9), "3-4": (50, 80.0, 0.7), "11-12": (5, 40.0, 0.25)}


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def run(folder: str, model: str, bleu: float, names: list[str] | None = None, unit: str = "words") -> None:
    """Write a finished run's folder; with `names`, it has scores of these groups."""
    path = Path(folder)
    (path / "predictions").mkdir(parents=True)
    config = configure("train", [f"model={model}"])
    (path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    results = {"goal": "val/bleu", "direction": "maximize", "val/bleu": bleu}
    (path / "results.json").write_text(json.dumps(results))
    if names is not None:
        groups = [
            {"lengths": name, "sentences": GROUPS[name][0], "bleu": GROUPS[name][1], "exact_match": GROUPS[name][2]}
            for name in names
        ]
        content = {"by_source_length": {"unit": unit, "groups": groups}}
        (path / "predictions/scores.json").write_text(json.dumps(content))


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    """The lines of the printed tables, split at spaces."""
    assert compare.main(arguments) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_a_table_of_each_score_has_a_row_for_each_run_in_the_order_of_the_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run("r/a", "rnn", 30.0, ["1-2", "3-4"])
    run("r/b", "rnn_luong", 60.0, ["1-2", "3-4", "11-12"])
    run("r/c", "seq2seq", 10.0)
    lines = printed(capsys, "r", "--by-length")
    start = lines.index("test/bleu by words of the source".split())
    assert lines[start + 1] == ["run", "1-2", "3-4", "11-12"]
    assert lines[start + 3 : start + 6] == [
        ["sentences", "100", "50", "5"],
        ["r/b", "90.0000", "80.0000", "40.0000"],
        ["r/a", "90.0000", "80.0000", "-"],
    ]
    start = lines.index("test/exact_match by words of the source".split())
    assert lines[start + 4] == ["r/b", "0.9000", "0.7000", "0.2500"]
    assert "test/bleu by words of the source".split() not in printed(capsys, "r")


def test_the_picture_has_a_line_for_each_run_and_score_and_names_the_models(capsys: pytest.CaptureFixture[str]) -> None:
    run("a", "rnn", 30.0, ["1-2", "3-4"])
    run("b", "rnn_luong", 60.0, ["1-2", "3-4", "11-12"])
    assert compare.main(["a", "b", "--length-picture", "p.svg"]) == 0
    capsys.readouterr()
    root = ElementTree.parse("p.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    counts = [len(str(line.get("points")).split()) for line in root.iter(f"{space}polyline")]
    assert counts == [3, 2, 3, 2]
    texts = [text.text for text in root.iter(f"{space}text")]
    assert {"Luong", "EncoderDecoder", "BLEU", "11-12", "words of the source"} <= {*texts}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["c", "--by-length"], "none of 1 runs has predictions/scores.json with scores by source length"),
        (["a", "--length-picture", "c"], "--length-picture c cannot be written"),
        (["d", "--by-length"], "scores.json is damaged"),
        (["a", "f", "--by-length"], "counted in words in a and characters in f; compare runs of one language"),
        (["e", "--by-length"], "scores.json is damaged (scores by source length: KeyError('bleu'))"),
    ],
)
def test_mistakes_end_in_one_sentence(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    run("a", "rnn", 30.0, ["1-2"])
    run("c", "seq2seq", 10.0)
    run("f", "rnn", 20.0, ["1-2"], unit="characters")
    run("d", "seq2seq", 10.0)
    Path("d/predictions/scores.json").write_text("{")
    run("e", "seq2seq", 10.0)
    groups = [{"lengths": "1-2", "sentences": 3, "exact_match": 0.5}]
    content = {"by_source_length": {"unit": "words", "groups": groups}}
    Path("e/predictions/scores.json").write_text(json.dumps(content))
    assert compare.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
