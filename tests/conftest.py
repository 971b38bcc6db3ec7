"""Fixtures of all tests."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """The folder of a real data set under $TRIPTYCH_DATA (default `data/`); the test is skipped when it is absent."""

    def find(name: str) -> Path:
        folder = Path(os.environ.get("TRIPTYCH_DATA", "data")) / name
        if not folder.is_dir():
            pytest.skip(f"there is no real data {name} in $TRIPTYCH_DATA (default data/)")
        return folder.resolve()

    return find
