"""Fixtures of the tests of scripts."""

import pytest


@pytest.fixture(autouse=True)
def small_matrix_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use small matrix products in toy benchmarks, since large ones take minutes where bf16 is emulated."""
    if request.path.name in ("test_benchmark.py", "test_benchmark_seq2seq.py"):
        from scripts.benchmarks import flops

        monkeypatch.setattr(flops, "MATRIX_SIDES", {"cpu": (64, 128), "cuda": (256,)})


@pytest.fixture
def peaks_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure peaks in this process: a process for each row, as in a report, takes most of the time at toy sizes.

    test_benchmark_numbers.py tests the measurement in a process of its own.
    """
    from scripts.benchmarks import peak

    monkeypatch.setattr(peak, "measure_peaks", lambda build, setting: peak._row_peaks(build(setting), setting.device))
