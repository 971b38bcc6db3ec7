"""The allocator keeps freed memory: large tensors are then allocated without page faults."""

import ctypes
import os
import subprocess
import sys

import pytest

from common.machine import allocation

COUNT = """
import resource
import torch
from common.machine import allocation
assert allocation.keep_freed_memory() or {default}
for _ in range(10):  # glibc cannot use every freed block again at once
    torch.ones(2**24)  # 64 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(environment: dict[str, str]) -> int:
    """Page faults of four tensors of 64 MiB (16,384 pages each)."""
    code = COUNT.format(default=bool(environment))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(allocation.PREFIXES)}
    process = subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, check=True
    )
    return int(process.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")
def test_freed_tensors_are_used_again_unless_the_user_has_set_the_allocator():
    assert faults({}) < 100
    assert faults({"MALLOC_ARENA_MAX": "2"}) > 100


@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_the_users_settings_take_precedence(name):
    assert not allocation.keep_freed_memory({name: "1"})


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_without_glibc_nothing_is_set(monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr(allocation.ctypes, "CDLL", fail)
    assert not allocation.keep_freed_memory({})
