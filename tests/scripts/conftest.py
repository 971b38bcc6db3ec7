"""Fixtures of the tests of scripts."""

import pytest


@pytest.fixture(autouse=True)
def small_matrix_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates are compared with those of small matrices in toy benchmarks: bf16 may be emulated, which takes minutes."""
    if request.path.name in ("test_benchmark.py", "test_benchmark_seq2seq.py"):
        from scripts.benchmarks import flops

        monkeypatch.setattr(flops, "SIDES", {"cpu": (64, 128), "cuda": (256,)})
