"""The benchmark's numbers: throughput, operations, peak memory, and growth."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from common.nn.linear import Linear
from scripts.benchmarks import flops, machine, peak, report, scaling, timing
from scripts.benchmarks.scaling import Scaling
from scripts.benchmarks.timing import Row, Setting, add_peaks, measure

CPU = torch.device("cpu")
MIB = 2**20


def make_row(**changes: object) -> Row:
    options: dict[str, object] = {"name": "r", "contenders": {"a": lambda: None}, "pairs": [], "check": lambda: "equal"}
    return Row(**{**options, **changes})  # type: ignore[arg-type]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, Iterator[float]]:
    """The seconds that each contender seems to take; contenders return their names."""
    times: dict[str, Iterator[float]] = {}
    monkeypatch.setattr(timing, "_seconds", lambda work, device: next(times[work()]))
    return times


def test_throughput_is_the_amount_over_the_median_time(clock: dict[str, Iterator[float]]) -> None:
    clock["a"] = iter([1.0, 4.0, 2.0])
    row = make_row(contenders={"a": lambda: "a"}, amounts={"a": (8, "images")})
    measurement = add_peaks(measure(row, rounds=3, warm_up=0, device=CPU), {})
    assert measurement["amounts"]["a"] == {"a_second": 4.0, "at_once": 8, "unit": "images"}
    assert measurement["times"]["a"] == {"median": 2000.0, "quartiles": [1500.0, 3000.0]}
    printed = report.text({"machine": {}, "versions": {}, "rounds": 3, "rows": [measurement]})
    assert "4.0 images per second" in printed


def test_rates_are_operations_over_the_median_time_and_relative_to_the_product_of_their_precision() -> None:
    seconds = {
        "one": [1.0, 2.0, 9.0],
        "two": [2.0],
        "matrix product fp32": [2.0, 2.0, 2.0],
        "matrix product bf16": [1.0],
    }
    operations = {"one": (6.0, "fp32"), "two": (6.0, "bf16")}
    limits = {"matrix product fp32": (20.0, "fp32"), "matrix product bf16": (30.0, "bf16")}
    rates = timing.rates({**operations, **limits}, seconds)
    assert rates["one"] == {"flops_per_s": 3.0, "of_matrix_rate": pytest.approx(0.3)}
    assert rates["two"] == {"flops_per_s": 3.0, "of_matrix_rate": pytest.approx(0.1)}
    assert rates["matrix product fp32"] == {"flops_per_s": 10.0, "of_matrix_rate": 1.0}


def test_a_known_product_reaches_about_the_rate_of_the_matrix_product() -> None:
    """A contender with the same product as the limit has between half and twice the limit's rate."""
    known = flops.fastest_product("fp32", CPU)
    row = make_row(contenders={"known fp32": known.work}, flops={"known fp32": (known.operations, "fp32")})
    measurement = add_peaks(measure(row, rounds=5, warm_up=1, device=CPU), {})
    assert 0.5 < measurement["rates"]["known fp32"]["of_matrix_rate"] < 2
    printed = report.text({"machine": {}, "versions": {}, "rounds": 5, "rows": [measurement]})
    assert "of the measured matrix rate" in printed


def test_operations_of_products_convolutions_and_backward_passes_are_counted_but_not_of_frozen_parts() -> None:
    """2 x 3 x 4 multiply-adds; backward as many for the weight, and for the input only if it needs a gradient."""
    single = nn.Sequential(Linear(3, 4))
    inputs = torch.empty(2, 3)
    assert flops.operations(single, inputs, training=False) == 2 * 24
    assert flops.operations(single, inputs, training=True) == 2 * 2 * 24
    double = nn.Sequential(Linear(3, 4), Linear(4, 5))
    assert flops.operations(double, inputs, training=True) == 2 * (2 * 24 + 3 * 40)
    double[0].requires_grad_(False)
    assert flops.operations(double, inputs, training=True) == 2 * (24 + 2 * 40)
    convolution = nn.Conv2d(3, 5, 3, padding=1)
    assert flops.operations(convolution, torch.empty(1, 3, 8, 8), training=False) == 2 * 64 * 5 * 27


def test_counting_operations_computes_nothing_and_leaves_the_model_unchanged() -> None:
    model = nn.Sequential(Linear(3, 4), nn.Dropout(0.5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    flops.operations(model, torch.ones(2, 3), training=True)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and torch.backends.mkldnn.enabled


needs_peak_memory = pytest.mark.skipif(not peak._is_measurable(), reason="needs Linux with glibc")


def peak_in_a_process(work: str) -> float:
    """The peak in MiB of `work`, the body of a function, in a process like measure_peaks's; MIB floats take 4 MiB."""
    code = f"import torch\nfrom scripts.benchmarks import peak\nMIB = 2**20\nstored = []\ndef work():\n    {work}\n"
    code += "print(peak.peak_bytes(work, torch.device('cpu')) / MIB, peak.peak_bytes(work, torch.device('cpu')) / MIB)"
    environment = dict([peak.MALLOC_SETTING], PYTHONPATH=str(Path(__file__).resolve().parents[2]), OMP_NUM_THREADS="1")
    process = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    first, second = map(float, process.stdout.split())
    assert second == pytest.approx(first, abs=2) or "stored" in work
    return first


@pytest.mark.slow
@needs_peak_memory
def test_the_peak_counts_tensors_that_exist_at_the_same_time() -> None:
    """Two tensors of 48 MiB, then one; then 5,000 of 8 KiB, 39 MiB, which the heap retains when they are freed."""
    large = "both = [torch.ones(12 * MIB) for _ in range(2)]; del both; torch.ones(12 * MIB)"
    assert peak_in_a_process(large) == pytest.approx(96, abs=2)
    assert peak_in_a_process("[torch.ones(2048) for _ in range(5000)]") == pytest.approx(39, abs=6)


@needs_peak_memory
def test_the_peak_includes_what_the_first_call_stores_but_not_what_only_it_allocates() -> None:
    """128 MiB that only the first call allocates, 32 MiB that it stores, and 16 MiB in every call."""
    once = "stored or (torch.ones(32 * MIB), stored.append(torch.ones(8 * MIB))); torch.ones(4 * MIB)"
    assert peak_in_a_process(once) == pytest.approx(32 + 16, abs=2)


@pytest.mark.slow
@needs_peak_memory
def test_peaks_are_measured_on_a_new_row_and_leave_the_environment_unchanged(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    from scripts.benchmarks import detr_train

    before = dict(os.environ)
    setting = Setting(device=CPU, tiny=True, compile=False, images=None, scratch=tmp_path)
    peaks = peak.measure_peaks(partial(detr_train.matching_row, objects=80, queries=3000), setting)
    assert [*peaks] == ["transformers", "ours"] and dict(os.environ) == before
    # No contender stores gradients of the 6 x 2 x 3000 x 92 logits; probabilities and costs take at least as much.
    assert all(10 < number / MIB < 300 for number in peaks.values())


def test_a_ratio_of_peaks_needs_both_peaks() -> None:
    contenders = {"a": lambda: None, "b": lambda: None, "c": lambda: None}
    row = make_row(contenders=contenders, pairs=[("a", "b"), ("a", "c")])
    measurement = add_peaks(measure(row, rounds=1, warm_up=0, device=CPU), {"a": 3 * MIB, "b": 2 * MIB})
    assert [ratio["memory"] for ratio in measurement["ratios"]] == [1.5, None]
    assert measurement["peak_mib"] == {"a": 3.0, "b": 2.0}
    printed = report.text({"machine": {}, "versions": {}, "rounds": 1, "rows": [measurement]})
    [_, *ratios] = printed.partition("ratio")[2].splitlines()
    assert [line.split()[-1] for line in ratios if "  b  " in line] == ["1.50"]


def test_growth_is_the_exponent_of_a_power_law(clock: dict[str, Iterator[float]]) -> None:
    """a takes 3 n^2 ms and b n^0.5 ms; after a value of 0 there is no exponent."""
    values = (0, 1, 4, 10)
    clock["a"] = (3e-3 * n**2 + (n == 0) for n in values)
    clock["b"] = (1e-3 * n**0.5 + (n == 0) for n in values)
    contenders = {"a": lambda: "a", "b": lambda: "b"}
    rows = []
    for value in values:
        row = make_row(contenders=contenders, amounts={name: (value or 1, "images") for name in contenders})
        rows.append((value, add_peaks(measure(row, rounds=1, warm_up=0, device=CPU), {"a": MIB})))
    lines = scaling.lines(rows)
    assert [(line["contender"], line["size"]) for line in lines] == [*itertools.product("ab", values)]
    assert [line["growth"] for line in lines[:4]] == [None, None, pytest.approx(2), pytest.approx(2)]
    assert [line["growth"] for line in lines[4:]] == [None, None, pytest.approx(0.5), pytest.approx(0.5)]
    assert lines[3]["ms"] == pytest.approx(300) and lines[3]["ms_per_unit"] == pytest.approx(30)
    assert lines[3]["unit"] == "image" and lines[3]["peak_mib"] == 1 and lines[4]["peak_mib"] is None


def test_a_scaling_has_other_values_if_it_is_tiny_or_on_cuda(tmp_path: Path) -> None:
    def setting(device: str, tiny: bool = False) -> Setting:
        return Setting(device=torch.device(device), tiny=tiny, compile=False, images=None, scratch=tmp_path)

    kind = Scaling(name="n", build=lambda value, setting: make_row(), values=(4, 8), tiny=(1, 2), cuda=(64, 128))
    assert kind.values_for(setting("cpu")) == (4, 8) and kind.values_for(setting("cuda")) == (64, 128)
    assert kind.values_for(setting("cuda", tiny=True)) == (1, 2)
    assert setting("cpu").batch_size(8, 32) == 8 and setting("cuda").batch_size(8, 32) == 32


def test_a_busy_machine_gives_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (0.51, 0, 0), raising=False)
    [sentence] = machine.warnings(machine.describe(CPU))
    assert "busy" in sentence and "0.51" in sentence
    assert f"Warning: {sentence}" in report.text(
        {"machine": {}, "versions": {}, "warnings": [sentence], "rounds": 1, "rows": []}
    )
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (0.5, 9, 9))
    assert machine.warnings(machine.describe(CPU)) == []
    monkeypatch.delattr(machine.os, "getloadavg")
    assert machine.warnings(machine.describe(CPU)) == []


def test_a_selected_row_has_only_the_pairs_and_amounts_of_its_contenders() -> None:
    names = ("a", "b", "c")
    whole = make_row(
        contenders={name: lambda: None for name in names},
        pairs=[("a", "b"), ("a", "c")],
        amounts=dict.fromkeys(names, (1, "images")),
        flops=dict.fromkeys("ab", (1.0, "fp32")),
    )
    part = whole.select(["a", "c"])
    assert [*part.contenders] == ["a", "c"] and part.pairs == [("a", "c")]
    assert [*part.amounts] == ["a", "c"] and [*part.flops] == ["a"]


def test_a_row_runs_with_its_own_threads_and_restores_the_runs() -> None:
    before = torch.get_num_threads()
    threads: list[int] = []
    row = make_row(contenders={"a": lambda: threads.append(torch.get_num_threads())}, threads=before + 1)
    assert measure(row, rounds=1, warm_up=0, device=CPU)["threads"] == before + 1
    assert {*threads} == {before + 1} and torch.get_num_threads() == before


def test_a_vits_operations_are_counted_as_published() -> None:
    """timm's table gives ViT-B/16 17.58 G multiply-adds per image; a step takes about three times as many."""
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    from scripts.benchmarks import vit_peers

    with torch.device("meta"):
        model = vit_peers.classifier(vit_peers.config("vit_b16", tiny=False))
    image = torch.empty(1, 3, 224, 224, device="meta")
    assert flops.operations(model, image, training=False) == pytest.approx(2 * 17.58e9, rel=0.01)
    assert flops.operations(model, image, training=True) == pytest.approx(3 * 2 * 17.58e9, rel=0.02)


def test_a_translators_operations_are_those_of_its_matrices() -> None:
    """The base model, 25 tokens per side and V = 8,004, in multiply-adds of a forward pass on one pair:

    encoder, 6 layers:  25 (4 * 512^2 + 2 * 512 * 2048) + 2 * 25^2 * 512 = 79.28 M each
    decoder, 6 layers:  25 (8 * 512^2 + 2 * 512 * 2048) + 4 * 25^2 * 512 = 106.14 M each
    output:             25 * 512 * 8004 = 102.45 M

    in total 1.215 G, each two operations; a backward pass takes twice as many as a forward pass.
    """
    pytest.importorskip("transformers")
    from scripts.benchmarks import seq2seq_peers, seq2seq_train

    with torch.device("meta"):
        model = seq2seq_peers.translator(seq2seq_peers.config(tiny=False), seq2seq_peers.vocabulary_size(tiny=False))
    assert seq2seq_train.operations(model, 25, training=False) == pytest.approx(2 * 1.215e9, rel=0.01)
    assert seq2seq_train.operations(model, 25, training=True) == pytest.approx(3 * 2 * 1.215e9, rel=0.01)


def test_a_detectors_operations_are_counted_about_as_published() -> None:
    """The paper's table 1 gives DETR-R50 86 G multiply-adds on images of about 800 x 1066 pixels and some larger ones.

    Here they are counted for products only, on one image of exactly that size.
    """
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    from scripts.benchmarks import detr_peer

    model = detr_peer.detector()
    image = torch.empty(1, 3, 800, 1066)
    assert flops.operations(model, image, None, training=False) == pytest.approx(2 * 86e9, rel=0.07)
