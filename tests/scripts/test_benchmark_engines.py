"""OpenVINO and ONNX Runtime as contenders: they run our model, are compared with it, and rest between calls."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("timm")
pytest.importorskip("openvino")
pytest.importorskip("nncf")
pytest.importorskip("onnxruntime")
pytest.importorskip("torchao")

from scripts import benchmark
from scripts.benchmarks import engines, quantised, quantisers
from scripts.benchmarks.timing import Setting
from scripts.exporting import graphs

INT8_NAMES = (engines.OPENVINO_INT8, engines.ONNX_INT8)
QUANTISERS = {quantisers.TORCH_AO, quantisers.TORCHAO}


def run(tmp_path: Path, suite: str, rows: str) -> tuple[int, Path]:
    out = tmp_path / "report.json"
    tiny = ["--tiny", "--device", "cpu", "--warm-up", "0", "--rounds", "1", "--out", str(out)]
    return benchmark.main([suite, *tiny, "--rows", rows]), out


def has_bf16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class Built(NamedTuple):
    """A small model, its input, the folder of the files that engines read, and the engines."""

    model: nn.Module
    images: Tensor
    folder: Path
    engines: engines.Engines

    def again(self) -> engines.Engines:
        """Make the engines from the same folder again."""
        return make(self.model, self.images, self.folder)


def make(model: nn.Module, images: Tensor, folder: Path) -> engines.Engines:
    setting = Setting(device=torch.device("cpu"), tiny=True, compile=False, images=None, scratch=folder)
    return engines.engines(setting, model, images, ("logits",), onnx=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.GELU(), nn.Flatten(), nn.Linear(256, 10)).eval()
    images, folder = torch.randn(2, 3, 16, 16), tmp_path_factory.mktemp("engines")
    return Built(model, images, folder, make(model, images, folder))


@pytest.mark.slow
@pytest.mark.usefixtures("equal_peaks")
@pytest.mark.parametrize(
    ("suite", "row", "missing"), [("vit", "forward", set()), ("detr", "latency", {engines.ONNX_INT8, *QUANTISERS})]
)
def test_our_model_is_paired_with_the_engines_in_each_precision(
    tmp_path: Path, suite: str, row: str, missing: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = run(tmp_path, suite, row)
    assert code == 0, capsys.readouterr().err
    [result] = json.loads(out.read_text())["rows"]
    names = engine_names() | QUANTISERS
    pairs = {(ratio["one"], ratio["other"]) for ratio in result["ratios"] if ratio["other"] in names}
    expected = {pair for pair in (*engines.PAIRS, *quantisers.PAIRS) if pair[1] not in missing}
    if not has_bf16():
        expected.remove(("ours bf16", "OpenVINO bf16"))
    if not quantised.is_supported(torch.device("cpu")):
        expected = {pair for pair in expected if pair[0] != quantised.NAME}
    assert pairs == expected
    for name in names & result["seconds"].keys():
        assert f"{name} logits " in result["agreement"] and name in result["amounts"]
        assert (name in result["rates"]) == ("int8" not in name)
    assert ("ONNX Runtime was not timed" in result["agreement"]) == (suite == "detr")


def engine_names() -> set[str]:
    return {*engines.OPENVINO, *INT8_NAMES}


@pytest.mark.slow
def test_engines_compute_our_models_outputs(built: Built) -> None:
    assert {*built.engines.contenders} == engine_names() - (set() if has_bf16() else {"OpenVINO bf16"})
    with torch.no_grad():
        expected = built.model(built.images)
    differences = {
        name: float((compute()[0] - expected).norm() / expected.norm())
        for name, compute in built.engines.contenders.items()
    }
    assert differences.pop("OpenVINO fp32") < 1e-5
    assert all(1e-5 < difference < 0.1 for difference in differences.values()), differences


@pytest.mark.slow
def test_a_second_process_reads_the_converted_models(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(graphs, "trace", refuse)
    monkeypatch.setattr("nncf.quantize", refuse)
    contenders = built.again().contenders
    for name, compute in built.engines.contenders.items():
        torch.testing.assert_close(contenders[name](), compute(), rtol=0, atol=0)


@pytest.mark.slow
def test_engines_rest_between_calls(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that spins takes time from the next contender; with ONNX Runtime's defaults, it spins for 25 ms."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for name, compute in built.again().contenders.items():
        assert min(idle_time(compute) for _ in range(4)) < 0.01, name  # the first calls also start threads


def idle_time(compute: Callable[[], object]) -> float:
    """The processor time in seconds that this process uses in the 0.2 s after a call."""
    compute()
    start = time.process_time()
    time.sleep(0.2)
    return time.process_time() - start


@pytest.mark.slow
def test_nothing_is_timed_if_an_engine_computes_with_another_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace: Callable[..., Any] = graphs.trace

    def perturbed(*arguments: Any) -> Any:
        program = trace(*arguments)
        name = next(name for name in program.state_dict if name.endswith("contract.bias"))
        bias = program.state_dict[name].detach().clone()
        bias[0] += 0.5
        program.state_dict[name] = nn.Parameter(bias, requires_grad=False)
        return program

    monkeypatch.setattr(graphs, "trace", perturbed)
    code, out = run(tmp_path, "vit", "forward")
    printed = capsys.readouterr()
    assert code == 1 and not out.exists() and not printed.out
    assert "OpenVINO fp32 logits" in printed.err and "not the same work" in printed.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "contender", "remedy"),
    [
        ("openvino", "OpenVINO", "openvino onnx onnxscript"),
        ("nncf", "OpenVINO int8", "nncf"),
        ("onnxruntime", "ONNX Runtime int8", "onnxruntime onnx onnxscript"),
    ],
)
def test_a_missing_package_is_noted(
    built: Built, monkeypatch: pytest.MonkeyPatch, package: str, contender: str, remedy: str
) -> None:
    find_spec = engines.util.find_spec
    monkeypatch.setattr(engines.util, "find_spec", lambda name: None if name == package else find_spec(name))
    others = built.again()
    assert {*others.contenders} == {name for name in built.engines.contenders if not name.startswith(contender)}
    note = f"{contender} was not timed, because {package} is not installed (pip install {remedy})"
    assert others.notes == [*built.engines.notes, note] or others.notes == [note]
