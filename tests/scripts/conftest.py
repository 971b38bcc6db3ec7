"""Fixtures of the tests of scripts."""

from typing import Any

import pytest


@pytest.fixture(autouse=True)
def small_matrix_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use small matrix products in toy benchmarks, since large ones take minutes where bf16 is emulated."""
    if request.path.name in ("test_benchmark.py", "test_benchmark_engines.py", "test_benchmark_seq2seq.py"):
        from scripts.benchmarks import flops

        monkeypatch.setattr(flops, "MATRIX_SIDES", {"cpu": (64, 128), "cuda": (256,)})


@pytest.fixture(autouse=True)
def without_engines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave OpenVINO and ONNX Runtime out of the rows of test_benchmark.py, since their conversion takes seconds."""
    if request.path.name == "test_benchmark.py":
        from scripts.benchmarks import detr_forward, engines, vit_forward

        for module in (detr_forward, vit_forward):
            monkeypatch.setattr(module, "engines", lambda *arguments, **options: engines.NO_ENGINES)


@pytest.fixture
def equal_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each contender have a peak of 1 MiB. To measure peaks, rows are built again, which takes most of the time.

    test_benchmark_numbers.py tests the measurement.
    """
    from scripts import benchmark
    from scripts.benchmarks import peak, timing

    rows: list[timing.Row] = []

    def measure(row: timing.Row, **options: Any) -> dict[str, Any]:
        rows.append(row)
        return timing.measure(row, **options)

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(peak, "measure_peaks", lambda build, setting: dict.fromkeys(rows.pop().contenders, 2**20))
