"""The garbage collector pauses once, while a door is being imported, and not in a process that did not pause it."""

import gc
from collections.abc import Iterator

import pytest

from common.machine import collector


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def test_what_exists_when_collections_resume_is_not_searched() -> None:
    collector.pause()
    assert not gc.isenabled()
    collector.resume()
    assert gc.isenabled() and gc.get_freeze_count() > 1000


def test_nothing_is_set_aside_in_a_process_that_did_not_pause() -> None:
    before = gc.get_freeze_count()
    collector.resume()
    assert gc.isenabled() and gc.get_freeze_count() == before
