"""The translator's rows at toy sizes: different work is refused, and amounts are those of the work."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from common.weights.renaming import Table
from scripts import benchmark
from scripts.benchmarks import quantised, report, seq2seq, seq2seq_decode, seq2seq_peers
from scripts.benchmarks.timing import MismatchError, Setting


def run(tmp_path: Path, rows: str, *options: str) -> tuple[int, Path]:
    out = tmp_path / "report.json"
    tiny = ["--tiny", "--device", "cpu", "--warm-up", "0", "--rounds", "1", "--out", str(out)]
    return benchmark.main(["seq2seq", *tiny, "--rows", rows, *options]), out


@pytest.mark.slow
@pytest.mark.usefixtures("equal_peaks")
def test_every_row_runs_and_prints_its_throughput(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(tmp_path, ",".join(seq2seq.ROWS))
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    assert code == 0 and report.text(result) in printed
    rows = {row["row"].split()[0]: row for row in result["rows"]}
    assert [*rows] == ["greedy", "beam-4", "forward", "training", "throughput", "decoding,"]
    assert "ours fp32 4 of 4 translations equal" in rows["greedy"]["agreement"]
    assert ("logits of ours int8" in rows["greedy"]["agreement"]) == quantised.is_supported(torch.device("cpu"))
    assert "torch.nn.Transformer fp32 gradient" in rows["training"]["agreement"]
    for name, contender, amount, unit in (
        ("throughput", "ours bf16", 4 * 6, "target tokens"),
        ("forward", "torch.nn.Transformer bf16", 4 * 6, "target tokens"),
        ("decoding,", "transformers bf16", 4, "sentences"),
    ):
        [seconds] = rows[name]["seconds"][contender]
        [line] = [line for line in printed.splitlines() if line.startswith(name) and f"  {contender}  " in line][:1]
        assert f"  {amount / seconds:,.1f} {unit} per second" in line
    assert ("CTranslate2 int8" in rows["greedy"]["seconds"]) == seq2seq_peers.has_ctranslate2()


@pytest.mark.slow
@pytest.mark.usefixtures("equal_peaks")
def test_a_row_without_ctranslate2_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(seq2seq_peers, "has_ctranslate2", lambda: False)
    code, out = run(tmp_path, "greedy")
    assert code == 0 and "CTranslate2 is not installed" in capsys.readouterr().out
    assert not any("CTranslate2" in name for name in json.loads(out.read_text())["rows"][0]["seconds"])


@pytest.mark.parametrize(
    "name",
    [
        "decoder.blocks.1.cross_attention.in_proj.bias",
        "encoder.blocks.0.residuals.1.norm.weight",
        "decoder.blocks.0.feed_forward.expand.weight",
        "output_bias",
        "embedding.weight",
    ],
)
def test_nothing_is_timed_if_one_of_our_numbers_differs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = seq2seq_peers.to_transformers

    def patched(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        changed = ours[name].detach().clone()
        changed.flatten()[-1] += 0.5  # of a value's bias; a key's bias has no effect
        return original({**ours, name: changed})

    monkeypatch.setattr(seq2seq_peers, "to_transformers", patched)
    code, out = run(tmp_path, "greedy")
    printed = capsys.readouterr()
    assert code == 1 and not out.exists() and not printed.out
    assert "logits of transformers fp32" in printed.err and "not the same work" in printed.err


@pytest.mark.skipif(not seq2seq_peers.has_ctranslate2(), reason="CTranslate2 is not installed")
def test_nothing_is_timed_if_a_weight_of_ctranslate2_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = seq2seq_peers.ctranslate2_model

    def patched(theirs: Any, *arguments: Any, **options: Any) -> Any:
        bias = theirs.model.decoder.layers[0].fc2.bias
        bias.data[3] += 0.5
        model = original(theirs, *arguments, **options)
        bias.data[3] -= 0.5
        return model

    monkeypatch.setattr(seq2seq_peers, "ctranslate2_model", patched)
    assert run(tmp_path, "greedy")[0] == 1
    assert "log probabilities of CTranslate2 fp32" in capsys.readouterr().err


def test_ctranslate2_is_timed_in_the_types_that_it_supports_and_our_int8_against_its_int8(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(seq2seq_peers, "has_ctranslate2", lambda: True)
    monkeypatch.setattr(seq2seq_peers, "ctranslate2_types", lambda: {"float32", "int8", "int8_bfloat16", "int16"})
    monkeypatch.setattr(seq2seq_peers, "ctranslate2_model", lambda *_, **__: None)
    monkeypatch.setattr(quantised, "is_supported", lambda device: True)
    monkeypatch.setattr(quantised, "quantised", lambda model, run: model)
    setting = Setting(device=torch.device("cpu"), tiny=True, compile=False, images=None, scratch=tmp_path)
    row = seq2seq_decode.greedy(setting)
    int8 = "CTranslate2 int8", "CTranslate2 int8 and bf16"
    assert [name for name in row.contenders if "CTranslate2" in name] == ["CTranslate2 fp32", *int8]
    assert ("ours int8", int8) in row.pairs and ("ours bf16", ("CTranslate2 fp32", *int8)) in row.pairs


@pytest.mark.parametrize("names", ["NAMES", "TORCH_NAMES"])
def test_a_missing_row_in_a_table_of_names_is_an_error(names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = seq2seq_peers.marian_config(tiny=True) if names == "NAMES" else seq2seq_peers.config(tiny=True)
    model = seq2seq_peers.translator(recipe, 100)
    rows = getattr(seq2seq_peers, names).rows
    monkeypatch.setattr(seq2seq_peers, names, Table(*(row for row in rows if "residuals.1.norm" not in row[1])))
    with pytest.raises(RuntimeError, match="Missing key"):
        if names == "TORCH_NAMES":
            seq2seq_peers.torch_peer(model, recipe)
        else:
            seq2seq_peers.marian(model, recipe, 100)


@pytest.mark.parametrize(
    "pair",
    [
        ("encoder.blocks.1.residuals.0.norm.weight", "encoder.blocks.1.residuals.1.norm.weight"),
        ("decoder.blocks.0.attention.out_proj.bias", "decoder.blocks.0.feed_forward.contract.bias"),
    ],
)
def test_no_step_is_timed_if_two_tensors_are_swapped(
    pair: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original, (first, second) = seq2seq_peers.torch_peer, pair

    def patched(model: torch.nn.Module, recipe: dict[str, Any]) -> torch.nn.Module:
        ours = dict(model.named_parameters())
        theirs = original(model, recipe)
        theirs.load_state_dict(seq2seq_peers.to_torch({**ours, first: ours[second], second: ours[first]}))
        return theirs

    monkeypatch.setattr(seq2seq_peers, "torch_peer", patched)
    assert run(tmp_path, "train")[0] == 1
    printed = capsys.readouterr().err
    assert "torch.nn.Transformer fp32" in printed and "not the same work" in printed


def test_two_of_32_sentences_may_differ_in_fp32_and_any_in_int8() -> None:
    """One in sixteen may differ: of 32 sentences 30 must be equal."""
    expected = [[number] for number in range(32)]
    searches = {
        "transformers fp32": lambda: expected,
        "ours fp32": lambda: [[0], [0], [0], *expected[3:]],  # one of the three is equal
        "CTranslate2 int8": lambda: [[7]] * 32,
    }
    agreements = seq2seq_decode._compare_translations(searches, 1)
    assert "ours fp32 30 of 32 translations equal" in agreements
    assert "CTranslate2 int8 1 of 32 translations equal" in agreements
    searches["ours fp32"] = lambda: [[1], [0], [0], *expected[3:]]
    with pytest.raises(MismatchError, match="ours fp32: only 29 of 32"):
        seq2seq_decode._compare_translations(searches, 1)


def test_a_shorter_translation_is_not_the_same_work() -> None:
    searches = {"transformers fp32": lambda: [[4, 5]], "CTranslate2 int8": lambda: [[4]]}
    with pytest.raises(MismatchError, match="CTranslate2 int8: not all translations have 2 tokens"):
        seq2seq_decode._compare_translations(searches, 2)
