"""The benchmark's rows at toy sizes: outputs are compared before anything is timed, and the numbers are consistent."""

import importlib
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import benchmark
from scripts.benchmarks import report, timing
from scripts.benchmarks.timing import MismatchError, Row, add_peaks, compare_numbers, compare_tensors, measure

pytest.importorskip("transformers")
pytest.importorskip("timm")

from common.weights.renaming import Table
from scripts.benchmarks import deformable, deformable_peer, detr, detr_peer, learning, swin, vit, vit_input, vit_peers
from vit.importing import layouts


def run(tmp_path: Path, *options: str, suite: str = "detr") -> tuple[int, Path]:
    out = tmp_path / "report.json"
    return benchmark.main([suite, "--tiny", "--device", "cpu", "--warm-up", "0", "--out", str(out), *options]), out


@pytest.mark.slow
@pytest.mark.usefixtures("equal_peaks")
@pytest.mark.parametrize(
    ("suite", "rows"),
    [
        ("detr", ["forward", "forward", "training", "matching", "input"]),
        ("deformable", ["forward", "training"]),
        ("vit", ["forward", "forward", "training", "throughput", "RandAugment,"]),
        ("swin", ["forward", "forward", "training"]),
    ],
)
def test_every_row_runs_and_the_json_file_holds_the_printed_numbers(
    suite: str, rows: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = run(tmp_path, "--rounds", "2", suite=suite)
    assert code == 0
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    assert report.text(result) in printed
    assert [row["row"].split()[0] for row in result["rows"]] == rows
    assert len(rows) == len({"detr": detr, "deformable": deformable, "vit": vit, "swin": swin}[suite].ROWS)
    assert result["machine"]["threads"] >= 1 and "torch" in result["versions"]
    lines = printed.splitlines()
    for row in result["rows"]:
        assert {*row["amounts"]} == {*row["seconds"]} - {"matrix product fp32", "matrix product bf16"}, (
            "all have amounts"
        )
        assert row["peak_mib"] == dict.fromkeys(row["amounts"], 1.0)
        has_model = row["row"].split()[0] in ("forward", "training", "throughput")
        assert {*row["rates"]} == ({name for name in row["seconds"] if "int8" not in name} if has_model else set())
        assert row["agreement"] in printed
        for ratio in row["ratios"]:
            contender, reference = (row["seconds"][ratio[side]] for side in ("one", "other"))
            assert len(contender) == len(reference) == result["rounds"] == 2
            assert ratio["ratio"] == pytest.approx(statistics.median(contender) / statistics.median(reference))
            assert any(
                line.startswith(row["row"]) and f"  {ratio['one']} " in line and f"{ratio['ratio']:.3f}" in line
                for line in lines
            )


def without(part: str, names: Table) -> Table:
    """The table without the rows of our part `part`."""
    return Table(*(row for row in names.rows if part not in row[1]))


@pytest.mark.parametrize("part", ["feed_forward.contract", "residuals.1.norm"])
def test_a_missing_row_in_the_table_of_names_is_an_error(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = detr_peer.detector()
    monkeypatch.setattr(detr_peer, "NAMES", without(part, detr_peer.NAMES))
    with pytest.raises(RuntimeError, match="Missing key"):
        detr_peer.peer(model)


@pytest.mark.parametrize("part", ["cross_attention.", "box_head.2", "feed_forward.contract"])
def test_a_missing_row_in_deformable_detrs_table_of_names_is_an_error(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = deformable_peer.detector()
    monkeypatch.setattr(deformable_peer, "NAMES", without(part, deformable_peer.NAMES))
    with pytest.raises(RuntimeError, match="Missing key"):
        deformable_peer.peer(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "encoder.blocks.5.attention.sampling_offsets.weight",
        "decoder.blocks.2.cross_attention.attention_weights.bias",
        "decoder.blocks.0.attention.in_proj.bias",
        "level_embedding",
        "reference_points.bias",
    ],
)
def test_deformable_detr_is_not_timed_if_one_of_our_tensors_differs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = deformable_peer.to_transformers

    def patched(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        changed = dict(ours)
        if name in ours:  # the names of trained parameters are converted, too
            changed[name] = ours[name].detach().clone()
            changed[name].view(len(ours[name]), -1)[[0, -1]] += 0.5  # the last point samples outside of tiny maps
        return original(changed)

    monkeypatch.setattr(deformable_peer, "to_transformers", patched)
    code, out = run(tmp_path, "--rows", "forward", "--rounds", "1", suite="deformable")
    printed = capsys.readouterr()
    assert code == 1 and not out.exists() and not printed.out
    assert "ours fp32 logits" in printed.err and "not the same work" in printed.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "pair",
    [
        ("model.encoder.layers.3.self_attn.q_proj", "model.encoder.layers.3.self_attn.k_proj"),
        ("model.decoder.layers.5.encoder_attn_layer_norm", "model.decoder.layers.5.final_layer_norm"),
        ("model.backbone.model.layer3.1.bn1", "model.backbone.model.layer3.1.bn2"),
    ],
)
def test_nothing_is_timed_if_two_tensors_are_swapped(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = detr_peer.to_transformers
    swapped = {pair[0]: pair[1], pair[1]: pair[0]}

    def patched(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        theirs = original(ours)
        return {
            f"{swapped.get(part, part)}.{last}": tensor
            for (part, _, last), tensor in ((name.rpartition("."), tensor) for name, tensor in theirs.items())
        }

    monkeypatch.setattr(detr_peer, "to_transformers", patched)
    code, out = run(tmp_path, "--rows", "forward", "--rounds", "1")
    printed = capsys.readouterr()
    assert code == 1 and not out.exists() and not printed.out
    assert "ours fp32 logits" in printed.err and "not the same work" in printed.err


@pytest.mark.parametrize("layout", vit_peers.PEERS)
def test_a_missing_row_in_a_vits_table_of_names_is_an_error(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = vit_peers.config("vit_b16", tiny=True)
    model = vit_peers.classifier(recipe)
    names = without("residuals.1.norm", layouts.LAYOUTS[layout].names)
    monkeypatch.setitem(layouts.LAYOUTS, layout, layouts.LAYOUTS[layout]._replace(names=names))
    with pytest.raises(RuntimeError, match="Missing key"):
        vit_peers.peer(layout, model, recipe)


SWAPS = [
    ("encoder.blocks.1.residuals.0.norm.weight", "encoder.blocks.1.residuals.1.norm.weight"),
    ("encoder.blocks.0.attention.out_proj.bias", "encoder.blocks.0.feed_forward.contract.bias"),
    ("class_token", "positions.token"),  # only their sum affects the output, so the step must be compared, too
    ("encoder.norm.bias", "patches.bias"),
]


@pytest.mark.parametrize("layout", vit_peers.PEERS)
@pytest.mark.parametrize("pair", SWAPS)
def test_no_vit_is_timed_if_two_tensors_are_swapped(
    pair: tuple[str, str],
    layout: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = vit_peers.to_layout

    def patched(ours: dict[str, torch.Tensor], requested: str) -> dict[str, torch.Tensor]:
        first, second = pair if requested == layout else (pair[0], pair[0])
        return original({**ours, first: ours[second], second: ours[first]}, requested)

    monkeypatch.setattr(
        vit_peers, "to_layout", patched
    )  # for the weights only; the comparison of gradients keeps the original
    code, out = run(tmp_path, "--rows", "train", "--rounds", "1", suite="vit")
    printed = capsys.readouterr()
    assert code == 1 and not out.exists() and not printed.out
    assert f"{layout} fp32" in printed.err and "not the same work" in printed.err
    if "class_token" not in pair:
        assert run(tmp_path, "--rows", "forward", "--rounds", "1", suite="vit")[0] == 1


def test_nothing_is_timed_if_our_optimizer_takes_another_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = learning.optim.build
    monkeypatch.setattr(
        learning.optim, "build", lambda model, options: original(model, replace(options, lr=1.1 * options.lr))
    )
    assert run(tmp_path, "--rows", "train", "--rounds", "1", suite="vit")[0] == 1
    assert "torchvision fp32 update" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "statistic"),
    [
        ({"flip": 0.0}, "right over left"),
        ({"policy": "none"}, "brightness"),
        ({"magnitude": 20}, "black"),
        ({"scale": (1.0, 1.0)}, "detail"),
    ],
)
def test_nothing_is_timed_if_our_augmentation_differs(
    change: dict[str, Any],
    statistic: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = vit_input.augmentation.views
    monkeypatch.setattr(
        vit_input.augmentation, "views", lambda x, u, options, size: original(x, u, replace(options, **change), size)
    )
    assert run(tmp_path, "--rows", "augment", "--rounds", "1", suite="vit")[0] == 1
    printed = capsys.readouterr().err
    assert f"{statistic}: " in printed and "standard errors apart" in printed


def test_the_fastest_of_several_references_has_the_lowest_median(monkeypatch: pytest.MonkeyPatch) -> None:
    """b takes 4, 4 and 1 seconds, c always 3: c has the lower median. a takes 6, twice as much as c."""
    times = {"a": [6.0, 6.0, 6.0], "b": [4.0, 4.0, 1.0], "c": [3.0, 3.0, 3.0]}
    monkeypatch.setattr(timing, "_seconds", lambda work, device: times[work()].pop(0))
    contenders = {name: lambda name=name: name for name in times}
    row = Row(name="r", contenders=contenders, pairs=[("a", ("b", "c")), ("a", "b")], check=lambda: "equal")
    measurement = measure(row, rounds=3, warm_up=0, device=torch.device("cpu"))
    fastest, single = measurement["ratios"]
    assert (fastest["other"], fastest["among"], fastest["ratio"]) == ("c", ["b", "c"], 2.0)
    assert (single["other"], single["among"], single["ratio"]) == ("b", ["b"], 1.5)
    printed = report.text({"machine": {}, "versions": {}, "rounds": 3, "rows": [add_peaks(measurement, {})]})
    assert "c, fastest of 2" in printed and "b, fastest" not in printed


def test_a_row_is_checked_before_it_is_timed_and_contenders_take_turns() -> None:
    calls: list[str] = []

    def check() -> str:
        assert not calls
        return "equal"

    names = ("a", "b", "c")
    contenders = {name: lambda name=name: calls.append(name) for name in names}
    row = Row(name="r", contenders=contenders, pairs=[("a", "b")], check=check, threads=1)
    measurement = measure(row, rounds=5, warm_up=2, device=torch.device("cpu"))
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 7 and all(sorted(order) == [*names] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1, "in a fixed order a contender would profit from another's cache"
    assert [len(times) for times in measurement["seconds"].values()] == [5, 5, 5]
    low, high = measurement["ratios"][0]["quartiles"]
    assert low <= high and measurement["agreement"] == "equal" and measurement["threads"] == 1


def test_a_mismatch_ends_a_row_before_it_is_timed() -> None:
    def check() -> str:
        return compare_tensors("x", torch.zeros(2, 3), torch.ones(2, 3), 0.1)

    def work() -> None:
        raise AssertionError("timed")

    with pytest.raises(MismatchError):
        measure(
            Row(name="r", contenders={"a": work}, pairs=[], check=check),
            rounds=1,
            warm_up=0,
            device=torch.device("cpu"),
        )


def test_a_common_constant_does_not_hide_a_difference() -> None:
    outputs = 100 + torch.tensor([[0.0], [1.0], [2.0]])
    expected = 100 + torch.tensor([[2.0], [1.0], [0.0]])
    assert compare_tensors("x", outputs, expected, 0.03)
    with pytest.raises(MismatchError, match="2 apart"):
        compare_tensors("x", outputs, expected, 0.03, along=-2)
    with pytest.raises(MismatchError):
        compare_tensors("x", torch.full((2, 2), torch.nan), torch.ones(2, 2), 0.1)
    with pytest.raises(MismatchError, match="shapes"):
        compare_tensors("x", torch.ones(2), torch.ones(3), 0.1)
    with pytest.raises(MismatchError):
        compare_numbers("x", torch.tensor(1.0), torch.tensor(1.1), 0.05)


def test_an_unknown_row_ends_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--rows", "forwards")[0] == 2
    assert f"forwards: detr has only {', '.join(detr.ROWS)};" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("equal_peaks")
@pytest.mark.parametrize(
    ("suite", "scalings"),
    [
        ("detr", ["side", "batch", "queries", "matching-objects", "matching-queries"]),
        ("vit", ["side", "batch"]),
        ("seq2seq", ["length", "tokens", "beam"]),
    ],
)
def test_every_scaling_runs_and_has_a_line_for_each_value_and_contender(
    suite: str, scalings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = run(tmp_path, "--scaling", "--rows", ",".join(scalings), "--rounds", "1", suite=suite)
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    assert code == 0 and report.text(result) in printed
    kinds = importlib.import_module(benchmark.SUITES[suite]).SCALINGS
    assert [*kinds] == scalings and [table["name"] for table in result["scalings"]] == [k.name for k in kinds.values()]
    for kind, table in zip(kinds.values(), result["scalings"], strict=True):
        assert len(table["lines"]) == 2 * len(kind.tiny), "ours and a peer's"
        assert {line["contender"].split()[0] == "ours" for line in table["lines"]} == {True, False}
        assert sum(line["growth"] is not None for line in table["lines"]) == 2 * (len([n for n in kind.tiny if n]) - 1)
    assert len({row["row"] for row in result["rows"]}) == sum(len(kind.tiny) for kind in kinds.values())


@pytest.mark.slow
def test_a_comparison_with_an_earlier_report_is_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = run(tmp_path, "--rows", "matching", "--rounds", "1")
    earlier = tmp_path / "earlier.json"
    out.rename(earlier)
    assert code == 0
    code, out = run(tmp_path, "--rows", "matching", "--rounds", "2", "--against", str(earlier))
    comparison = json.loads(out.read_text())["against"]
    printed = capsys.readouterr().out
    assert code == 0 and f"against {earlier}" in printed and "Other options: rounds 1 -> 2." in printed
    [pair] = comparison["pairs"]
    assert pair["then"]["ratio"] == json.loads(earlier.read_text())["rows"][0]["ratios"][0]["ratio"]
    assert not comparison["new"] and not comparison["gone"] and not comparison["machine"]
