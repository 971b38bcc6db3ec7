"""What the benchmark counts: amounts, operations, peak memory, and how cost grows."""

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
from scripts.benchmarks.timing import Row, Setting, measure, with_peaks

CPU = torch.device("cpu")
MIB = 2**20


def row(**changes: object) -> Row:
    options: dict[str, object] = {"name": "r", "contenders": {"a": lambda: None}, "pairs": [], "check": lambda: "equal"}
    return Row(**{**options, **changes})  # type: ignore[arg-type]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, Iterator[float]]:
    """Seconds that a contender, which returns its name, shall take."""
    times: dict[str, Iterator[float]] = {}
    monkeypatch.setattr(timing, "_seconds", lambda work, device: next(times[work()]))
    return times


def test_an_amount_a_second_is_the_amount_at_once_over_the_median_time(clock: dict[str, Iterator[float]]) -> None:
    clock["a"] = iter([1.0, 4.0, 2.0])
    given = row(contenders={"a": lambda: "a"}, amounts={"a": (8, "images")})
    measured = with_peaks(measure(given, rounds=3, warm_up=0, device=CPU), {})
    assert measured["amounts"]["a"] == {"a_second": 4.0, "at_once": 8, "unit": "images"}
    assert measured["times"]["a"] == {"median": 2000.0, "quartiles": [1500.0, 3000.0]}
    printed = report.text({"machine": {}, "versions": {}, "rounds": 3, "rows": [measured]})
    assert "4.0 images a second" in printed


def test_rates_are_operations_over_the_median_time_and_parts_of_the_products_of_their_precision() -> None:
    seconds = {
        "one": [1.0, 2.0, 9.0],
        "two": [2.0],
        "matrix product fp32": [2.0, 2.0, 2.0],
        "matrix product bf16": [1.0],
    }
    counted = {"one": (6.0, "fp32"), "two": (6.0, "bf16")}
    limits = {"matrix product fp32": (20.0, "fp32"), "matrix product bf16": (30.0, "bf16")}
    rates = timing.rates({**counted, **limits}, seconds)
    assert rates["one"] == {"flops_per_s": 3.0, "of_matrix_rate": pytest.approx(0.3)}
    assert rates["two"] == {"flops_per_s": 3.0, "of_matrix_rate": pytest.approx(0.1)}
    assert rates["matrix product fp32"] == {"flops_per_s": 10.0, "of_matrix_rate": 1.0}


def test_a_known_product_reaches_about_the_rate_of_the_matrix_product() -> None:
    """The very product that is the limit, as a contender of its own: neither half nor twice the limit's rate."""
    known = flops.product("fp32", CPU)
    given = row(contenders={"known fp32": known.work}, flops={"known fp32": (known.operations, "fp32")})
    measured = with_peaks(measure(given, rounds=5, warm_up=1, device=CPU), {})
    assert 0.5 < measured["rates"]["known fp32"]["of_matrix_rate"] < 2
    printed = report.text({"machine": {}, "versions": {}, "rounds": 5, "rows": [measured]})
    assert "of the measured matrix rate" in printed


def test_operations_are_counted_in_products_convolutions_and_backward_passes_but_not_of_what_is_frozen() -> None:
    """2 x 3 x 4 multiply-adds; backwards again as many for the weight, and for the input only where that is wanted."""
    one = nn.Sequential(Linear(3, 4))
    given = torch.empty(2, 3)
    assert flops.operations(one, given, training=False) == 2 * 24
    assert flops.operations(one, given, training=True) == 2 * 2 * 24
    two = nn.Sequential(Linear(3, 4), Linear(4, 5))
    assert flops.operations(two, given, training=True) == 2 * (2 * 24 + 3 * 40)
    two[0].requires_grad_(False)
    assert flops.operations(two, given, training=True) == 2 * (24 + 2 * 40)
    convolution = nn.Conv2d(3, 5, 3, padding=1)
    assert flops.operations(convolution, torch.empty(1, 3, 8, 8), training=False) == 2 * 64 * 5 * 27


def test_counting_operations_computes_nothing_and_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(Linear(3, 4), nn.Dropout(0.5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    flops.operations(model, torch.ones(2, 3), training=True)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and torch.backends.mkldnn.enabled


known_memory = pytest.mark.skipif(not peak._is_known(), reason="peak memory is known on Linux with glibc alone")


def in_a_process(work: str) -> float:
    """The peak in MiB of `work`, the body of a function, in a process as peaks() has it; MIB floats take 4 MiB."""
    code = f"import torch\nfrom scripts.benchmarks import peak\nMIB = 2**20\nkept = []\ndef work():\n    {work}\n"
    code += "print(peak.peak(work, torch.device('cpu')) / MIB, peak.peak(work, torch.device('cpu')) / MIB)"
    environment = dict([peak.RETURNED], PYTHONPATH=str(Path(__file__).resolve().parents[2]), OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, second = map(float, done.stdout.split())
    assert second == pytest.approx(first, abs=2) or "kept" in work
    return first


@pytest.mark.slow
@known_memory
def test_the_peak_is_that_of_tensors_that_live_at_once() -> None:
    """Two of 48 MiB, then one; then 5,000 small ones of 8 KiB, 39 MiB, which the heap keeps when they are freed."""
    large = "both = [torch.ones(12 * MIB) for _ in range(2)]; del both; torch.ones(12 * MIB)"
    assert in_a_process(large) == pytest.approx(96, abs=2)
    assert in_a_process("[torch.ones(2048) for _ in range(5000)]") == pytest.approx(39, abs=6)


@known_memory
def test_the_peak_holds_what_the_first_call_keeps_and_not_what_it_did_once() -> None:
    """128 MiB that only the first call takes, 32 MiB that it keeps, and 16 MiB of every call."""
    once = "kept or (torch.ones(32 * MIB), kept.append(torch.ones(8 * MIB))); torch.ones(4 * MIB)"
    assert in_a_process(once) == pytest.approx(32 + 16, abs=2)


@pytest.mark.slow
@known_memory
def test_peaks_are_those_of_a_row_made_anew_and_leave_the_environment_as_it_was(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    from scripts.benchmarks import detr_train

    before = dict(os.environ)
    setting = Setting(device=CPU, tiny=True, compile=False, images=None, scratch=tmp_path)
    found = peak.peaks(partial(detr_train.matching_row, objects=80, queries=3000), setting)
    assert [*found] == ["transformers", "ours"] and dict(os.environ) == before
    # Gradients of 6 x 2 x 3000 x 92 logits are kept by nobody; probabilities and costs take as much at least.
    assert all(10 < taken / MIB < 300 for taken in found.values())


def test_a_ratio_of_peaks_needs_both() -> None:
    contenders = {"a": lambda: None, "b": lambda: None, "c": lambda: None}
    given = row(contenders=contenders, pairs=[("a", "b"), ("a", "c")])
    measured = with_peaks(measure(given, rounds=1, warm_up=0, device=CPU), {"a": 3 * MIB, "b": 2 * MIB})
    assert [ratio["memory"] for ratio in measured["ratios"]] == [1.5, None]
    assert measured["peak_mib"] == {"a": 3.0, "b": 2.0}
    printed = report.text({"machine": {}, "versions": {}, "rounds": 1, "rows": [measured]})
    [_, *ratios] = printed.partition("ratio")[2].splitlines()
    assert [line.split()[-1] for line in ratios if "  b  " in line] == ["1.50"]


def test_time_that_goes_with_a_power_of_the_size_grows_by_that_power(clock: dict[str, Iterator[float]]) -> None:
    """a takes 3 n^2 ms and b n^0.5; from a size of 0 nothing grows by a power."""
    sizes = (0, 1, 4, 10)
    clock["a"] = (3e-3 * n**2 + (n == 0) for n in sizes)
    clock["b"] = (1e-3 * n**0.5 + (n == 0) for n in sizes)
    contenders = {"a": lambda: "a", "b": lambda: "b"}
    rows = []
    for size in sizes:
        given = row(contenders=contenders, amounts={name: (size or 1, "images") for name in contenders})
        rows.append((size, with_peaks(measure(given, rounds=1, warm_up=0, device=CPU), {"a": MIB})))
    lines = scaling.lines(rows)
    assert [(line["contender"], line["size"]) for line in lines] == [*itertools.product("ab", sizes)]
    assert [line["growth"] for line in lines[:4]] == [None, None, pytest.approx(2), pytest.approx(2)]
    assert [line["growth"] for line in lines[4:]] == [None, None, pytest.approx(0.5), pytest.approx(0.5)]
    assert lines[3]["ms"] == pytest.approx(300) and lines[3]["ms_per_unit"] == pytest.approx(30)
    assert lines[3]["unit"] == "image" and lines[3]["peak_mib"] == 1 and lines[4]["peak_mib"] is None


def test_a_scaling_has_other_sizes_where_it_is_tiny_or_on_cuda(tmp_path: Path) -> None:
    def setting(kind: str, tiny: bool = False) -> Setting:
        return Setting(device=torch.device(kind), tiny=tiny, compile=False, images=None, scratch=tmp_path)

    given = Scaling(name="n", build=lambda size, setting: row(), sizes=(4, 8), tiny=(1, 2), cuda=(64, 128))
    assert given.of(setting("cpu")) == (4, 8) and given.of(setting("cuda")) == (64, 128)
    assert given.of(setting("cuda", tiny=True)) == (1, 2)
    assert setting("cpu").at_once(8, 32) == 8 and setting("cuda").at_once(8, 32) == 32


def test_a_busy_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_part_of_a_row_has_the_pairs_and_amounts_of_its_contenders_alone() -> None:
    names = ("a", "b", "c")
    whole = row(
        contenders={name: lambda: None for name in names},
        pairs=[("a", "b"), ("a", "c")],
        amounts=dict.fromkeys(names, (1, "images")),
        flops=dict.fromkeys("ab", (1.0, "fp32")),
    )
    part = whole.only(["a", "c"])
    assert [*part.contenders] == ["a", "c"] and part.pairs == [("a", "c")]
    assert [*part.amounts] == ["a", "c"] and [*part.flops] == ["a"]


def test_threads_are_those_of_the_row_and_afterwards_those_of_the_run() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    given = row(contenders={"a": lambda: seen.append(torch.get_num_threads())}, threads=before + 1)
    assert measure(given, rounds=1, warm_up=0, device=CPU)["threads"] == before + 1
    assert {*seen} == {before + 1} and torch.get_num_threads() == before


def test_a_vits_operations_are_counted_as_published() -> None:
    """timm's table gives ViT-B/16 17.58 G multiply-adds for one image forwards; a step takes about three times that."""
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    from scripts.benchmarks import vit_peers

    with torch.device("meta"):
        model = vit_peers.classifier(vit_peers.config("vit_b16", tiny=False))
    image = torch.empty(1, 3, 224, 224, device="meta")
    assert flops.operations(model, image, training=False) == pytest.approx(2 * 17.58e9, rel=0.01)
    assert flops.operations(model, image, training=True) == pytest.approx(3 * 2 * 17.58e9, rel=0.02)


def test_a_translators_operations_are_those_of_its_matrices() -> None:
    """Base size, 25 tokens a side and V = 8,004, in multiply-adds of one pair forwards:

    encoder, 6 layers:  25 (4 * 512^2 + 2 * 512 * 2048) + 2 * 25^2 * 512 = 79.28 M each
    decoder, 6 layers:  25 (8 * 512^2 + 2 * 512 * 2048) + 4 * 25^2 * 512 = 106.14 M each
    output:             25 * 512 * 8004 = 102.45 M

    in sum 1.215 G; two operations for each, and twice as many backwards as forwards.
    """
    pytest.importorskip("transformers")
    from scripts.benchmarks import seq2seq_peers, seq2seq_train

    with torch.device("meta"):
        model = seq2seq_peers.translator(seq2seq_peers.config(tiny=False), seq2seq_peers.vocabulary(tiny=False))
    assert seq2seq_train.operations(model, 25, training=False) == pytest.approx(2 * 1.215e9, rel=0.01)
    assert seq2seq_train.operations(model, 25, training=True) == pytest.approx(3 * 2 * 1.215e9, rel=0.01)


def test_a_detectors_operations_are_counted_about_as_published() -> None:
    """The paper's table 1 has 86 GFLOPS for DETR-R50, multiply-adds, on images of about 800 x 1066 (and some larger).

    Here it is one of exactly that size, and products alone.
    """
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    from scripts.benchmarks import detr_peer

    model = detr_peer.detector()
    image = torch.empty(1, 3, 800, 1066)
    assert flops.operations(model, image, None, training=False) == pytest.approx(2 * 86e9, rel=0.07)
